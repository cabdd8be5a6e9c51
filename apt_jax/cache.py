"""What requests keep of their past tokens, and host accounting of the unified pool that holds it.

A block holds one D-vector for each of `block_size` tokens, in every layer. A page (the same tokens) takes one block
for each vector that its cache kind keeps of a token. Source: docs/hybrid_cache.md.

A new cache kind is a `CacheSpec` and a member of `CacheKind`, and a mode in which requests may have it.
"""

import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, cast, get_args


class Vector(enum.Enum):
    """What a block holds of each token: D numbers in every layer."""

    KEY = "key"
    VALUE = "value"
    HIDDEN = "hidden"  # the attention's input, from which its key and value can be computed


@dataclass(frozen=True)
class CacheSpec:
    """Everything that sets one cache kind apart; code asks for these properties instead of for the kind.

    Attributes:
        name: in flags, metrics, plans and JSON.
        label: in text for people.
        vectors: what is kept of a token. Block tables, on the host and on the device, are in this order.
        number_bytes: bytes of a number in a block; None is what the model computes in.
        converts_to: name of the kind, declared before this one, into which a table can be turned in place.
    """

    name: str
    label: str
    vectors: tuple[Vector, ...]
    number_bytes: int | None = None
    converts_to: str | None = None


class CacheKind(enum.Enum):
    """What a request keeps for its past tokens: keys and values, or attention-input hidden vectors."""

    KV = CacheSpec("kv", "KV", (Vector.KEY, Vector.VALUE))
    HIDDEN = CacheSpec("hidden", "hidden vectors", (Vector.HIDDEN,), converts_to="kv")

    # plain attributes: read for every request in every iteration
    spec: CacheSpec
    index: int  # of the kind in arrays with one entry for each
    blocks_per_page: int
    is_projected: bool  # whether keys and values have to be computed from what is kept
    converts_to: "CacheKind | None"

    def __new__(cls, spec: CacheSpec) -> "CacheKind":
        """A member whose value is the spec's name."""
        member = object.__new__(cls)
        member._value_ = spec.name
        member.spec = spec
        member.index = len(cls.__members__)
        member.blocks_per_page = len(spec.vectors)
        member.is_projected = Vector.HIDDEN in spec.vectors
        member.converts_to = next((kind for kind in cls if kind.value == spec.converts_to), None)
        return member

    @classmethod
    def named(cls, name: str) -> "CacheKind":
        """The kind with this name; ValueError if there is none."""
        return cls(name)  # type: ignore[arg-type]  # a member's value is its name


KINDS = tuple(CacheKind)  # KINDS[kind.index] is kind
CacheMode = Literal["hybrid", "kv", "hidden"]
CacheDtype = Literal["auto", "int8"]  # of the numbers in blocks; auto is what the model computes in
MODE_KINDS: dict[CacheMode, tuple[CacheKind, ...]] = {  # kinds that a request may be admitted with, preferred one first
    "kv": (CacheKind.KV,),
    "hidden": (CacheKind.HIDDEN,),
    "hybrid": (CacheKind.KV, CacheKind.HIDDEN),
}


def as_cache_dtype(name: str) -> CacheDtype:
    """The `CacheDtype` called so.

    Raises:
        ValueError: there is none; one sentence with what to use.
    """
    if isinstance(name, str) and name.startswith("fp8"):
        raise ValueError(
            f"cache_dtype={name!r} is not offered: at the same bytes its error is three times int8's; use int8"
        )
    if name not in get_args(CacheDtype):
        raise ValueError(f"cache_dtype={name!r} is not one of {', '.join(get_args(CacheDtype))}")
    return cast(CacheDtype, name)


def keeps_hidden(mode: CacheMode) -> bool:
    """Whether requests may keep what has to be projected to keys and values."""
    return any(kind.is_projected for kind in MODE_KINDS[mode])


def per_kind[T](value_of: Callable[[CacheKind], T]) -> tuple[T, ...]:
    """One value for each kind, by `kind.index`."""
    return tuple(value_of(kind) for kind in KINDS)


