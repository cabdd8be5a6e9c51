"""Whole decode steps of the engine against the bytes that they must read, by both kinds: shares, and rho."""

import time
from dataclasses import asdict
from typing import Any

from apt_jax.engine.engine import Engine
from apt_jax.model_config import Quantization
from apt_jax.pallas_kernels.bench.decode_steps import StepResult, measure_steps, rho_s
from experiments.device_check import model
from experiments.device_check.attention import NotMeasured, copy
from experiments.device_check.session import Session

_WEIGHTS_S = 15.0  # to make all layers' weights, and to measure; an estimate
_OF_COMPILING = (
    0.7  # of what all layers would take by the few: hopeful, since too late a start costs the int8 steps only
)


def run(session: Session) -> None:
    """A few layers, then all if compiling them fits into what is left, then int8 weights for the few.

    Decode steps are compiled layer by layer on a GPU; what else an engine compiles does not grow with the layers.
    """
    speed = copy(session)
    if speed is None:
        return
    few, every = session.sizes.layers
    found = _measure_model(session, few, "none", speed)
    ready_s, first_step_s = (found or {}).get("ready_s", 0.0), (found or {}).get("first_step_s", 0.0)
    hurries = session.sizes.patience == 1
    needs_s = _WEIGHTS_S + ready_s + _OF_COMPILING * first_step_s * every / few if hurries else 0.0
    _measure_model(session, every, "none", speed, needs_s)
    _measure_model(session, few, "int8", speed, ready_s + first_step_s if hurries else 0.0)


def engine_name(session: Session, layers: int, quantization: Quantization = "none") -> str:
    """Of the measurement in which an engine starts."""
    weights = session.sizes.options.dtype if quantization == "none" else quantization
    return f"engine {session.sizes.model} {weights} {layers} layers"


def _measure_model(
    session: Session, layers: int, quantization: Quantization, speed: float, needs_s: float = 0.0
) -> dict[str, Any] | None:  # fmt: skip
    """An engine, then its steps, each batch and context recorded when it is measured; what its start took."""
    engines: list[Engine] = []
    name = engine_name(session, layers, quantization)

    def start() -> dict[str, Any]:
        """With a step of each kind, which compiles it."""
        loaded = model.load(session, layers, quantization)
        began = time.monotonic()
        engine = Engine(model.parts(session, loaded, "hybrid", "fcfs"))
        ready_s = time.monotonic() - began
        batch, context = session.sizes.steps[0]
        measure_steps(engine, [batch], [context], speed, lambda result: None)
        engines.append(engine)
        memory = engine.setup.memory
        return {
            "load_s": round(loaded.load_seconds, 1), "ready_s": round(ready_s, 1),
            "first_step_s": round(time.monotonic() - began - ready_s, 1),
            "attention": engine.setup.attention, "weight_bytes": memory.weight_bytes, "num_blocks": memory.num_blocks,
        }  # fmt: skip

    # what is slow here is compiling, so only the stage's own end is a limit
    found = session.check(name, start, limit_s=session.left_s, needs_s=needs_s)
    for batch, context in session.sizes.steps if engines else ():
        session.check(
            f"{name.removeprefix('engine ')} {batch}x{context}",
            lambda b=batch, c=context: _steps(engines[0], b, c, speed),  # type: ignore[misc]
        )
    return found


def _steps(engine: Engine, batch: int, context: int, speed: float) -> dict[str, Any]:
    """Both kinds: the second is no more to compile."""
    results = measure_steps(engine, [batch], [context], speed, lambda result: print(result.line(), flush=True))
    if all(result.times is None for result in results):
        raise NotMeasured("; ".join(str(result.error) for result in results))
    return {
        "steps": [_figures(result) for result in results],
        "rho_s": next(iter(rho_s(results).values()), None),
    }


def _figures(result: StepResult) -> dict[str, Any]:
    share = None if result.times is None else result.floor_s / result.times.median_s
    return {**asdict(result), "floor_share": share}
