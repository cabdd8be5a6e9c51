"""The parts of an engine, made before it: complete options, programs, cache pool, queues."""

import logging
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from apt_jax.attention.kinds import KindMix
from apt_jax.batching.buckets import Buckets
from apt_jax.batching.builder import BatchBuilder, table_pages
from apt_jax.cache import Vector, as_cache_dtype
from apt_jax.engine.calibration import base_model, calibration_path
from apt_jax.engine.memory import MemoryBudget, host_tier, share_memory
from apt_jax.engine_config import EngineConfig
from apt_jax.execution.arguments import Shapes, pages_multiple
from apt_jax.execution.cache.ranges import cache_channels
from apt_jax.execution.interface import StepRunner
from apt_jax.execution.platform import Platform
from apt_jax.execution.runner import Runner
from apt_jax.execution.weights.layout import Weights
from apt_jax.model_config import ModelConfig
from apt_jax.scheduling.costs.cost_model import CostModel
from apt_jax.scheduling.prefix_pool import make_pool
from apt_jax.scheduling.state import Limits, SchedulerState
from apt_jax.tokenization.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

WATERMARK = 0.01  # share of the pool kept free on admission, as vLLM


@dataclass(frozen=True)
class EngineSetup:
    """The parts of one engine.

    Attributes:
        config: every default that depends on model and device is filled in.
        runner: with its cache pool in place; nothing else is compiled.
        cost_model: of the device, before any measurement.
        calibration_file: where this device's measured times are kept; None: nowhere.
        attention: which implementation of attention runs: the kernels' name, or xla.
        dtype: number type of the weights that are not quantised.
    """

    model_config: ModelConfig
    config: EngineConfig
    runner: StepRunner
    builder: BatchBuilder
    state: SchedulerState
    memory: MemoryBudget
    cost_model: CostModel
    calibration_file: Path | None
    attention: str
    dtype: np.dtype

    @cached_property
    def cache_config(self) -> dict[str, str]:
        """How the cache is set up, in vLLM's names."""
        config = self.config
        return {
            "block_size": str(config.block_size),
            "cache_dtype": config.dtype if config.cache_dtype == "auto" else config.cache_dtype,
            "cache_mode": config.cache_mode,
            "enable_prefix_caching": str(config.enable_prefix_caching),
            "num_gpu_blocks": str(self.state.pool.num_blocks),
        }


def set_up(
    weights: Weights,
    model_config: ModelConfig,
    config: EngineConfig,
    tokenizer: Tokenizer | None = None,
    fingerprint: str = "",
    buckets: Buckets | None = None,
    channels: np.ndarray | None = None,
) -> EngineSetup:
    """Make the parts of an engine. Of several processes that run one, all call it at the same time.

    Args:
        weights: on the devices, laid out for the attention backend and block size of `config`
            (`execution/weights/choice.py`).
        buckets: the padded shapes, for the limits of `config`; None: all, of which few requests are padded much.
        tokenizer, fingerprint: the model's, for the calibration of an int8 cache (`execution/cache/ranges.py`).
        channels: what that calibration found earlier.

    Raises:
        ValueError: the configuration cannot be served (context, memory, backend); one sentence with the cure.
    """
    config = without_gaps(config, model_config, Platform.of(weights.device))
    config = replace(config, quantization=weights.quantization)
    assert config.max_num_seqs is not None and config.max_num_batched_tokens is not None
    limits = Limits(config.max_num_seqs, config.max_num_batched_tokens, config.cache_mode)
    runner = _make_runner(weights, model_config, config, limits, buckets)
    _check_devices(runner, config)
    memory = share_memory(runner, config, limits.kinds)
    logger.info("device memory\n%s", memory.table())
    is_coded = config.cache_dtype == "int8" and runner.shapes.kinds.keep(Vector.HIDDEN)
    if is_coded and channels is None:
        channels = cache_channels(runner, tokenizer, fingerprint)
    runner.allocate(memory.num_blocks, channels if is_coded else None)
    limits = replace(limits, watermark_blocks=int(WATERMARK * memory.num_blocks))
    cost_model = base_model(runner)
    pool = make_pool(
        memory.num_blocks, config.block_size, prefix_caching=config.enable_prefix_caching,
        host=host_tier(runner, config, limits.kinds, cost_model),
    )  # fmt: skip
    return EngineSetup(
        model_config=model_config,
        config=config,
        runner=runner,
        builder=BatchBuilder(
            runner.buckets, num_slots=limits.max_num_seqs, table_pages=runner.shapes.table_pages
        ),
        state=SchedulerState(pool, limits),
        memory=memory,
        cost_model=cost_model,
        calibration_file=calibration_path(runner, cost_model),
        attention=runner.attention,
        dtype=runner.dtype,
    )  # fmt: skip