def pages_for(tokens: int, block_size: int) -> int:
    """Pages that hold `tokens` tokens."""
    return -(-tokens // block_size)


def blocks_for(tokens: int, kind: CacheKind, block_size: int) -> int:
    """Blocks that hold `tokens` tokens of a request of `kind`."""
    return pages_for(tokens, block_size) * kind.blocks_per_page


class OutOfBlocks(RuntimeError):
    """More blocks were asked for than are free: a scheduling policy planned past the pool."""


class Projection(NamedTuple):
    """Pages of which the device computes one kind from another: hidden vectors in `sources`, a block for each page.

    `targets[v][i]` gets vector v of the new kind for page i; it may be `sources[i]` itself.
    """

    sources: list[int]
    targets: list[list[int]]


@dataclass
class BlockTable:
    """The blocks of one request: `blocks[v][i]` holds vector `kind.spec.vectors[v]` of page i's tokens."""

    kind: CacheKind
    blocks: list[list[int]] = field(default_factory=list)
    num_pages: int = field(init=False)  # kept here: read for every request in every iteration
    num_listed: int = 0  # first pages that a prefix cache knows, see `scheduling/prefix_pool.py`

    def __post_init__(self) -> None:
        if not self.blocks:
            self.blocks = [[] for _ in range(self.kind.blocks_per_page)]
        self.num_pages = len(self.blocks[0])

    @property
    def num_blocks(self) -> int:
        """Blocks held."""
        return self.num_pages * self.kind.blocks_per_page


class BlockPool:
    """A free list over block ids `0 .. num_blocks-1`; deterministic, last released is first reused."""

    def __init__(self, num_blocks: int, block_size: int):
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"{num_blocks=} and {block_size=} must both be at least 1")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._held = [0] * len(KINDS)

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def num_held(self, kind: CacheKind) -> int:
        """Blocks in tables of `kind`."""
        return self._held[kind.index]

    def grow(self, table: BlockTable, tokens: int) -> None:
        """Extend `table` in place until it holds `tokens` tokens; a table never shrinks.

        Raises:
            OutOfBlocks: not enough are free; `table` is unchanged.
        """
        pages = pages_for(tokens, self.block_size) - table.num_pages
        if pages <= 0:
            return
        kind = table.kind
        taken = self._take(pages * kind.blocks_per_page)
        self._held[kind.index] += len(taken)
        for v, blocks in enumerate(table.blocks):
            blocks.extend(taken[v * pages : (v + 1) * pages])
        table.num_pages += pages

    def convert(self, table: BlockTable) -> Projection:
        """Turn a table into one of the kind that its own converts to, in place; what the device has to do.

        The new kind's first vectors take the blocks there are, the others take new ones.

        Raises:
            OutOfBlocks: too few blocks are free; `table` is unchanged.
        """
        old, new, pages = table.kind, table.kind.converts_to, table.num_pages
        if new is None:
            raise ValueError(f"a table of kind {old.value} cannot be converted in place")
        added = new.blocks_per_page - old.blocks_per_page
        taken, sources = self._take(added * pages), [*table.blocks[0]]
        table.blocks += [taken[v * pages : (v + 1) * pages] for v in range(added)]
        table.kind = new
        self._held[old.index] -= old.blocks_per_page * pages
        self._held[new.index] += new.blocks_per_page * pages
        return Projection(sources, [[*blocks] for blocks in table.blocks])

    def release(self, table: BlockTable) -> None:
        """Give all of `table`'s blocks back and empty it."""
        self._held[table.kind.index] -= table.num_blocks
        for blocks in reversed(table.blocks):
            self._free.extend(reversed(blocks))
            blocks.clear()
        table.num_pages = 0

    def check(self, tables: Iterable[BlockTable]) -> None:
        """Assert that free blocks and `tables` together are exactly the pool's blocks, each once, and counted right."""
        tables = list(tables)
        assert all(len(blocks) == table.num_pages for table in tables for blocks in table.blocks)
        held = [block for table in tables for blocks in table.blocks for block in blocks]
        everything = sorted([*self._free, *held])
        assert everything == list(range(self.num_blocks)), (
            f"blocks leaked or shared: {len(self._free)} free + {len(held)} held, {self.num_blocks} in the pool"
        )
        by_kind = [sum(table.num_blocks for table in tables if table.kind is kind) for kind in KINDS]
        assert by_kind == self._held, f"blocks by kind are {by_kind}, counted as {self._held}"

    def _take(self, count: int) -> list[int]:
        if count > self.num_free:
            raise OutOfBlocks(f"{count} blocks wanted, {self.num_free} of {self.num_blocks} free")
        if count == 0:
            return []
        taken = self._free[-count:][::-1]
        del self._free[-count:]
        return taken
