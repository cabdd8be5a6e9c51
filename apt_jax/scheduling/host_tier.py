"""Cached pages in host memory: where a `PrefixPool` puts what it evicts, and finds it again.

Host memory has slots, one for each block of the pool. A page that leaves the device is copied to slots, and one that a
request begins with is copied back to new blocks; its copy stays, so that it need not be copied out again (studies may
have it go). When slots run out, the page used longest ago is lost. A preempted request's pages are idle ones of the
pool and go the same way, so it is moved instead of computed again.

This is accounting: `take_moves` says what is to be copied before the next iteration, and beside it. Source: retained
copies as in FastSwitch (arXiv 2411.18424); hidden vectors are half of KV to move, as in HCache (arXiv 2410.05004).
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from apt_jax.cache import KINDS, CacheKind


class HostPage:
    """A full page in host memory, found by its `key`."""

    __slots__ = ("key", "kind", "slots")
    refs: ClassVar[int] = 0  # as a page of the pool that nobody holds: it takes new blocks

    def __init__(self, key: bytes, kind: CacheKind, slots: tuple[int, ...]):
        self.key, self.kind, self.slots = key, kind, slots


@dataclass(frozen=True)
class Moves:
    """Copies of an iteration: before it pairs (block, slot) to save, then pairs (slot, block) to restore.

    Beside it pairs (slot, block) to fetch, into blocks that it neither reads nor writes; they are there after it.
    """

    saved: Sequence[tuple[int, int]] = ()
    restored: Sequence[tuple[int, int]] = ()
    fetched: Sequence[tuple[int, int]] = ()

    def __bool__(self) -> bool:
        return bool(self.saved or self.restored or self.fetched)


class HostTier:
    """Pages in `num_slots` slots.

    Attributes:
        restores: by kind, whether copying a page back is quicker than computing its tokens. Others are not kept. It is
            for all kinds if nothing is known.
        retains: whether the copy of a page stays that was copied back.
        block_s: seconds to copy a block back, as measured; None if that is not known.
        num_saved, num_restored: blocks copied since the start.
        on_lost: called with the key of each page that it loses.
    """

    def __init__(
        self, num_slots: int, restores: Sequence[bool] | None = None, *, retains: bool = True,
        block_s: float | None = None,
    ):  # fmt: skip
        if num_slots < 1:
            raise ValueError(f"{num_slots=} must be at least 1")
        self.num_slots, self.retains, self.block_s = num_slots, retains, block_s
        self.restores = [True] * len(KINDS) if restores is None else [*restores]
        self.num_saved = self.num_restored = 0
        self.on_lost: Callable[[bytes], None] = lambda _: None
        self._free = list(range(num_slots - 1, -1, -1))
        self._pages: OrderedDict[tuple[int, bytes], HostPage] = OrderedDict()  # used longest ago first
        self._in_use: set[tuple[int, bytes]] = set()  # to be restored by the next moves
        self._saved: list[tuple[int, int]] = []
        self._new: set[tuple[int, bytes]] = set()  # pages that `_saved` is to fill
        self._restored: list[tuple[int, int]] = []
        self._fetched: list[tuple[int, int]] = []
        self._returned: list[tuple[int, bytes]] = []  # pages of it, if they are not to stay

    @property
    def num_used(self) -> int:
        """Slots that hold blocks."""
        return self.num_slots - len(self._free)

    def find(self, key: bytes, kind: CacheKind) -> HostPage | None:
        """The page of `kind` with this key, if copying it back is worth it."""
        return self._pages.get((kind.index, key)) if self.restores[kind.index] else None

    def save(self, key: bytes, kind: CacheKind, blocks: Sequence[int]) -> None:
        """Keep a page that leaves `blocks`; it is lost where all slots are about to be read."""
        place = kind.index, key
        if not self.restores[kind.index]:
            return
        if place in self._pages:
            self._pages.move_to_end(place)
            return
        while len(self._free) < len(blocks):
            oldest = next((each for each in self._pages if each not in self._in_use), None)
            if oldest is None:
                return
            self._drop(oldest)
        slots = tuple(self._free.pop() for _ in blocks)
        self._pages[place] = HostPage(key, kind, slots)
        self._saved += zip(blocks, slots, strict=True)
        self._new.add(place)

    def hold(self, page: HostPage) -> None:
        """Keep a page until the next moves have been taken."""
        self._in_use.add((page.kind.index, page.key))

    def restore(self, page: HostPage, blocks: Sequence[int], *, beside: bool = False) -> None:
        """Copy a page that is held to `blocks`, before the iteration or beside it."""
        place = page.kind.index, page.key
        assert place in self._in_use
        self._pages.move_to_end(place)
        if not self.retains:
            self._returned.append(place)
        pairs = self._fetched if beside else self._restored
        pairs += zip(page.slots, blocks, strict=True)

    def take_moves(self) -> Moves:
        """What is to be copied now, before anything else is done to the pool's blocks."""
        moves = Moves(self._saved, self._restored, self._fetched)
        self._saved, self._restored, self._fetched = [], [], []
        for place in self._returned:
            if place in self._pages:
                self._drop(place)
        self._returned.clear()
        self._new.clear()
        self._in_use.clear()
        self.num_saved += len(moves.saved)
        self.num_restored += len(moves.restored) + len(moves.fetched)
        return moves

    def forget(self, key: bytes, kind: CacheKind) -> None:
        """Lose a page; nothing happens if there is none."""
        if (kind.index, key) in self._pages:
            self._drop((kind.index, key))

    def forget_slots(self, slots: Sequence[int]) -> None:
        """Lose the pages in any of these slots, whose copies failed."""
        lost = set(slots)
        for place in [place for place, page in self._pages.items() if lost.intersection(page.slots)]:
            self._drop(place)

    def clear(self) -> None:
        """Lose every page, and what was to be copied."""
        for place in list(self._pages):
            self._drop(place)
        self._saved, self._restored, self._fetched = [], [], []
        self._returned.clear()
        self._new.clear()
        self._in_use.clear()

    def check(self) -> None:
        """Assert that every slot is free or holds one block of one page."""
        used = [slot for page in self._pages.values() for slot in page.slots]
        assert sorted([*self._free, *used]) == list(range(self.num_slots)), f"{len(self._free)} free, {len(used)} used"
        assert all(len(page.slots) == page.kind.blocks_per_page for page in self._pages.values())
        assert all(place == (page.kind.index, page.key) for place, page in self._pages.items())
        assert self._in_use <= self._pages.keys()

    def _drop(self, place: tuple[int, bytes]) -> None:
        page = self._pages.pop(place)
        self.on_lost(page.key)
        self._free += reversed(page.slots)
        self._in_use.discard(place)
        if place in self._new:
            self._new.discard(place)
            slots = set(page.slots)
            self._saved = [pair for pair in self._saved if pair[1] not in slots]
