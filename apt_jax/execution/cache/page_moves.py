"""Copies between the cache pool and host memory around an iteration, and what happens when they fail."""

import logging

from apt_jax.execution.interface import StepRunner
from apt_jax.scheduling.state import SchedulerState, Span

logger = logging.getLogger(__name__)


class PageMoves:
    """Carries out what `SchedulerState.take_moves` says; who misses a copy computes its tokens instead."""

    def __init__(self, state: SchedulerState, runner: StepRunner):
        self._state, self._runner = state, runner
        self._arrives = False  # whether pages arrive beside the last iteration, for which the next one may wait

    def begin(self, spans: list[Span]) -> tuple[list[Span], bool]:
        """Copy what the plan just applied evicts to host memory, and back what it begins with; start what it fetches.

        Returns:
            The spans that can run, and whether copies make the iteration longer than its work.
        """
        state, runner, arrived = self._state, self._runner, self._arrives
        moves = state.take_moves()
        self._arrives = bool(moves.fetched)
        if not moves:
            return spans, arrived
        try:
            if moves.saved:
                runner.save(moves.saved)
        except Exception:
            logger.exception("copying cached pages to host memory failed; they are lost")
            state.forget_saved(moves)
            state.forget_fetched(moves)
            return state.forget_restored(moves, spans), True
        try:
            if moves.fetched:
                runner.fetch(moves.fetched)
        except Exception:
            logger.exception("copying cached pages from host memory ahead of need failed; they are computed again")
            state.forget_fetched(moves)
        try:
            if moves.restored:
                runner.restore(moves.restored)
        except Exception:
            logger.exception("copying cached pages from host memory failed; they are computed again")
            return state.forget_restored(moves, spans), True
        return spans, True

    def end(self) -> None:
        """The iteration has been started: what was fetched beside it goes to the pool after it.

        Raises:
            Exception: the pool may be lost.
        """
        if self._arrives:
            self._runner.land()
