"""An engine's figures and load, without an engine: from a scheduler state put together by hand."""

from types import SimpleNamespace

from apt_jax.engine.interface import EngineFigures
from apt_jax.routing.instance import instance_load
from apt_jax.scheduling.plan import Plan
from apt_jax.scheduling.state import SchedulerState


def figures_of(state: SchedulerState, plan: Plan | None = None, **changes) -> EngineFigures:
    """The figures that an engine with this state would report after a step with this plan."""
    figures = {
        "num_waiting": len(state.waiting), "num_running": len(state.running), "num_blocks": state.pool.num_blocks,
        "blocks": state.blocks_by_kind(), "plan": plan or Plan(), "schedule_s": 0.25, "padded_tokens": 0,
        "num_failed_steps": 0, "num_recompiles": 0, "compile_s": 0.0, "cost_model": None, "num_outside_range": 0,
    }  # fmt: skip
    return EngineFigures(**{**figures, **changes})


def engine_of(state: SchedulerState) -> SimpleNamespace:
    """What of an engine is asked before a request is queued."""
    return SimpleNamespace(num_waiting=len(state.waiting), load=lambda now: instance_load(state, None, now))
