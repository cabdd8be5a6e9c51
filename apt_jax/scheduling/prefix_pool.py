"""A block pool whose full pages are kept after their request has gone, and shared by requests that begin alike.

A page is found again by its key: the SHA-256 of all tokens up to the page's end, after a secret of the pool, which has
one model and one number type, and the request's `cache_salt`. Different tokens never have equal keys in practice.

Each page in the table counts the block tables that hold it. One that nobody holds is idle: it counts as free, and is
evicted when blocks run out, the one released longest ago first. A page of a block table is never evicted, and a page
enters the table only when all its tokens have been computed (`keep`), so nobody ever writes to a shared page.

With a `HostTier` what is evicted goes there, and is found there after the pages that are still on the device.
"""

import secrets
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence

from apt_jax.cache import KINDS, BlockPool, BlockTable, CacheKind, OutOfBlocks, Projection
from apt_jax.request import Request
from apt_jax.scheduling.found_pages import FoundPages
from apt_jax.scheduling.host_tier import HostPage, HostTier


class Page:
    """A full page that can be found by its `key`, until that is None; `refs` block tables hold it."""

    __slots__ = ("blocks", "key", "kind", "refs")

    def __init__(self, key: bytes, kind: CacheKind, blocks: tuple[int, ...], refs: int):
        self.key: bytes | None = key
        self.kind, self.blocks, self.refs = kind, blocks, refs


