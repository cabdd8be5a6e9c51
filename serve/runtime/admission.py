"""Refuses requests at once that cannot meet their SLO, instead of letting them wait in vain and delay others.

The wait for a first token is predicted as prompt tokens ahead and its own, over the rate at which prompts have lately
been prefilled while requests waited. That rate falls when seats or blocks are short, so it covers these too.
"""

import math
import time
from collections.abc import Sequence

from apt_jax.engine.interface import EngineFigures, ServingEngine
from apt_jax.scheduling.plan import Reason
from apt_jax.serve.errors import PredictedLate
from apt_jax.serve.runtime.observer import Observer, Stepped
from apt_jax.serve.runtime.samples import Sample

MEMORY_S = 10.0  # of busy time, after which a step counts 1/e
ENOUGH_S = 0.5  # of busy time before anything is predicted


class Admission(Observer):
    """Learns from the steps; `check` is called in the engine's thread."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0

    @property
    def tokens_per_s(self) -> float | None:
        """Prompt tokens prefilled per second while requests waited; None before enough was seen."""
        return self._tokens / self._seconds if self._seconds >= ENOUGH_S else None

    def stepped(self, figures: EngineFigures, step: Stepped) -> None:
        """Learn from a step in which prompts ran or waited."""
        scheduled = figures.plan.scheduled
        prefilled = sum(entry.num_tokens for entry in scheduled if entry.reason is not Reason.DECODES)
        if prefilled or figures.num_waiting:
            self.learn(prefilled, time.monotonic() - step.began_s)

    def learn(self, tokens: int, seconds: float) -> None:
        """Take in a step."""
        keep = math.exp(-seconds / MEMORY_S)
        self._tokens = keep * self._tokens + tokens
        self._seconds = keep * self._seconds + seconds

    def predicted_ttft_s(self, engine: ServingEngine, samples: Sequence[Sample]) -> float | None:
        """Seconds until all of `samples` have a first token if they are queued now; None if nothing is known yet."""
        rate = self.tokens_per_s
        if rate is None:
            return None
        ahead = engine.load(time.monotonic()).queued_tokens
        own = sum(len(sample.prompt_token_ids) for sample in samples)
        return (ahead + own) / max(rate, 1e-9)

    def check(self, engine: ServingEngine, samples: Sequence[Sample]) -> None:
        """Whether they may be queued; always, if nobody waits, so that the rate can be learned again.

        Raises:
            PredictedLate: they would miss their SLO.
        """
        slo, arrival_s = samples[0].slo, samples[0].arrival_s
        if not engine.num_waiting or slo is None:
            return
        predicted_s = self.predicted_ttft_s(engine, samples)
        if predicted_s is None:
            return
        predicted_s += 0.0 if arrival_s is None else time.monotonic() - arrival_s
        if predicted_s > slo.ttft_s:
            raise PredictedLate(
                f"the first token would take about {predicted_s:.1f} s, its SLO is {slo.ttft_s:g} s; try again "
                "later, or send a longer slo.ttft_ms",
                predicted_s - slo.ttft_s,
            )
