"""Seconds of real iterations, which refine the cost model that start-up measured."""

from collections.abc import Sequence

from apt_jax.cache import KINDS
from apt_jax.scheduling.costs.cost_model import CostModel
from apt_jax.scheduling.costs.fit import Calibration
from apt_jax.scheduling.costs.step_load import Chunk, StepLoad, step_load
from apt_jax.scheduling.plan import Plan
from apt_jax.scheduling.state import SchedulerState, Span


class StepTimes:
    """Learns from iterations as they end, if `learns`: only some policies look at predicted times."""

    def __init__(self, base: CostModel, learns: bool):
        self.calibration = Calibration(base)
        self.learns = learns
        self._device_free_s: float | None = None  # when the last iteration ended, if that is known

    @property
    def fitted_model(self) -> CostModel | None:
        """The cost model as measured; None before that."""
        return self.calibration.model if self.calibration.is_fitted else None

    def longest_s(self, state: SchedulerState, max_model_len: int) -> float:
        """Predicted seconds of the largest iteration: a chunk of prompts at the end of the longest context, as many
        decodes as there may be, over a full cache of each kind. By the preset of the device until it was measured."""
        limits, pool = state.limits, state.pool
        tokens, seats = limits.max_num_batched_tokens, limits.max_num_seqs
        held = pool.num_blocks * pool.block_size
        cached = [min(held // kind.blocks_per_page, seats * max_model_len) for kind in KINDS]
        context_tokens = tuple(count if kind in limits.kinds else 0 for kind, count in zip(KINDS, cached, strict=True))
        prefixes: list[Chunk] = []
        for kind, count in zip(KINDS, context_tokens, strict=True):
            prompts = -(-count // max_model_len)
            prefixes += [Chunk(kind.index, -(-tokens // prompts), max_model_len)] * prompts
        decodes = tuple(seats if kind in limits.kinds else 0 for kind in KINDS)
        largest = StepLoad(tokens, tokens * max_model_len, seats, context_tokens, 0, seats, decodes, tuple(prefixes))
        return self.calibration.model.step_s(largest)

    def load(self, plan: Plan, spans: Sequence[Span], projected_tokens: int) -> StepLoad | None:
        """The load of an iteration (`step_load`) for the cost model; None if its time is not used."""
        return step_load(plan, spans, projected_tokens) if self.learns else None

    def ended(self, load: StepLoad | None, started_s: float | None, now: float, candidates: int) -> bool:
        """An iteration ended `now`. Whether the cost model has changed.

        It began when the one before had ended, or at `started_s` if the engine had nothing to do in between: what the
        host does between two iterations is part of the second one. `load` is None for one whose time says nothing about
        others; `candidates` were unfinished when it was planned.
        """
        changed = False
        if load is not None and self._device_free_s is not None:
            began_s = self._device_free_s if started_s is None else max(started_s, self._device_free_s)
            changed = self.calibration.observe(load, now - began_s, candidates)
        self._device_free_s = now
        return changed

    def forget_end(self) -> None:
        """Forget the end of the last iteration: nothing was read back, or a step failed."""
        self._device_free_s = None
