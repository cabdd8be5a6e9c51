"""Which attention kernels an engine takes, and the layout of weights that goes with them."""

import jax
import numpy as np
from flax import nnx

from apt_jax.attention.selection import select_kernels
from apt_jax.cpu_kernels.calls import KERNELS as CPU_KERNELS
from apt_jax.engine_config import AttentionBackend, EngineConfig
from apt_jax.execution.platform import Platform
from apt_jax.execution.weights.layer_layout import LayerLayout
from apt_jax.execution.weights.layout import StackedLayout, WeightLayout, Weights
from apt_jax.model_config import ModelConfig
from apt_jax.models.sharding import Parallel, local_config
from apt_jax.pallas_kernels.dispatch import Kernels


def kernels_for(
    backend: AttentionBackend, config: ModelConfig, *, block_size: int, dtype: np.dtype, device: jax.Device,
    num_devices: int,
) -> Kernels | None:  # fmt: skip
    """The kernels to attend with, or None for XLA; see `select_kernels`."""
    return select_kernels(
        backend, local_config(config, num_devices), block_size=block_size, dtype=dtype, device=device,
        cpp_kernels=Platform.of(device).cpp_kernels, num_devices=num_devices,
    )  # fmt: skip


def serving_layout(
    model: nnx.Module,
    config: ModelConfig,
    dtype: np.dtype,
    *,
    backend: AttentionBackend,
    block_size: int,
    device: jax.Device,
    parallel: Parallel | None = None,
) -> WeightLayout:
    """The layout of weights for serving on `device`, or on the devices of `parallel`.

    Args:
        model: only shapes are used.
        backend, block_size: the engine's options.

    Raises:
        ValueError: see `select_kernels`.
    """
    platform = Platform.of(device)
    if parallel is not None or not platform.call_per_layer:
        return StackedLayout(device, parallel, platform.custom_layouts)
    kernels = kernels_for(backend, config, block_size=block_size, dtype=dtype, device=device, num_devices=1)
    return LayerLayout.of(model, device, packs=kernels is CPU_KERNELS)


def laid_out(model: nnx.Module, config: ModelConfig, options: EngineConfig) -> Weights:
    """The weights of a model in memory, laid out for serving on its devices (`load_model` makes no copy)."""
    array = jax.tree.leaves(nnx.state(model))[0]
    layout = serving_layout(
        model, config, np.dtype(array.dtype), backend=options.attention_backend, block_size=options.block_size,
        device=array.addressable_shards[0].device, parallel=Parallel.of(model),
    )  # fmt: skip
    return layout.lay_out(model)
