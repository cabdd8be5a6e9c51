"""The scheduler's state with counters in arrays: what one iteration does to all that decode is a few numpy calls.

Queues, blocks, admissions and preemptions are the engine's own (`SchedulerState`); only "one more token" is done for
all at once. `tests/unit/test_simulated_state.py` compares both, request by request.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np

from apt_jax.cache import KINDS, BlockPool
from apt_jax.request import FinishReason, Request
from apt_jax.scheduling.costs.step_load import StepLoad, step_load
from apt_jax.scheduling.plan import Plan
from apt_jax.scheduling.progress import Ints, Progress
from apt_jax.scheduling.state import Limits, SchedulerState, Span, Written
from apt_jax.simulation.requests.columns import Columns, SimulatedRequest

_OTHERS = (0,) * (len(KINDS) - 1)  # kinds but the first


class Ahead(NamedTuple):
    """Iterations from now in which all running requests decode, until the first of them ends.

    Attributes:
        most: iterations, the last of which is the one that ends it.
        load: of the first; each further one reads one more token for each request.
        grown: `[kinds][most]` blocks of each kind that they take more, those of earlier iterations included.
        blocks: `[most]` the same of all kinds together.
    """

    most: int
    load: StepLoad
    grown: list[list[int]]
    blocks: list[int]


class SimulatedState(SchedulerState):
    """Queues and blocks of one simulated instance. `advance` starts an iteration, `complete` ends it."""

    def __init__(self, pool: BlockPool, limits: Limits):
        super().__init__(pool, limits)
        self.columns = Columns()
        self._plan = Plan()  # under way
        self._sampling = np.zeros(0, np.int64)  # arrival numbers that sample in it
        self._written: list[Written] = []  # pages that it fills, for the prefix cache
        self._orders: Ints | None = None  # of `running`; None: to be collected
        self._progress: Progress | None = None  # the same

    def submit(self, request: SimulatedRequest, output_tokens: int) -> None:
        """Add a request, which ends after `output_tokens`."""
        self.add(request)
        self.columns.add(request, output_tokens)

    def running_progress(self) -> Progress:
        """Columns of the running requests, in their order."""
        if self._progress is None:
            self._progress = self.columns.progress(self._running_orders())
        return self._progress

    def advance(self, plan: Plan, now: float) -> StepLoad:
        """Carry out a plan as `apply` does; what its iteration computes and reads."""
        self._progress = None
        self._written.clear()
        if plan.preempted:
            self._orders = None
        newcomers = [] if self.prefixes is None else [e.request for e in plan.scheduled if e.request.table is None]
        self._clear(plan, now)
        uncached: set[Request] = set()  # admitted, of whom everything is to be computed
        for request in newcomers:  # admitted before anything else; one token may be all that is not cached
            self._orders = None
            self._note_table(request)
            if not request.num_computed_tokens:
                uncached.add(request)
        if plan is self._plan and self._orders is not None and len(plan.scheduled) == len(self._orders):
            decoded, self._sampling = self._decode_all(self._orders)  # once more
            self._fetch(plan.fetched)
            return decoded
        for converted in plan.converted:
            self._note_table(converted.request)
        self._plan = plan
        decoders: list[SimulatedRequest] = []
        spans: list[Span] = []
        for entry in plan.scheduled:
            request = cast(SimulatedRequest, entry[0])
            if entry[1] == 1 and request.table is not None and request not in uncached:
                decoders.append(request)
                continue
            if request.table is None:
                self._orders = None
            spans.append(self._start(entry, now))
            self._note_table(request)
        self._written += self.written(spans)
        decoded, decoding = self._decode(decoders)
        chunks = [span.request.order for span in spans if span.samples]
        self._sampling = np.concatenate([decoding, np.array(chunks, np.int64)]) if chunks else decoding
        self._fetch(plan.fetched)
        load = StepLoad()
        if spans or plan.converted or self.num_projected_tokens:
            load = step_load(plan, spans, self.num_projected_tokens)
        return load + decoded

    def complete(self, now: float) -> list[SimulatedRequest]:
        """Commit the iteration's tokens at `now`; the requests that finished, in the order of its plan."""
        self._progress = None
        self.keep(self._written)
        orders = self._sampling
        if not len(orders):
            return []
        last = self.columns.commit(orders, now)
        if not last.any():
            return []
        ended = set(orders[last].tolist())
        requests = (cast(SimulatedRequest, entry.request) for entry in self._plan.scheduled)
        finished = [request for request in requests if request.order in ended]
        for request in finished:
            self.finish(request, FinishReason.STOP)
        return finished

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a request, as the engine does."""
        self._orders = self._progress = None
        super().finish(request, reason)

    def ahead(self) -> "Ahead":
        """What would happen if all running requests, each of which has only its newest token to compute, went on."""
        orders, columns = self._running_orders(), self.columns
        known = columns.prompt[orders] + columns.generated[orders]
        most = int((columns.target[orders] - columns.generated[orders]).min())
        overflow = columns.pages[orders] * self.pool.block_size - known + 1  # iteration that needs a page, from now
        kinds = columns.kind[orders]
        grown, contexts, decodes = [], [], []
        for kind in KINDS:
            mine = kinds == kind.index
            pages, at = np.zeros(most, np.int64), overflow[mine]
            while len(at := at[at < most]):
                pages += np.bincount(at, minlength=most)
                at = at + self.pool.block_size
            grown.append(pages.cumsum() * kind.blocks_per_page)
            contexts.append(int(known[mine].sum()))
            decodes.append(int(np.count_nonzero(mine)))
        load = StepLoad(
            decode_requests=len(orders), context_tokens=tuple(contexts), samples=len(orders), decodes=tuple(decodes)
        )
        return Ahead(most, load, [column.tolist() for column in grown], np.sum(grown, axis=0).tolist())

    def repeat(self, plan: Plan, starts_s: Sequence[float], ends_s: Sequence[float]) -> None:
        """Carry out and complete `plan`, under which all running requests decode, several times; nobody ends."""
        self._progress = None
        orders, columns = self._running_orders(), self.columns
        for start_s in starts_s:
            self.plans.record(plan, start_s)
        columns.commit_often(orders, starts_s, ends_s)
        known = columns.prompt[orders] + columns.generated[orders] - 1  # of the last iteration
        self._grow(orders, known)
        self.keep(self._filled(orders, columns.computed[orders], known))
        columns.computed[orders] = known

    def _running_orders(self) -> Ints:
        if self._orders is None:
            self._orders = np.array([r.order for r in self.running], np.int64)
        return self._orders

    def _grow(self, orders: Ints, known: Ints) -> None:
        """Give each of `orders` the blocks for `known` tokens."""
        columns = self.columns
        full = known > columns.pages[orders] * self.pool.block_size
        if full.any():
            for order, tokens in zip(orders[full].tolist(), known[full].tolist(), strict=True):
                table = columns.requests[order].table
                assert table is not None
                self.pool.grow(table, tokens)
                columns.pages[order] = table.num_pages

    def _decode(self, requests: list[SimulatedRequest]) -> tuple[StepLoad, Ints]:
        """Compute one token of each of `requests`, which run; the load of that, and who samples."""
        orders = self._orders
        if orders is None or len(requests) != len(orders):
            orders = np.array([r.order for r in requests], np.int64)
        return self._decode_all(orders)

    def _decode_all(self, orders: Ints) -> tuple[StepLoad, Ints]:
        columns = self.columns
        known = columns.prompt[orders] + columns.generated[orders]
        end = columns.computed[orders] + 1
        self._grow(orders, known)
        columns.computed[orders] = end
        self._written += self._filled(orders, end - 1, end)
        is_last = end >= known
        assert (end <= known).all()
        samples = orders if is_last.all() else orders[is_last]
        assert (columns.generated[samples] < columns.max_new[samples]).all(), "a request has all its tokens"
        columns.generated[samples] += 1
        columns.inflight[samples] = 1
        kinds, total = columns.kind[orders], int(end.sum())
        if not kinds.any():
            context_tokens, decodes = (total, *_OTHERS), (len(orders), *_OTHERS)
        else:
            masks = [kinds == kind.index for kind in KINDS]
            context_tokens = tuple(int(end[mask].sum()) for mask in masks)
            decodes = tuple(int(np.count_nonzero(mask)) for mask in masks)
        load = StepLoad(
            decode_requests=len(orders), context_tokens=context_tokens, samples=len(samples), decodes=decodes
        )
        return load, samples

    def _filled(self, orders: Ints, before: Ints, end: Ints) -> list[Written]:
        """Pages that each of `orders` has filled once its `end` tokens are computed, of those it had not before."""
        if self.prefixes is None:
            return []
        full = end // self.pool.block_size > before // self.pool.block_size
        found = []
        for order, pages in zip(orders[full].tolist(), (end[full] // self.pool.block_size).tolist(), strict=True):
            request = self.columns.requests[order]
            assert request.table is not None
            if self._may_keep(request):
                found.append(Written(request, request.table, pages))
        return found

    def _note_table(self, request: Request) -> None:
        table = request.table
        assert table is not None
        self.columns.pages[request.order] = table.num_pages
        self.columns.kind[request.order] = table.kind.index
