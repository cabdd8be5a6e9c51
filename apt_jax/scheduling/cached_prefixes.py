"""What waiting requests would take from the prefix cache, and what they take when they are admitted.

A request begins with the cached pages of its kind. One that is to have KV can go on with cached hidden pages: they are
projected into new blocks, and stay as they are for others. The base of `SchedulerState`.
"""

from collections.abc import Sequence
from itertools import takewhile
from typing import cast

from apt_jax.cache import KINDS, BlockPool, BlockTable, CacheKind, Projection
from apt_jax.request import Request
from apt_jax.scheduling.host_tier import HostPage
from apt_jax.scheduling.prefix_pool import Page, PrefixPool

PROJECTED_FROM = {kind.converts_to: kind for kind in KINDS if kind.converts_to is not None}


class CachedPrefixes:
    """The pool's prefix cache, if it has one, as requests see it.

    Attributes:
        prefix_queries, prefix_hits: tokens looked up and found at first admissions.
        least_projected_tokens: fewest cached hidden tokens that are projected for a KV request; None: never.
        projections: of the plan applied last, in the order in which the device does them.
        num_projected_tokens: in it, of requests that were admitted.
    """

    def __init__(self, pool: BlockPool):
        self.pool = pool
        self.prefixes = pool if isinstance(pool, PrefixPool) else None
        self.prefix_queries = self.prefix_hits = 0
        self.least_projected_tokens: int | None = None
        self.projections: list[Projection] = []
        self.num_projected_tokens = 0

    def cached_tokens(self, request: Request, kind: CacheKind) -> int:
        """Tokens of a waiting request that it would not compute if it were admitted as `kind`, projected ones too."""
        if self.prefixes is None or self.prefixes.is_cold(request):
            return 0
        pages = len(self._cached_pages(request, kind)) + len(self._pages_to_project(request, kind))
        return pages * self.pool.block_size

    def projected_tokens(self, request: Request, kind: CacheKind) -> int:
        """Of `cached_tokens` those that are cached as another kind, from which they are projected into new blocks."""
        if self.prefixes is None or self.prefixes.is_cold(request):
            return 0
        return len(self._pages_to_project(request, kind)) * self.pool.block_size

    def held_pages(self, request: Request, kind: CacheKind) -> int:
        """Pages of a waiting request that running ones hold already as `kind`."""
        if self.prefixes is None or self.prefixes.is_cold(request):
            return 0
        return sum(page.refs > 0 for page in self._cached_pages(request, kind))

    def blocks_away(self, request: Request, kind: CacheKind) -> int:
        """Blocks in host memory with which a waiting request begins if it is admitted as `kind`."""
        if self.prefixes is None or self.prefixes.host is None or self.prefixes.is_cold(request):
            return 0
        pages = self._cached_pages(request, kind)
        return sum(isinstance(page, HostPage) for page in pages) * kind.blocks_per_page

    def idle_blocks(self, request: Request, kind: CacheKind) -> int:
        """Blocks on the device, held by nobody, with which a waiting request begins if it is admitted as `kind`."""
        if self.prefixes is None or self.prefixes.is_cold(request):
            return 0
        return self.prefixes.idle_blocks(self._cached_pages(request, kind))

    def _cached_pages(self, request: Request, kind: CacheKind) -> Sequence[Page | HostPage]:
        """The first pages of a waiting request that are cached as `kind`; at least one token is left to compute."""
        if self.prefixes is None or request.params.needs_whole_prompt:
            return ()
        return self.prefixes.find(request, kind, (request.num_tokens - 1) // self.pool.block_size)

    def _pages_to_project(self, request: Request, kind: CacheKind) -> Sequence[Page]:
        """The pages after those cached as `kind` that are cached as one from which it can be projected, if it pays."""
        source = PROJECTED_FROM.get(kind)
        if self.least_projected_tokens is None or source is None:
            return ()
        pages = self._cached_pages(request, source)
        if not pages:
            return ()
        after = pages[len(self._cached_pages(request, kind)) :]
        on_device = [*takewhile(lambda page: isinstance(page, Page), after)]
        return cast(
            list[Page], on_device if len(on_device) * self.pool.block_size >= self.least_projected_tokens else []
        )

    def _hold_pages_to_project(
        self, newcomers: Sequence[Request], kinds: Sequence[CacheKind]
    ) -> list[tuple[int, BlockTable | None]]:
        """For each newcomer, whether hidden pages are projected for it: from which page on, and a table with them.

        Held, they are not evicted for blocks that others of the plan take. Idle ones that are held are not free
        meanwhile, so as many blocks are left as newcomers take for pages of theirs that are cached.
        """
        assert self.prefixes is not None
        if self.least_projected_tokens is None:
            return [(0, None)] * len(newcomers)
        own = [self._cached_pages(request, kind) for request, kind in zip(newcomers, kinds, strict=True)]
        idle = sum(
            kind.blocks_per_page * sum(page.refs == 0 for page in pages) for kind, pages in zip(kinds, own, strict=True)
        )
        held: list[tuple[int, BlockTable | None]] = []
        for request, kind, pages in zip(newcomers, kinds, own, strict=True):
            table = None
            if wanted := self._pages_to_project(request, kind)[: max(self.pool.num_free - idle, 0)]:
                table = BlockTable(wanted[0].kind)
                self.prefixes.share(table, wanted)
            held.append((len(pages), table))
        return held

    def _project(self, newcomers: Sequence[Request], found: Sequence[tuple[int, BlockTable | None]]) -> None:
        """Give newcomers blocks of their own for the pages held for them, as far as there are any.

        The device reads all of these pages before anything else of the iteration is written, so they need be held only
        until every newcomer has its blocks.
        """
        assert self.prefixes is not None
        size = self.pool.block_size
        for request, (first, source) in zip(newcomers, found, strict=True):
            table = request.table
            assert table is not None
            if source is not None and table.num_pages == first:  # else what comes before was evicted meanwhile
                count = min(source.num_pages, self.pool.num_free // table.kind.blocks_per_page)
                self.pool.grow(table, (first + count) * size)
                if count:
                    targets = [blocks[first:] for blocks in table.blocks]
                    self.projections.append(Projection(source.blocks[0][:count], targets))
                self.num_projected_tokens += count * size
                request.num_computed_tokens += count * size
            if request.num_cached_tokens is None:
                request.num_cached_tokens = cached = request.num_computed_tokens
                if not request.params.needs_whole_prompt:
                    self.prefix_queries += request.num_tokens
                    self.prefix_hits += cached

    def _let_go(self, held: Sequence[tuple[int, BlockTable | None]]) -> None:
        """Hold pages for nobody's projection any more."""
        assert self.prefixes is not None
        for _, source in reversed(held):
            if source is not None:
                self.prefixes.release(source)

    def _may_keep(self, request: Request) -> bool:
        """Whether others may use what a request has computed: not where converted pages are not those of a prompt."""
        return self.least_projected_tokens is not None or not request.num_conversions

    def _begin_with_cached(self, request: Request) -> None:
        """Begin the empty table of a request that is admitted with what is cached of its kind."""
        table = request.table
        assert self.prefixes is not None and table is not None
        pages = self._cached_pages(request, table.kind)
        self.prefixes.share(table, pages)
        request.num_computed_tokens = len(pages) * self.pool.block_size
