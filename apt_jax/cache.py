"""Host accounting of the unified cache pool: which blocks are free, and which blocks a request holds.

A block holds one D-vector for each of `block_size` tokens, in every layer. A page (the same tokens) takes two
blocks as KV (keys, values) and one as hidden vectors. Source: DESIGN, "The hybrid cache".
"""

import enum
from collections.abc import Iterable
from dataclasses import dataclass, field


class CacheKind(enum.Enum):
    """What a request keeps for its past tokens: keys and values, or attention-input hidden vectors."""

    KV = "kv"
    HIDDEN = "hidden"

    def __init__(self, value: str):
        self.blocks_per_page = 2 if value == "kv" else 1  # read for every request in every iteration


def pages_for(tokens: int, block_size: int) -> int:
    """Pages that hold `tokens` tokens."""
    return -(-tokens // block_size)


def blocks_for(tokens: int, kind: CacheKind, block_size: int) -> int:
    """Blocks that hold `tokens` tokens of a request of `kind`."""
    return pages_for(tokens, block_size) * kind.blocks_per_page


class OutOfBlocks(RuntimeError):
    """More blocks were asked for than are free: a scheduling policy planned past the pool."""


@dataclass
class BlockTable:
    """The blocks of one request, page by page.

    `first[i]` holds page i's keys (KV) or hidden vectors (HIDDEN); `second[i]` its values (KV only).
    """

    kind: CacheKind
    first: list[int] = field(default_factory=list)
    second: list[int] = field(default_factory=list)

    @property
    def num_pages(self) -> int:
        """Pages held."""
        return len(self.first)

    @property
    def num_blocks(self) -> int:
        """Blocks held."""
        return len(self.first) + len(self.second)


class BlockPool:
    """A free list over block ids `0 .. num_blocks-1`; deterministic, last released is first reused."""

    def __init__(self, num_blocks: int, block_size: int):
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"{num_blocks=} and {block_size=} must both be at least 1")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def grow(self, table: BlockTable, tokens: int) -> None:
        """Extend `table` in place until it holds `tokens` tokens; a table never shrinks.

        Raises:
            OutOfBlocks: not enough are free; `table` is unchanged.
        """
        pages = pages_for(tokens, self.block_size) - table.num_pages
        if pages <= 0:
            return
        blocks = self._take(pages * table.kind.blocks_per_page)
        table.first.extend(blocks[:pages])
        table.second.extend(blocks[pages:])

    def convert_to_kv(self, table: BlockTable) -> None:
        """Turn a hidden table into a KV table in place: keys take the hidden blocks, values take new ones.

        Raises:
            OutOfBlocks: fewer blocks are free than the table has pages; `table` is unchanged.
        """
        if table.kind is not CacheKind.HIDDEN:
            raise ValueError(f"only a hidden table can be converted, this one is {table.kind.value}")
        table.second = self._take(table.num_pages)
        table.kind = CacheKind.KV

    def release(self, table: BlockTable) -> None:
        """Give all of `table`'s blocks back and empty it."""
        self._give(reversed(table.second))
        self._give(reversed(table.first))
        table.first.clear()
        table.second.clear()

    def check(self, tables: Iterable[BlockTable]) -> None:
        """Assert that free blocks and `tables` together are exactly the pool's blocks, each once."""
        held = [block for table in tables for block in (*table.first, *table.second)]
        everything = sorted([*self._free, *held])
        assert everything == list(range(self.num_blocks)), (
            f"blocks leaked or shared: {len(self._free)} free + {len(held)} held, {self.num_blocks} in the pool"
        )

    def _take(self, count: int) -> list[int]:
        if count > len(self._free):
            raise OutOfBlocks(f"{count} blocks wanted, {len(self._free)} of {self.num_blocks} free")
        if count == 0:
            return []
        taken = self._free[-count:][::-1]
        del self._free[-count:]
        return taken

    def _give(self, blocks: Iterable[int]) -> None:
        self._free.extend(blocks)
