"""Measure the running engine for the cost model: seconds at start-up, then refined from real iterations.

The device runs made-up iterations of a few batch sizes and context lengths, as KV and as hidden, straight through the
batch builder and the runner, so no prompt has to be computed to measure a long context. A fit explains the times
(`apt_jax/scheduling/costs/fit.py`). Observations are stored by device, model shape, number type, attention backend and
version of the code: the next start needs no measuring.
"""

import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import jax

from apt_jax.engine.trials import Shape, Trials
from apt_jax.execution.program_store import source_hash
from apt_jax.execution.runner import Runner
from apt_jax.scheduling.costs.cost_model import CostModel
from apt_jax.scheduling.costs.fit import MIN_OBSERVATIONS, Calibration, Observation
from apt_jax.scheduling.costs.hardware import GIB, HARDWARE, Hardware
from apt_jax.scheduling.costs.step_load import PaddedSizes

logger = logging.getLogger(__name__)

# A starting point where nothing is known; the fit scales it to the truth.
GENERIC = Hardware("generic", 16 * GIB, 200e9, 20e9, 10e9, "none: scaled by the calibration")
# parts of jax's device_kind; the first that matches counts
_DEVICE_NAMES = {
    "a100-sxm4-40gb": "a100-40gb", "a100-sxm4-80gb": "a100-80gb", "h100": "h100-80gb", "h200": "h200",
    "tpu v5 lite": "tpu-v5e", "tpu v5e": "tpu-v5e", "tpu v5": "tpu-v5p", "tpu v6": "tpu-v6e", "tpu7x": "tpu7x",
}  # fmt: skip
REPEATS = 3
MAX_SECONDS = 10.0
_BATCHES = (1, 4, 16, 64, 256)
_CONTEXTS = (31, 250, 1000)
_PROMPTS = (16, 64, 256, 1024)
_CHUNKS = (16, 64, 512)


def base_model(runner: Runner) -> CostModel:
    """The cost model of the runner's device before any measurement, with the runner's padded sizes."""
    kind = runner.device.device_kind.lower()
    name = next((preset for part, preset in _DEVICE_NAMES.items() if part in kind), None)
    buckets, pads = runner.buckets, runner.pads
    sizes = PaddedSizes(
        tuple(bucket.tokens for bucket in buckets.decode) if pads else (),
        tuple(bucket.tokens for bucket in buckets.prefill) if pads else (),
        tuple(buckets.sample_rows),
    )
    hardware = HARDWARE[name] if name else GENERIC
    return CostModel(
        runner.model_config, hardware, devices=runner.num_devices, quantization=runner.weights.quantization,
        cache_dtype=runner.shapes.cache_dtype, sizes=sizes,
    )  # fmt: skip


def calibration_path(runner: Runner, model: CostModel) -> Path | None:
    """The file for this device, model, number type, backend and code, in the folder of compiled programs, if any."""
    folder = jax.config.jax_compilation_cache_dir
    if not folder:
        return None
    facts = [
        asdict(runner.model_config), str(runner.dtype), runner.weights.quantization, asdict(model.sizes),
        runner.shapes.block_size, runner.shapes.cache_dtype, runner.attention, runner.num_devices, source_hash(),
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    device = runner.device.device_kind.lower().replace(" ", "-").replace("/", "-")
    return Path(folder) / "calibration" / f"{device}-{digest}.json"


def calibrate(
    trials: Trials, model: CostModel, path: Path | None, *, max_seconds: float = MAX_SECONDS
) -> Calibration:  # fmt: skip
    """The calibration stored in `path`, or a new one of `model`: measured, fitted and stored there.

    The shapes of the engine must be compiled (`warm_up`). Measuring ends after `max_seconds`.

    Raises:
        RuntimeError: the engine is not idle.
    """
    if path is not None and (stored := Calibration.load(path, model)) is not None:
        return stored
    started = time.perf_counter()
    observations = measure(trials, max_seconds=max_seconds)
    if len(observations) < MIN_OBSERVATIONS:
        return Calibration(model)
    calibration = Calibration(model, observations)
    logger.info(
        "cost model: %d iterations measured in %.1f s, median error %.0f%%, hidden attention %+.2f us per token "
        "against KV", len(observations), time.perf_counter() - started, 100 * calibration.median_error(),
        1e6 * calibration.model.rho_s,
    )  # fmt: skip
    if path is not None:
        try:
            calibration.save(path)
        except OSError as error:
            logger.warning("cannot keep the cost model at %s (%s); the next start measures again", path, error)
    return calibration


def measure(trials: Trials, *, max_seconds: float = MAX_SECONDS) -> list[Observation]:
    """Time made-up iterations, the fastest of `REPEATS` runs each, cheap ones first, until time is up."""
    deadline = time.perf_counter() + max_seconds
    found: list[Observation] = []
    for shapes in _iterations(trials):
        with trials.prepared(shapes) as trial:
            best = math.inf
            for _ in range(REPEATS):
                started = time.perf_counter()
                trial.run()
                best = min(best, time.perf_counter() - started)
                if time.perf_counter() > deadline:
                    break
            found.append(Observation(trial.load, best))
        if time.perf_counter() > deadline:
            break
    return found


def _iterations(trials: Trials) -> Iterator[list[Shape]]:
    """Decodes over a grid of batch and context, of one kind and of all; prompts, later chunks, decodes with a prompt.

    A batch over a short and a long context tells what a request costs from what its tokens cost; a batch of all kinds
    against one of each, what they cost beside each other.
    """
    limits = trials.state.limits
    longest = trials.max_model_len - 1
    candidates: list[list[Shape]] = []
    for kind in limits.kinds:
        contexts = sorted({min(context, longest) for context in _CONTEXTS})
        batches = sorted({min(batch, limits.max_num_seqs) for batch in _BATCHES})
        prompts = sorted({min(prompt, longest, limits.max_num_batched_tokens) for prompt in _PROMPTS})
        candidates += [[(kind, context, 1)] * batch for context in contexts for batch in batches]
        candidates += [[(kind, 0, prompt)] for prompt in prompts]
        candidates += [[(kind, 0, prompt // 4)] * 4 for prompt in prompts if prompt >= 64]
        candidates += [
            [(kind, context, min(chunk, longest - context, limits.max_num_batched_tokens))]
            for context in contexts for chunk in _CHUNKS if context < longest
        ]  # fmt: skip
        candidates += [[*[(kind, 200, 1)] * batch, (kind, 0, 64)] for batch in (4, 16) if longest > 200]
    if len(limits.kinds) > 1:
        candidates += [
            [(kind, min(context, longest), 1) for kind in limits.kinds] * batch
            for context in _CONTEXTS for batch in (1, 8, 32)
        ]  # fmt: skip
    yield from sorted(filter(trials.fits, candidates), key=lambda shapes: sum(n * (40 + c) for _, c, n in shapes))
