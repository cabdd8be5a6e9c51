"""End to end: whole decode steps of an OPT size with random weights, against the bytes that they must read.

The engine's own batch builder, programs and sampling run iterations of requests that look as if their context had been
computed. The floor is (weights + cached vectors) over the bandwidth of a plain copy. rho is what one cached token costs
as hidden vectors, in seconds a step, beyond what it costs as KV.
"""

import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from apt_jax.cache import CacheKind
from apt_jax.checkpoints.load import load_model
from apt_jax.engine.engine import Engine
from apt_jax.engine.setup import set_up
from apt_jax.engine_config import EngineConfig
from apt_jax.execution.weights.choice import serving_layout
from apt_jax.model_config import ModelConfig, Quantization
from apt_jax.pallas_kernels.bench.timing import Times, reason, time_calls

_CALLS = 8  # steps that are started before the last is awaited


@dataclasses.dataclass(frozen=True)
class StepResult:
    """Steps of one batch, context and kind; `error` says why there is no time."""

    batch: int
    context_tokens: int
    kind: str
    floor_s: float
    error: str | None = None
    times: Times | None = None

    def line(self) -> str:
        """For the table."""
        head = f"{self.batch:>5} {self.context_tokens:>7} {self.kind:<7} {self.floor_s * 1e3:>9.2f}"
        if self.times is None:
            return f"{head} not measured: {self.error}"
        return f"{head} {self.times.median_s * 1e3:>9.2f} {self.floor_s / self.times.median_s:>7.1%}"


HEADER = f"{'batch':>5} {'context':>7} {'kind':<7} {'floor ms':>9} {'step ms':>9} {'share':>7}"


def make_engine(
    config: ModelConfig,
    *,
    dtype: str,
    batch: int,
    context_tokens: int,
    block_size: int,
    quantization: Quantization = "none",
) -> Engine:
    """An engine with random weights, in which `batch` requests of `context_tokens` fit if memory allows."""
    layout = partial(serving_layout, backend="auto", block_size=block_size)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config.to_hf()), encoding="utf-8")
        loaded = load_model(folder, load_format="dummy", dtype=dtype, layout=layout, quantization=quantization)
    engine_config = EngineConfig(
        dtype=dtype,  # type: ignore[arg-type]
        max_model_len=min(config.max_position_embeddings, context_tokens + 1),
        max_num_seqs=batch,
        block_size=block_size,
        calibrate=False,
    )
    return Engine(set_up(loaded.weights, loaded.config, engine_config))


def measure_steps(
    engine: Engine, batches: Iterable[int], contexts: Iterable[int], copy_bytes_per_s: float,
    report: Callable[[StepResult], None],
) -> list[StepResult]:  # fmt: skip
    """Time decode steps of every batch, context and kind; a failure is recorded as a result and the others continue."""
    results = []
    contexts = sorted(contexts)
    for batch in sorted(batches):
        for context in contexts:
            for kind in (CacheKind.KV, CacheKind.HIDDEN):
                base = StepResult(batch, context, kind.value, floor_s(engine, batch, context, kind, copy_bytes_per_s))
                try:
                    result = dataclasses.replace(base, times=_time_steps(engine, batch, context, kind))
                except Exception as error:  # one shape that cannot run must not take the others along
                    result = dataclasses.replace(base, error=reason(error))
                results.append(result)
                report(result)
    return results


def floor_s(engine: Engine, batch: int, context: int, kind: CacheKind, copy_bytes_per_s: float) -> float:
    """Seconds to read all weights and the cached vectors once at the speed of a copy."""
    memory = engine.setup.memory
    token_bytes = kind.blocks_per_page * memory.block_bytes / memory.block_size
    return (memory.weight_bytes + batch * context * token_bytes) / copy_bytes_per_s


def rho_s(results: Iterable[StepResult]) -> dict[str, float]:
    """Measured rho by `batch x context`, where both kinds were measured."""
    times = {(r.batch, r.context_tokens, r.kind): r.times.median_s for r in results if r.times}
    return {
        f"{batch}x{context}": (hidden - times[batch, context, "kv"]) / (batch * context)
        for (batch, context, kind), hidden in times.items()
        if kind == CacheKind.HIDDEN.value and (batch, context, "kv") in times
    }


def _time_steps(engine: Engine, batch: int, context: int, kind: CacheKind) -> Times:
    with engine.trials.prepared([(kind, context - 1, 1)] * batch) as trial:
        prepared = trial.build()

        def step() -> Any:
            results = trial.start(prepared)
            if results.running is not None:  # a turn of a loop, as beside C++ layers: only reading it waits for it
                results = engine.trials.runner.read(results)
            assert results.sampled is not None
            return results.sampled.token

        return time_calls(step, calls=_CALLS)
