"""Cached pages of the device as bytes, and back: what a server that stops keeps of its prefix cache, on disk.

A page is the bytes of its blocks, one after the other; a block has the numbers of all layers, and an int8 cache's
scales behind them. `form` says for which model and number types they are, and nothing else ever takes them.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import batched, islice, takewhile
from typing import Any, Protocol, runtime_checkable

import numpy as np

from apt_jax.cache import KINDS, BlockTable, CacheKind
from apt_jax.execution.pool import Block
from apt_jax.request import Request, SamplingParams
from apt_jax.scheduling.prefix_pool import Page
from apt_jax.scheduling.state import SchedulerState

PAGES_AT_ONCE = 8
_NOTHING = SamplingParams()


@runtime_checkable
class BlockStore(Protocol):
    """A runner all of whose pool this process can read.

    Attributes:
        moves_blocks: set before everything is compiled if blocks will be read and written.
    """

    moves_blocks: bool

    @property
    def block_shape(self) -> Block:
        """Shapes and number types of a block's arrays."""

    @property
    def block_form(self) -> dict[str, Any]:
        """What else the numbers of a block depend on, besides the weights, as JSON has it."""

    def read_blocks(self, blocks: Sequence[int]) -> list[Block]:
        """Copies of blocks as numpy arrays, after all that was started before."""

    def write_blocks(self, blocks: Sequence[int], contents: Sequence[Block]) -> None:
        """Put numpy arrays into blocks, before all that is started later."""


@dataclass(frozen=True)
class Saved:
    """Pages of one request: the first ones of its tokens.

    Attributes:
        form: as of `SavedPages.form`.
        page_bytes: bytes of each of `pages`, which are read from the device as they are asked for.
    """

    form: dict[str, Any]
    num_pages: int
    page_bytes: int
    pages: Iterator[bytes]


class SavedPages:
    """Pages out of an engine's prefix cache and into it, between two of its steps.

    Args:
        fingerprint: of the weights; empty: unknown, and nothing is saved or taken.
    """

    def __init__(self, state: SchedulerState, runner: BlockStore, fingerprint: str):
        assert state.prefixes is not None
        self._state, self._prefixes, self._runner = state, state.prefixes, runner
        self._fingerprint = fingerprint

    def prepare(self) -> None:
        """Have what is needed compiled with everything else."""
        self._runner.moves_blocks = True

    @property
    def block_size(self) -> int:
        """Tokens of a page."""
        return self._state.pool.block_size

    def form(self, kind: CacheKind) -> dict[str, Any]:
        """All that pages of `kind` depend on, besides their tokens."""
        shapes = [[list(a.shape), np.dtype(a.dtype).name] for a in self._runner.block_shape if a is not None]
        return {
            "kind": kind.spec.name, "block": shapes, "fingerprint": self._fingerprint, **self._runner.block_form,
        }  # fmt: skip

    def page_bytes(self, kind: CacheKind) -> int:
        """Bytes of a page."""
        arrays = [array for array in self._runner.block_shape if array is not None]
        return kind.blocks_per_page * sum(int(np.prod(a.shape)) * np.dtype(a.dtype).itemsize for a in arrays)

    def save(self, token_ids: Sequence[int], cache_salt: str | None) -> Saved | None:
        """The pages on the device with which a request of these tokens would begin; None if there are none.

        They are of the kind as which most are cached. To be read before the engine does anything else.
        """
        if not self._fingerprint:
            return None
        request = _request(token_ids, cache_salt)
        found = {kind: self._on_device(request, kind) for kind in self._state.limits.kinds}
        kind = max(found, key=lambda kind: len(found[kind]))
        if not found[kind]:
            return None
        return Saved(self.form(kind), len(found[kind]), self.page_bytes(kind), self._read(found[kind]))

    def restore(
        self, token_ids: Sequence[int], cache_salt: str | None, form: dict[str, Any], pages: Iterable[bytes]
    ) -> int:
        """Enter pages of these tokens, the first ones, in the prefix cache, as far as no other page must go for them.

        Returns:
            How many tokens of these are cached now; none if the pages are of another form.
        """
        kind = next((kind for kind in KINDS if kind.spec.name == form.get("kind")), None)
        if kind not in self._state.limits.kinds or not self._fingerprint or form != self.form(kind):
            return 0
        pool, size = self._prefixes, self.block_size
        request = _request(token_ids, cache_salt)
        cached = self._on_device(request, kind)
        request.table = table = BlockTable(kind)
        pool.share(table, cached)
        done = len(cached)
        left = min(len(token_ids) // size - done, (pool.num_free - pool.num_idle) // kind.blocks_per_page)
        wanted = islice(pages, done, done + max(left, 0))
        try:
            for group in batched(_of_size(wanted, self.page_bytes(kind)), PAGES_AT_ONCE):
                pool.grow(table, (table.num_pages + len(group)) * size)
                columns = [blocks[-len(group) :] for blocks in table.blocks]
                blocks = [column[i] for i in range(len(group)) for column in columns]
                self._runner.write_blocks(blocks, [block for page in group for block in self._blocks(page, kind)])
                done = table.num_pages
        finally:
            pool.keep(request, done)
            pool.release(table)
        return done * size

    def _on_device(self, request: Request, kind: CacheKind) -> list[Page]:
        pages = self._prefixes.find(request, kind, request.num_tokens // self.block_size)
        return [page for page in takewhile(lambda page: isinstance(page, Page), pages) if isinstance(page, Page)]

    def _read(self, pages: Sequence[Page]) -> Iterator[bytes]:
        for group in batched(pages, PAGES_AT_ONCE):
            blocks = iter(self._runner.read_blocks([block for page in group for block in page.blocks]))
            for page in group:
                arrays = [array for _ in page.blocks for array in next(blocks) if array is not None]
                yield b"".join(array.tobytes() for array in arrays)

    def _blocks(self, page: bytes, kind: CacheKind) -> Iterator[Block]:
        shape, at = self._runner.block_shape, 0
        for _ in range(kind.blocks_per_page):
            arrays: list[np.ndarray | None] = []
            for like in shape:
                if like is None:
                    arrays.append(None)
                    continue
                count = int(np.prod(like.shape))
                arrays.append(np.frombuffer(page, like.dtype, count, at).reshape(like.shape))
                at += count * np.dtype(like.dtype).itemsize
            yield Block(*arrays)


def digest_of(array: np.ndarray | None) -> str | None:
    """A short hash of an array's bytes, for a form."""
    return None if array is None else hashlib.sha256(array.tobytes()).hexdigest()[:32]


def _request(token_ids: Sequence[int], cache_salt: str | None) -> Request:
    """One that looks its tokens up, and is never queued."""
    return Request("saved", token_ids, _NOTHING, 0.0, 1, cache_salt=cache_salt)


def _of_size(pages: Iterable[bytes], size: int) -> Iterator[bytes]:
    return takewhile(lambda page: len(page) == size, pages)
