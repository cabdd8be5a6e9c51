"""The layout of weights on a CPU: an array for each layer and parameter.

`cpu_kernels` multiply packed kernels. XLA's CPU backend copies a layer's part of stacked weights before it
multiplies, multiplies few rows fastest with a kernel `[outputs, inputs]`, and bfloat16 by converting both sides to
float32 at every call: so where XLA multiplies they are kept converted (docs/log/2026-11-30-performance.md).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from apt_jax.cpu_kernels.calls import KERNELS as CPU_KERNELS
from apt_jax.cpu_kernels.large_pages import LargePages
from apt_jax.cpu_kernels.packed import PACKED_OUTPUTS, PackedKernel, can_absorb, can_pack, pack, packed_bytes
from apt_jax.cpu_kernels.packed_int8 import PackedInt8Kernel, pack_int8, packed_int8_bytes
from apt_jax.execution.weights.int8 import Int8Choice, quantised_kernel
from apt_jax.execution.weights.layout import (
    InModule,
    Leaf,
    ModuleArrays,
    Path,
    Placed,
    WeightLayout,
    Weights,
    dtype_of,
    paths_of,
)
from apt_jax.models.kernels import TransposedKernel
from apt_jax.models.linear import Head, Linear
from apt_jax.models.quantization import Int8Weight
from apt_jax.pallas_kernels.dispatch import Kernels

_LAYERS, _TABLE = "layers", "embedding"


@dataclass(frozen=True)
class LayerLayout(WeightLayout):
    """Layout with arrays for each layer, on a CPU; the vocabulary table is stored as logits read it.

    Attributes:
        inputs: axes of a kernel's inputs, by its path.
        head: path of what logits are made with: the table of embeddings, or a kernel of its own.
        kernels: see `Weights`. With those in C++ projections are packed in their own dtype and multiplied in C++, else
            by XLA, as float32. So are those of keys and values if heads are not whole packed tiles: attention reads
            them by heads.
    """

    inputs: Mapping[Path, int]
    head: Path
    kernels: Kernels | None = None

    @property
    def packs(self) -> bool:
        """Whether projections are packed for the C++ matmul (`cpu_kernels/packed.py`)."""
        return self.kernels is not None and self.kernels.chunk is CPU_KERNELS.chunk

    @classmethod
    def of(
        cls, model: nnx.Module, device: jax.Device, kernels: Kernels | None = None, int8: Int8Choice | None = None
    ) -> "LayerLayout":
        """The layout for `model`, of which only shapes are used."""
        inputs = {
            (*map(str, path), "kernel"): len(module.inputs)
            for path, module in nnx.iter_modules(model)
            if isinstance(module, Linear)
        }
        heads = [(*map(str, path), "kernel") for path, m in nnx.iter_modules(model) if isinstance(m, Head)]
        return cls(device, inputs, heads[0] if heads else ("embed_tokens", _TABLE), kernels, int8=int8)

    def final_sharding(self, path: Path, shape: tuple[int, ...]) -> jax.sharding.Sharding:
        """See `WeightLayout`."""
        return jax.sharding.SingleDeviceSharding(self.device)

    def place_wide(self, path: Path, array: jax.Array) -> Placed:
        """See `WeightLayout`."""
        if path == self.head:
            return self._place_head(path, array)
        if path[0] != _LAYERS:
            if path in self.inputs and self.packs and can_pack(len(array), array.dtype):  # OPT-350m's projections
                packed = self._put(pack(np.asarray(array)))
                return Placed([(packed,)], partial(PackedKernel, shape=array.shape))
            return Placed([(array,)])
        host, shape = np.asarray(array), array.shape[1:]
        if path not in self.inputs:
            return Placed([(self._put(np.array(one)),) for one in host])
        inputs = math.prod(shape[: self.inputs[path]])
        matrices = host.reshape(len(host), inputs, -1)
        if self._takes_packed(path, shape) and can_pack(inputs, array.dtype):
            memory = LargePages(len(host) * packed_bytes(*matrices.shape[1:], array.dtype))
            return Placed([(self._put(pack(one, memory)),) for one in matrices], partial(PackedKernel, shape=shape))
        transposed = [(self._put(np.array(one.T, np.float32, order="C")),) for one in matrices]
        return Placed(transposed, partial(TransposedKernel, shape=shape))

    def place_int8(self, path: Path, weight: Int8Weight) -> Placed:
        """See `WeightLayout`."""
        assert self.int8 is not None
        parts = [np.asarray(part) for part in weight if part is not None]
        if path[0] != _LAYERS:
            parts = [part[None] for part in parts]
        values, scale, *factor = parts
        shape = values.shape[1:]
        if not self._takes_packed(path, shape):
            leaves = [tuple(self._put(np.array(one)) for one in layer) for layer in zip(*parts, strict=True)]
            return Placed(leaves, self.int8.in_module(path))
        if path[-1] == _TABLE:
            values, shape = values.swapaxes(1, 2), shape[::-1]
        matrices = values.reshape(len(values), math.prod(shape[: self.int8.paths[path]]), -1)
        memory = LargePages(len(matrices) * packed_int8_bytes(*matrices.shape[1:]))
        of_outputs = scale.reshape(len(scale), -1)
        padded = np.pad(of_outputs, [(0, 0), (0, -of_outputs.shape[1] % PACKED_OUTPUTS)])
        stored = [self._put(pack_int8(one, memory)) for one in matrices]
        others = [[self._put(np.array(one)) for one in part] for part in (padded, *factor)]
        dynamic, dtype = self.int8.is_dynamic(path), self.int8.dtype
        make = partial(PackedInt8Kernel, shape=shape, dynamic=dynamic, dtype=dtype)
        return Placed(list(zip(stored, *others, strict=True)), partial(quantised_kernel, make))

    def weights(self, model: Any, placed: Mapping[Path, Placed]) -> Weights:
        """See `WeightLayout`."""
        outer: list[tuple[Leaf, InModule]] = []
        of_layers: list[Placed] = []
        dtype = dtype_of(model)  # what XLA multiplies is placed as float32
        for path in paths_of(model):
            one = placed[path]
            if path[0] == _LAYERS:
                of_layers.append(one)
                outer.append(((jnp.zeros(0, dtype, device=self.device),), None))
            else:
                outer.append((one.leaves[0], one.in_module))
        layers = [
            ModuleArrays.of(model.layers, [(one.leaves[i], one.in_module) for one in of_layers])
            for i in range(len(of_layers[0].leaves))
        ]
        return Weights(ModuleArrays.of(model, outer), layers, dtype, self.kernels, quantization=self.quantization)

    def _place_head(self, path: Path, array: jax.Array) -> Placed:
        """A table `[V, E]` or a kernel `[E, V]` that logits are made with."""
        is_table = path[-1] == _TABLE
        host = np.asarray(array)
        outputs_first = host if is_table else host.T
        outputs, inputs = shape = outputs_first.shape
        if self.packs and is_table and can_pack(inputs, array.dtype):
            memory = LargePages(packed_bytes(inputs, outputs, array.dtype))
            return Placed([(self._put(pack(host.T, memory)),)], partial(PackedKernel, shape=shape[::-1]))
        transposed = np.array(outputs_first, np.float32, order="C")
        return Placed([(self._put(transposed),)], partial(TransposedKernel, shape=shape[::-1]))

    def _takes_packed(self, path: Path, shape: tuple[int, ...]) -> bool:
        """Whether a kernel of `shape` is packed, if its number type allows it."""
        by_heads = path[-2] in ("k_proj", "v_proj")
        return self.packs and (not by_heads or can_absorb(shape[0], shape[-1]))

    def _put(self, array: np.ndarray) -> jax.Array:
        return jax.device_put(array, self.device, may_alias=True)
