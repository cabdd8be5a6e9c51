"""Which attention kernels an engine takes, and the layout of weights that goes with them."""

import jax
import numpy as np
from flax import nnx

from apt_jax.attention.selection import select_kernels
from apt_jax.cache import CacheDtype, as_cache_dtype
from apt_jax.engine_config import AttentionBackend, EngineConfig
from apt_jax.execution.platform import Platform
from apt_jax.execution.weights.int8 import Int8Choice
from apt_jax.execution.weights.layer_layout import LayerLayout
from apt_jax.execution.weights.layout import StackedLayout, WeightLayout, Weights
from apt_jax.model_config import ModelConfig, as_quantization
from apt_jax.models.sharding import Parallel, local_config


def serving_layout(
    model: nnx.Module,
    config: ModelConfig,
    dtype: np.dtype,
    *,
    backend: AttentionBackend,
    block_size: int,
    device: jax.Device,
    parallel: Parallel | None = None,
    cache_dtype: CacheDtype = "auto",
    int8: Int8Choice | None = None,
) -> WeightLayout:
    """The layout of weights for serving on `device`, or on the devices of `parallel`; here the kernels are selected.

    Args:
        model: only shapes are used.
        backend, block_size, cache_dtype: the engine's options.
        int8: which weights are quantised.

    Raises:
        ValueError: see `select_kernels`.
    """
    platform = Platform.of(device)
    devices = 1 if parallel is None else parallel.num_devices
    kernels = select_kernels(
        backend, local_config(config, devices), block_size=block_size, dtype=dtype, device=device,
        cpp_kernels=platform.cpp_kernels, num_devices=devices, cache_dtype=cache_dtype,
    )  # fmt: skip
    if parallel is not None or not platform.call_per_layer:
        return StackedLayout(device, parallel, platform.custom_layouts, kernels, int8=int8)
    return LayerLayout.of(model, device, kernels, int8)


def laid_out(model: nnx.Module, config: ModelConfig, options: EngineConfig) -> Weights:
    """The weights of a model in memory, laid out for serving on its devices (`load_model` makes no copy)."""
    array = jax.tree.leaves(nnx.state(model))[0]
    layout = serving_layout(
        model, config, np.dtype(array.dtype), backend=options.attention_backend, block_size=options.block_size,
        device=array.addressable_shards[0].device, parallel=Parallel.of(model),
        cache_dtype=as_cache_dtype(options.cache_dtype),
        int8=Int8Choice.of(model, as_quantization(options.quantization or "none")),
    )  # fmt: skip
    return layout.lay_out(model)
