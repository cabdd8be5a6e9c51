"""State of an engine: from start to stop, and whether its steps work.

The watchdog watches the work of an engine's thread from outside: failed steps in a row, a step that does not return.
It reports and ends nothing; whoever starts processes decides. Loading and warming up are not watched, so compiling
before the server is ready never counts. A program that compiles later, which should not happen and is counted, has the
time of a step.
"""

import enum
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from apt_jax.output import Output
from apt_jax.request import FinishReason

FEWEST_STEP_S = 60.0  # what a step gets at least, unless the option says otherwise
TIMES_PREDICTED = 20.0  # so much longer than the largest step is predicted to take
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.01, 1.0  # after a failed step; doubled with each in a row

logger = logging.getLogger("apt_jax.serve")


class EngineStatus(enum.Enum):
    """The value is what /health reports."""

    LOADING = "loading"
    WARMING = "warming up"
    READY = "ready"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True)
class WatchLimits:
    """When an engine counts as unhealthy. `max_step_s` None: from the cost model, see `Watchdog.max_step_s`."""

    max_failed_steps: int = 10
    max_step_s: float | None = None


class Watchdog:
    """Told by the engine's thread what it does; asked by others, at any time and from any thread.

    Args:
        limits: when the engine is unhealthy; may be replaced.
        clock: seconds; replaced in tests.
    """

    def __init__(self, limits: WatchLimits | None = None, clock: Callable[[], float] = time.monotonic):
        self.limits = limits or WatchLimits()
        self.clock = clock
        self.num_failed = 0  # steps in a row
        self._longest_step_s: Callable[[], float] = lambda: 0.0
        self._since_s: float | None = None  # when the work under way began
        self._reported: str | None = None  # the trouble in the log

    def watch(self, longest_step_s: Callable[[], float]) -> None:
        """Begin; the function predicts the seconds of the engine's largest step."""
        self._longest_step_s = longest_step_s

    @property
    def max_step_s(self) -> float:
        """Seconds that a step may take: as given, else 20 times the prediction for the largest, at least a minute."""
        if self.limits.max_step_s is not None:
            return self.limits.max_step_s
        return max(FEWEST_STEP_S, TIMES_PREDICTED * self._longest_step_s())

    @property
    def is_exhausted(self) -> bool:
        """Whether as many steps in a row have failed as may."""
        return self.num_failed >= self.limits.max_failed_steps

    @property
    def pause_s(self) -> float:
        """Seconds to wait before the next step; 0 unless the last one failed."""
        if not self.num_failed:
            return 0.0
        return float(min(FIRST_PAUSE_S * 2.0 ** min(self.num_failed - 1, 20), LONGEST_PAUSE_S))

    @contextmanager
    def working(self) -> Iterator[None]:
        """While the thread is at work; it is stuck if this takes too long."""
        self._since_s = self.clock()
        try:
            yield
        finally:
            self._since_s = None

    def judge(self, outputs: Sequence[Output], failed: bool) -> None:
        """A step has ended: it `failed`, or brought these outputs.

        Errors and no token are a failure too, a token is a success. Anything else says nothing: with a step in
        flight, whether it failed is known only when it is read.
        """
        has_tokens = any(output.token_ids for output in outputs)
        own = [output for output in outputs if not output.is_contradictory]  # errors of the engine, not of a client
        if failed or (not has_tokens and any(output.finish_reason is FinishReason.ERROR for output in own)):
            self.num_failed += 1
        elif has_tokens:
            self.num_failed = 0

    @property
    def stuck(self) -> str | None:
        """Why the work under way counts as stuck; None if it does not."""
        since_s = self._since_s
        if since_s is None:
            return None
        seconds = self.clock() - since_s
        if seconds <= min(FEWEST_STEP_S, self.limits.max_step_s or FEWEST_STEP_S):  # the prediction need not be asked
            return None
        limit_s = self.max_step_s
        if seconds <= limit_s:
            return None
        return f"a step has not returned for {seconds:.0f} s, the limit is {limit_s:.0f} s (--max-step-seconds)"

    @property
    def trouble(self) -> str | None:
        """Why the engine is unhealthy now; None if it is not. It may become healthy again."""
        if (stuck := self.stuck) is not None:
            return stuck
        if self.is_exhausted:
            return (
                f"the last {self.num_failed} steps failed, the limit is {self.limits.max_failed_steps} "
                "(--max-failed-steps); the log has the errors"
            )
        return None

    def report(self) -> None:
        """Log when the engine has become unhealthy, and when it is healthy again."""
        trouble = self.trouble
        if trouble is not None and self._reported is None:
            logger.error("the engine is unhealthy, /health answers 503: %s", trouble)
        elif trouble is None and self._reported is not None:
            logger.warning("the engine is healthy again, /health answers 200")
        self._reported = trouble
