"""Bringing pages back from host memory beside an iteration, ahead of the one in which their request goes on.

A request that is admitted with pages in host memory holds everybody up while they are copied. So its admission is put
off while that costs the others more than it costs this one: its pages are fetched beside what runs (`plan.Fetched`),
as many in one iteration as are copied while it lasts, and the request joins when all are there. Nobody is put off for
ever: not without end, and not if nobody else would run. Source: asynchronous swap-in of FastSwitch (arXiv 2411.18424,
section 3.3); proactive swap-in of FastServe (arXiv 2305.05920, section 5.2).
"""

from collections.abc import Iterable, Sequence

from apt_jax.cache import CacheKind
from apt_jax.request import Request
from apt_jax.scheduling.plan import Fetched, Reason, Scheduled
from apt_jax.scheduling.state import MOST_FETCHED_BLOCKS, SchedulerState

MOST_PUT_OFF = 16  # iterations; then a request is admitted wherever its pages are
MOST_AHEAD = 8  # waiting requests looked at in an iteration


class SwapIn:
    """What one policy puts off. `begin` is called in every iteration, before the others.

    Args:
        fetches: False: nothing is put off and nothing fetched, so that copies come before iterations.
    """

    def __init__(self, fetches: bool = True):
        self._fetches = fetches
        self._put_off: dict[int, int] = {}  # iterations by which each was put off, by arrival number
        self._last_s: float | None = None
        self._took_s = 0.0  # the last iteration, and what came between
        self._left = 0  # blocks that may still be fetched in this one
        self._unclaimed = 0  # of them, not wanted by anybody yet
        self._joining: set[int] = set()  # arrival numbers of those that the last one put off
        self._putting_off: set[int] = set()  # and this one
        self._block_s: float | None = None

    def begin(self, state: SchedulerState, now: float) -> None:
        """An iteration is planned at `now`."""
        self._took_s, self._last_s = 0.0 if self._last_s is None else now - self._last_s, now
        self._joining, self._putting_off = self._putting_off, set()
        host = None if state.prefixes is None else state.prefixes.host
        self._left = 0
        if self._fetches and host is not None and host.num_used:
            self._block_s, self._left = host.block_s, MOST_FETCHED_BLOCKS
            if host.block_s:
                self._left = min(max(int(self._took_s / host.block_s), 2), MOST_FETCHED_BLOCKS)  # a page at least
        self._unclaimed = self._left

    def joins(self, request: Request) -> bool:
        """Whether its admission was put off in the last iteration: what others were preempted for should come about."""
        return request.order in self._joining

    def has_room_for(self, state: SchedulerState, request: Request, kind: CacheKind, others: int) -> bool:
        """Whether the link can begin with what a waiting request would be put off for; else it need not take memory."""
        away = state.blocks_away(request, kind) if self._left else 0
        if not away or not self._pays(request, away, others):
            return True
        if self._unclaimed <= 0:
            self._putting_off.add(request.order)
            return False
        self._unclaimed -= away
        return True

    def put_off(
        self, state: SchedulerState, scheduled: Sequence[Scheduled], others: int
    ) -> tuple[list[Scheduled], tuple[Fetched, ...]]:
        """Of `scheduled` what is to run now, and what to fetch for those that are put off.

        Args:
            others: requests that would be held up by copies.
        """
        if not self._left:
            return list(scheduled), ()
        kept, fetched = [], []
        for entry in scheduled:
            request, kind = entry.request, entry.kind
            away = state.blocks_away(request, kind) if request.table is None else 0
            if not away or not self._pays(request, away, others):
                self._put_off.pop(request.order, None)
                kept.append(entry)
                continue
            self._put_off[request.order] = self._put_off.get(request.order, 0) + 1
            self._putting_off.add(request.order)
            fetched.append(self._fetch(request, kind, away, Reason.FETCHED_BESIDE))
        return kept, tuple(fetched)

    def ahead(self, state: SchedulerState, waiting: Iterable[Request], room_blocks: int) -> tuple[Fetched, ...]:
        """What to fetch for those that were preempted, the next ones first, into blocks that nobody needs yet."""
        fetched: list[Fetched] = []
        for position, request in enumerate(waiting):
            if position >= MOST_AHEAD or not self._left or room_blocks <= 0:
                break
            if not request.num_preemptions:
                continue
            kind = state.kinds_to_admit(request)[0]
            room_blocks -= state.idle_blocks(request, kind)
            if (away := min(state.blocks_away(request, kind), room_blocks)) > 0:
                fetched.append(self._fetch(request, kind, away, Reason.FETCHED_AHEAD))
                room_blocks -= fetched[-1].num_blocks
        return tuple(fetched)

    def finished(self, request: Request) -> None:
        """Forget it."""
        self._put_off.pop(request.order, None)

    def _pays(self, request: Request, away: int, others: int) -> bool:
        """Whether the others would wait longer for its copies than it will for the next iteration."""
        if self._put_off.get(request.order, 0) >= MOST_PUT_OFF:
            return False
        return self._block_s is None or others * away * self._block_s > self._took_s

    def _fetch(self, request: Request, kind: CacheKind, away: int, reason: Reason) -> Fetched:
        entry = Fetched(request, kind, min(away, self._left), reason)
        self._left -= entry.num_blocks
        return entry
