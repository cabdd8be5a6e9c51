"""Synthetic iterations, to measure the device without computing the context that they attend to."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from apt_jax.batching.arrays import Batch
from apt_jax.batching.builder import BatchBuilder
from apt_jax.cache import BlockTable, CacheKind, blocks_for
from apt_jax.execution.interface import StepResults, StepRunner
from apt_jax.request import Request, SamplingParams
from apt_jax.scheduling.costs.step_load import StepLoad, step_load
from apt_jax.scheduling.plan import Plan
from apt_jax.scheduling.state import SchedulerState, Span

Shape = tuple[CacheKind, int, int]  # kind, cached tokens, new tokens of one request

_PARAMS = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)


@dataclass(frozen=True)
class Trial:
    """One synthetic iteration; every request in it samples."""

    spans: Sequence[Span]
    builder: BatchBuilder
    runner: StepRunner

    @property
    def load(self) -> StepLoad:
        """The iteration's load, for the cost model."""
        return step_load(Plan(), self.spans)

    def build(self) -> Batch:
        """The batch's arrays."""
        return self.builder.build(self.spans)

    def start(self, batch: Batch) -> StepResults:
        """Start it on the device."""
        return self.runner.dispatch(batch)

    def run(self) -> None:
        """Build, start and read back."""
        results = self.start(self.build())
        assert results.is_read
        self.runner.read(results)


@dataclass(frozen=True)
class Trials:
    """Runs synthetic iterations on an idle engine's own builder, runner and pool; they change unused blocks only."""

    state: SchedulerState
    builder: BatchBuilder
    runner: StepRunner
    max_model_len: int

    def fits(self, shapes: Sequence[Shape]) -> bool:
        """Whether an iteration of these requests keeps the engine's limits."""
        limits, tokens = self.state.limits, sum(new for _, _, new in shapes)
        return (
            self._blocks(shapes) <= self.state.pool.num_free
            and tokens <= limits.max_num_batched_tokens
            and len(shapes) <= limits.max_num_seqs
        )

    @contextmanager
    def prepared(self, shapes: Sequence[Shape]) -> Iterator[Trial]:
        """An iteration of requests set up as if their cached tokens had been computed; they hold blocks meanwhile.

        Raises:
            RuntimeError: the engine is not idle.
            ValueError: the requests do not fit.
        """
        if self.state.num_unfinished:
            raise RuntimeError("measure an engine before it serves: it has unfinished requests")
        pool, needed = self.state.pool, self._blocks(shapes)
        if needed > pool.num_free:
            raise ValueError(f"{needed=} cache blocks > {pool.num_free=}")
        for _, cached, new in shapes:
            if cached + new > self.max_model_len:
                raise ValueError(f"context={cached + new} > {self.max_model_len=}")
        spans = []
        try:
            for kind, cached, new in shapes:
                request = Request("trial", [0] * (cached + new), _PARAMS, 0.0, 1)
                request.table = BlockTable(kind)
                spans.append(Span(request, cached, new, samples=True))
                pool.grow(request.table, cached + new)
            yield Trial(spans, self.builder, self.runner)
        finally:
            for span in spans:
                assert span.request.table is not None
                pool.release(span.request.table)
                span.request.table = None

    def rehearse(self) -> None:
        """Run a whole prompt and a decode step of each kind, so that what the backend sets up once is set up now.

        The first request would do it too late: if no file can be opened then, XLA fails on every later step.
        """
        for kind in self.state.limits.kinds:
            for shapes in ([(kind, 0, 2)], [(kind, 1, 1)]):  # one token alone would be a decode step
                if self.fits(shapes) and sum(shapes[0][1:]) <= self.max_model_len:
                    with self.prepared(shapes) as trial:
                        trial.run()

    def _blocks(self, shapes: Sequence[Shape]) -> int:
        return sum(blocks_for(cached + new, kind, self.state.pool.block_size) for kind, cached, new in shapes)
