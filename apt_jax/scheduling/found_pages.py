"""What queued requests found in the prefix cache, remembered until one of the pages it depends on comes or goes.

Every iteration adds pages to the table and evicts others. Few of them are those of a request that waits, so what it
found is forgotten by key: that of each page it found, and of the first one that it did not find. All of it is forgotten
when it leaves the queue.
"""

from collections.abc import Sequence

from apt_jax.cache import KINDS, CacheKind

MOST_READERS = 1_000_000  # pairs of a key and a request that depends on it; then everything is forgotten


class FoundPages[Found]:
    """Found pages, of whatever type, by arrival number and kind.

    Attributes:
        cold, warm: arrival numbers of those whose first page is known to be cached as no kind, or as some.
    """

    def __init__(self) -> None:
        self.cold: set[int] = set()
        self.warm: set[int] = set()
        self._pages: dict[tuple[int, int], tuple[list[Found], int]] = {}  # and how many were looked for
        self._readers: dict[bytes, set[int]] = {}  # arrival numbers by the key of a page, there or not
        self._num_readers = 0

    def get(self, order: int, kind: CacheKind, most_pages: int) -> list[Found] | None:
        """What is known of the first `most_pages` pages, perhaps of more; None if that has to be looked up."""
        known = self._pages.get((order, kind.index))
        if known is None:
            return None
        pages, looked_for = known
        return pages if most_pages <= looked_for or len(pages) < looked_for else None

    def remember(
        self, order: int, kind: CacheKind, pages: list[Found], keys: Sequence[bytes], most_pages: int
    ) -> None:  # fmt: skip
        """Of at most `most_pages` with these `keys` it found `pages`, the first ones."""
        self._read(order, keys[: min(len(pages) + 1, most_pages)])
        self._pages[order, kind.index] = pages, most_pages

    def remember_first(self, order: int, key: bytes, *, is_cached: bool) -> None:
        """Whether its first page, with this `key`, is cached as any kind."""
        self._read(order, [key])
        (self.warm if is_cached else self.cold).add(order)

    def changed(self, key: bytes) -> None:
        """A page with this `key` has come, has gone or has moved."""
        readers = self._readers.pop(key, None)
        if readers is None:
            return
        self._num_readers -= len(readers)
        for order in readers:
            self._forget(order)

    def left(self, order: int, keys: Sequence[bytes]) -> None:
        """A request, all of whose known `keys` these are, has left the queue."""
        self._forget(order)
        for key in keys:
            readers = self._readers.get(key)
            if readers is not None and order in readers:
                readers.remove(order)
                self._num_readers -= 1
                if not readers:
                    del self._readers[key]

    def _forget(self, order: int) -> None:
        self.cold.discard(order)
        self.warm.discard(order)
        for kind in KINDS:
            self._pages.pop((order, kind.index), None)

    def _read(self, order: int, keys: Sequence[bytes]) -> None:
        if self._num_readers >= MOST_READERS:
            for each in (self.cold, self.warm, self._pages, self._readers):
                each.clear()
            self._num_readers = 0
        for key in keys:
            readers = self._readers.get(key)
            if readers is None:
                readers = self._readers[key] = set()
            if order not in readers:
                readers.add(order)
                self._num_readers += 1