def measure_channels(weights: Weights, model_config: ModelConfig, tokenizer: Tokenizer) -> np.ndarray:
    """What an int8 cache of these weights is calibrated with, `[2, L, D]`: see `cache_channels`.

    Raises:
        ValueError: the model's hidden vectors are not finite.
    """
    config = EngineConfig(cache_dtype="int8", cache_mode="hidden", max_num_seqs=1, max_num_batched_tokens=1)
    config = without_gaps(config, model_config, Platform.of(weights.device))
    runner = _make_runner(weights, model_config, config, Limits(1, 1, config.cache_mode), None)
    return cache_channels(runner, tokenizer)


def without_gaps(config: EngineConfig, model_config: ModelConfig, platform: Platform) -> EngineConfig:
    """Fill in the defaults that depend on the model and the device.

    Raises:
        ValueError: an option asks for what this model or this version cannot do.
    """
    if config.max_model_len is not None and config.max_model_len > model_config.max_position_embeddings:
        raise ValueError(
            f"max_model_len={config.max_model_len} is more than the model's max_position_embeddings="
            f"{model_config.max_position_embeddings}; lower --max-model-len"
        )
    max_num_seqs = config.max_num_seqs or platform.max_num_seqs
    return replace(
        config,
        max_model_len=config.max_model_len or model_config.max_position_embeddings,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens or max(platform.max_num_batched_tokens, max_num_seqs),
        async_scheduling=platform.async_scheduling if config.async_scheduling is None else config.async_scheduling,
    )


def _make_runner(
    weights: Weights, model_config: ModelConfig, config: EngineConfig, limits: Limits, buckets: Buckets | None
) -> Runner:
    assert config.max_model_len is not None
    pages = table_pages(config.max_model_len, config.block_size, pages_multiple(config.block_size))
    shapes = Shapes(
        limits.max_num_seqs,
        config.max_model_len,
        pages,
        config.block_size,
        KindMix(limits.kinds),
        as_cache_dtype(config.cache_dtype),
    )
    if buckets is None:
        buckets = Buckets(max_num_seqs=limits.max_num_seqs, max_num_batched_tokens=limits.max_num_batched_tokens)
    return Runner(weights, model_config, shapes, buckets)


def _check_devices(runner: Runner, config: EngineConfig) -> None:
    """Refuse weights that do not lie as the configuration says.

    Raises:
        ValueError: they are on another number of devices, or not split for the kinds of cache.
    """
    if runner.num_devices != config.tensor_parallel_size:
        raise ValueError(
            f"tensor_parallel_size={config.tensor_parallel_size}, but the weights lie on {runner.num_devices} "
            "device(s); load them with the same number"
        )
    parallel = runner.weights.parallel
    keeps_hidden = runner.shapes.kinds.keep(Vector.HIDDEN)
    if parallel is not None and runner.num_devices > 1 and keeps_hidden and not parallel.hidden:
        raise ValueError(
            f"cache_mode={config.cache_mode!r} needs k and v split by inputs, and these weights are split by heads; "
            "load them for that mode, or use --cache-mode kv"
        )