class PrefixPool(BlockPool):
    """A `BlockPool` with a table of full pages. `num_free` counts idle pages, `num_held` a shared page once.

    Args:
        host: where evicted pages go; None: they are lost.
    """

    def __init__(self, num_blocks: int, block_size: int, secret: bytes | None = None, host: HostTier | None = None):
        super().__init__(num_blocks, block_size)
        self.host = host
        self._secret = secrets.token_bytes(32) if secret is None else secret
        self._table: tuple[dict[bytes, Page], ...] = tuple({} for _ in KINDS)
        self._by_block: dict[int, Page] = {}  # by their first block, also those that left the table while held
        self._idle: OrderedDict[int, Page] = OrderedDict()  # by their first block, released longest ago first
        self._num_idle = 0  # blocks in them
        self._shared: set[int] = set()  # first blocks of pages in several tables
        self._num_shared = 0  # blocks in them
        self._found: FoundPages[Page | HostPage] = FoundPages()
        if host is not None:
            host.on_lost = self._found.changed

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, those of idle pages included."""
        return len(self._free) + self._num_idle

    @property
    def num_idle(self) -> int:
        """Of the free blocks those in pages that can still be found."""
        return self._num_idle

    @property
    def num_shared(self) -> int:
        """Blocks in several tables, each counted once."""
        return self._num_shared

    @property
    def num_repeated(self) -> int:
        """Blocks by which all tables together have more than are held: those of shared pages but once."""
        return sum((self._by_block[first].refs - 1) * len(self._by_block[first].blocks) for first in self._shared)

    def shared_blocks(self, table: BlockTable) -> int:
        """Blocks of `table` that other tables hold too."""
        if not self._shared:
            return 0
        return len(self._shared.intersection(table.blocks[0])) * table.kind.blocks_per_page

    def given_back(self, table: BlockTable, gone: dict[int, int]) -> int:
        """Blocks that releasing `table` frees after the tables that `gone` counts, to which it is added.

        `gone` has, by first block, how many holders of a shared page would have released it.
        """
        shared = self._shared.intersection(table.blocks[0])
        kept = 0
        for first in shared:
            gone[first] = gone.get(first, 0) + 1
            kept += gone[first] < self._by_block[first].refs
        return (table.num_pages - kept) * table.kind.blocks_per_page

    @property
    def cold(self) -> Collection[int]:
        """Arrival numbers of queued requests that are known to find nothing; see `is_cold`."""
        return self._found.cold

    def is_cold(self, request: Request) -> bool:
        """Whether a queued request finds nothing, of any kind. Most do, and asking again costs next to nothing."""
        if request.order in self._found.cold:
            return True
        if request.order in self._found.warm:
            return False
        if request.num_tokens <= self.block_size or not (self._by_block or (self.host and self.host.num_used)):
            return True
        request.extend_page_keys(1, self.block_size, self._secret)
        key = request.page_keys[0]
        is_cached = any(key in table for table in self._table) or (
            self.host is not None and any(self.host.find(key, kind) for kind in KINDS)
        )
        if request.order >= 0:
            self._found.remember_first(request.order, key, is_cached=is_cached)
        return not is_cached

    def find(self, request: Request, kind: CacheKind, most_pages: int) -> Sequence[Page | HostPage]:
        """The pages of `kind` that hold the first tokens of `request`, at most so many. Not to be changed.

        What a queued request found is remembered until one of these pages, or the next one, comes or goes.
        """
        table, host = self._table[kind.index], self.host
        if most_pages <= 0 or not (table or (host is not None and host.num_used)):
            return ()
        found = self._found.get(request.order, kind, most_pages) if request.order >= 0 else None
        if found is None:
            found = []
            for i in range(most_pages):
                if i >= len(request.page_keys):  # the first one alone: most prompts share nothing
                    request.extend_page_keys(most_pages if i else 1, self.block_size, self._secret)
                key = request.page_keys[i]
                page = table.get(key) or (None if host is None else host.find(key, kind))
                if page is None:
                    break
                found.append(page)
            if request.order >= 0:
                self._found.remember(request.order, kind, found, request.page_keys, most_pages)
        return found if len(found) <= most_pages else found[:most_pages]

    def left(self, request: Request) -> None:
        """Remember nothing more of a request that is queued no longer."""
        self._found.left(request.order, request.page_keys)

    def share(self, table: BlockTable, pages: Sequence[Page | HostPage]) -> None:
        """Begin the empty `table` with found pages; those in host memory take new blocks.

        Raises:
            OutOfBlocks: not enough are free; nothing is changed.
        """
        assert not table.num_pages
        per_page, held = table.kind.blocks_per_page, 0
        if self.host is not None:
            taken = per_page * sum(page.refs == 0 for page in pages)
            if taken > self.num_free:
                raise OutOfBlocks(f"{taken} blocks wanted, {self.num_free} of {self.num_blocks} free")
        for page in pages:
            if isinstance(page, HostPage):
                assert self.host is not None
                self.host.hold(page)
                continue
            first = page.blocks[0]
            page.refs += 1
            if page.refs == 1:
                del self._idle[first]
                held += per_page
            elif page.refs == 2:
                self._shared.add(first)
                self._num_shared += per_page
        self._num_idle -= held
        self._held[table.kind.index] += held
        own = [self._restored(page) if isinstance(page, HostPage) else page for page in pages]
        for v, blocks in enumerate(table.blocks):
            blocks.extend([page.blocks[v] for page in own])
        table.num_pages = table.num_listed = len(pages)

    def fetch(self, pages: Sequence[Page | HostPage], most: int) -> None:
        """Bring at most so many of the found pages back from host memory ahead of need, to blocks that count as free.

        Until they are shared they are idle: whoever needs the blocks gets them, but these last of all. That holds for
        those of `pages` that are idle already, too.

        Raises:
            OutOfBlocks: not enough are free; nothing is changed.
        """
        away = [page for page in pages if isinstance(page, HostPage)][:most]
        self._use(pages)
        if not away:
            return
        assert self.host is not None
        taken = sum(page.kind.blocks_per_page for page in away)
        if taken > self.num_free - self.idle_blocks(pages):
            raise OutOfBlocks(f"{taken} blocks wanted ahead of need, {self.num_free} of {self.num_blocks} free")
        for page in away:
            self.host.hold(page)
        back = {id(page): self._fetched(page) for page in away}
        self._use([back.get(id(page), page) for page in pages])

    def idle_blocks(self, pages: Sequence[Page | HostPage]) -> int:
        """Blocks of those of found pages that are on the device and that nobody holds."""
        return sum(len(page.blocks) for page in pages if isinstance(page, Page) and not page.refs)

    def forget_slots(self, slots: Sequence[int]) -> None:
        """Lose the pages in any of these slots of host memory, whose copies failed."""
        assert self.host is not None
        self.host.forget_slots(slots)

    def lose(self, blocks: Iterable[int]) -> None:
        """Forget idle pages in any of these blocks, whose contents never came, and their copies in host memory."""
        for block in blocks:
            page = self._by_block.get(block)
            if page is None or page.refs:
                continue
            if self.host is not None and page.key is not None:
                self.host.forget(page.key, page.kind)
            self._unlist(page)
            self._drop_idle(page)

    def keep(self, request: Request, pages: int) -> None:
        """Enter the first `pages` pages of a request, which are computed, unless equal ones are in the table."""
        table = request.table
        assert table is not None and pages <= table.num_pages
        request.extend_page_keys(pages, self.block_size, self._secret)
        listed = self._table[table.kind.index]
        for i in range(table.num_listed, pages):
            key, blocks = request.page_keys[i], tuple([column[i] for column in table.blocks])
            if key not in listed and blocks[0] not in self._by_block:
                listed[key] = self._by_block[blocks[0]] = Page(key, table.kind, blocks, 1)
                self._found.changed(key)
        table.num_listed = max(table.num_listed, pages)

    def forget(self, table: BlockTable) -> None:
        """Take the pages of a table out of the prefix table, those that it shares and their copies included."""
        for first in table.blocks[0]:
            page = self._by_block.get(first)
            if page is not None:
                if self.host is not None and page.key is not None:
                    self.host.forget(page.key, page.kind)
                self._unlist(page)

    def clear(self) -> None:
        """Forget every page; those in block tables stay where they are."""
        if self.host is not None:
            self.host.clear()
        for page in list(self._by_block.values()):
            self._unlist(page)
            if page.refs == 0:
                self._drop_idle(page)

    def convert(self, table: BlockTable) -> Projection:
        """As in a `BlockPool`, but pages that others hold too stay theirs: the table gets new blocks for these.

        What was its own can no longer be found, until it is kept as the new kind. It takes `blocks_to_convert` blocks.

        Raises:
            OutOfBlocks: too few blocks are free; `table` is unchanged.
        """
        old, new, pages = table.kind, table.kind.converts_to, table.num_pages
        assert new is not None and old.blocks_per_page == 1, "only hidden pages are converted"
        shared = [i for i, first in enumerate(table.blocks[0]) if first in self._shared]
        taken = self._take(self.blocks_to_convert(table))
        sources = [*table.blocks[0]]
        for i in shared:
            others = self._by_block[sources[i]]
            others.refs -= 1
            if others.refs == 1:
                self._shared.remove(sources[i])
                self._num_shared -= old.blocks_per_page
            table.blocks[0][i] = taken.pop()
        for first in table.blocks[0]:
            page = self._by_block.pop(first, None)
            if page is not None:
                self._unlist(page)
        table.blocks += [taken[v * pages : (v + 1) * pages] for v in range(new.blocks_per_page - 1)]
        table.kind, table.num_listed = new, 0
        self._held[old.index] -= pages - len(shared)
        self._held[new.index] += new.blocks_per_page * pages
        return Projection(sources, [[*blocks] for blocks in table.blocks])

    def blocks_to_convert(self, table: BlockTable) -> int:
        """Free blocks that converting a table takes: those that its pages grow by, and a shared page's own."""
        assert table.kind.converts_to is not None
        added = table.kind.converts_to.blocks_per_page - table.kind.blocks_per_page
        return added * table.num_pages + self.shared_blocks(table)

    def release(self, table: BlockTable) -> None:
        """Give a table's blocks back and empty it; its pages in the prefix table become idle if it was the last."""
        kind, per_page, first_blocks = table.kind, table.kind.blocks_per_page, table.blocks[0]
        own, given = [], 0
        for i in range(table.num_pages - 1, -1, -1):  # a page is evicted before those that it continues
            page = self._by_block.get(first_blocks[i])
            if page is None:
                own.append(i)
                continue
            page.refs -= 1
            if page.refs == 1:
                self._shared.remove(first_blocks[i])
                self._num_shared -= per_page
            elif page.refs == 0 and page.key is None:
                del self._by_block[first_blocks[i]]
                own.append(i)
            elif page.refs == 0:
                self._idle[first_blocks[i]] = page
                self._num_idle += per_page
                given += per_page
        self._held[kind.index] -= given + len(own) * per_page
        for blocks in reversed(table.blocks):
            self._free.extend([blocks[i] for i in own])
            blocks.clear()
        table.num_pages = table.num_listed = 0

    def check(self, tables: Iterable[BlockTable]) -> None:
        """Assert that free, idle and held blocks are exactly the pool's, and that every count is right."""
        tables = list(tables)
        assert all(len(blocks) == table.num_pages for table in tables for blocks in table.blocks)
        holders: dict[tuple[int, ...], int] = {}
        kind_of: dict[tuple[int, ...], CacheKind] = {}
        for table in tables:
            for blocks in zip(*table.blocks, strict=True):
                holders[blocks] = holders.get(blocks, 0) + 1
                assert kind_of.setdefault(blocks, table.kind) is table.kind
        idle = [block for page in self._idle.values() for block in page.blocks]
        held = [block for blocks in holders for block in blocks]
        assert sorted([*self._free, *idle, *held]) == list(range(self.num_blocks)), (
            f"blocks leaked: {len(self._free)} free, {len(idle)} idle, {len(held)} held; {self.num_blocks} in the pool"
        )
        assert len(idle) == self._num_idle
        assert all(count == 1 or blocks[0] in self._by_block for blocks, count in holders.items())
        for first, page in self._by_block.items():
            assert page.blocks[0] == first and page.refs == holders.get(page.blocks, 0), (page.blocks, page.refs)
            assert (page.refs == 0) is (first in self._idle)
            assert page.refs == 0 or kind_of[page.blocks] is page.kind
        listed = [page for table in self._table for page in table.values()]
        assert {id(page) for page in listed} == {id(page) for page in self._by_block.values() if page.key is not None}
        assert all(self._table[page.kind.index].get(page.key) is page for page in listed if page.key is not None)
        assert self._shared == {page.blocks[0] for page in self._by_block.values() if page.refs > 1}
        assert self._num_shared == sum(len(page.blocks) for page in self._by_block.values() if page.refs > 1)
        by_kind = [sum(len(blocks) for blocks, its in kind_of.items() if its is kind) for kind in KINDS]
        assert by_kind == self._held, f"blocks by kind are {by_kind}, counted as {self._held}"
        if self.host is not None:
            self.host.check()

    def _take(self, count: int) -> list[int]:
        if count <= self.num_free:
            while len(self._free) < count:
                page = next(iter(self._idle.values()))
                if self.host is not None and page.key is not None:
                    self.host.save(page.key, page.kind, page.blocks)
                self._unlist(page)
                self._drop_idle(page)
        return super()._take(count)

    def _restored(self, page: HostPage) -> Page:
        """A page of the pool, of one table, that holds once the next moves are made what `page` holds."""
        assert self.host is not None
        blocks = tuple(self._take(page.kind.blocks_per_page))
        self._held[page.kind.index] += len(blocks)
        self.host.restore(page, blocks)
        return self._list(Page(page.key, page.kind, blocks, 1))

    def _fetched(self, page: HostPage) -> Page:
        """An idle page of the pool that holds what `page` holds once the next moves are made, after their iteration."""
        assert self.host is not None
        blocks = tuple(self._take(page.kind.blocks_per_page))
        self.host.restore(page, blocks, beside=True)
        found = self._idle[blocks[0]] = self._list(Page(page.key, page.kind, blocks, 0))
        self._num_idle += len(blocks)
        return found

    def _list(self, page: Page) -> Page:
        assert page.key is not None
        self._table[page.kind.index][page.key] = self._by_block[page.blocks[0]] = page
        self._found.changed(page.key)
        return page

    def _use(self, pages: Sequence[Page | HostPage]) -> None:
        """Have the idle ones of found pages evicted after all others, the end of a prompt before its beginning."""
        for page in reversed(pages):
            if isinstance(page, Page) and not page.refs:
                self._idle.move_to_end(page.blocks[0])

    def _unlist(self, page: Page) -> None:
        if page.key is not None:
            del self._table[page.kind.index][page.key]
            self._found.changed(page.key)
            page.key = None

    def _drop_idle(self, page: Page) -> None:
        del self._idle[page.blocks[0]], self._by_block[page.blocks[0]]
        self._num_idle -= len(page.blocks)
        self._free.extend(reversed(page.blocks))


def make_pool(num_blocks: int, block_size: int, *, prefix_caching: bool, host: HostTier | None = None) -> BlockPool:
    """The block pool of an engine or a simulated instance; `host` keeps what a prefix cache evicts."""
    assert prefix_caching or host is None, "host memory keeps pages of the prefix cache"
    return PrefixPool(num_blocks, block_size, host=host) if prefix_caching else BlockPool(num_blocks, block_size)
