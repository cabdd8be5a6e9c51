"""A model's weights as a CPU likes them: an array per layer and parameter.

`cpu_kernels` multiply packed kernels. XLA's CPU backend copies a layer's part of stacked weights before it
multiplies, multiplies few rows fastest with a kernel `[outputs, inputs]`, and bfloat16 by converting both sides to
float32 at every call: so where XLA multiplies they are kept converted (docs/log/2026-11-30-performance.md).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from apt_jax.cpu_kernels.large_pages import LargePages
from apt_jax.cpu_kernels.packed import PACKED_OUTPUTS, PackedKernel, can_pack, pack, packed_bytes
from apt_jax.execution.tpu_layouts import names_in
from apt_jax.models.interface import num_layers
from apt_jax.models.kernels import Kernel, TransposedKernel
from apt_jax.models.opt import OPT, DecoderLayer


@dataclass(frozen=True)
class LayerWeights:
    """All layers' arrays, and how a layer is put together from its own."""

    arrays: list[list[jax.Array]]  # per layer; kernels are packed or `[outputs, inputs]`
    numbers: list[jax.Array]  # per layer its number, int32
    _graphdef: nnx.GraphDef
    _tree: jax.tree_util.PyTreeDef
    _kernels: list[Callable[[jax.Array], Kernel] | None]  # per parameter what it is in the module; None is an array
    all_packed: bool  # every kernel is multiplied by `cpu_kernels`

    @classmethod
    def of(cls, model: OPT, *, donate: bool = False, packs: bool = False) -> "LayerWeights":
        """Copies of a model's weights on a CPU.

        Args:
            donate: each stacked array is deleted once it is copied, so that little memory is needed twice; the model
                cannot be used any more.
            packs: kernels are multiplied by `cpu_kernels`, packed in their own dtype; else by XLA, as float32. So are
                those of keys and values if heads are not whole groups of outputs: attention reads them by heads.
        """
        graphdef, state = nnx.split(model.layers)
        layers = num_layers(model.layers)
        with_path, tree = jax.tree.flatten_with_path(state)
        device = next(iter(with_path[0][1].devices()))
        plans = [_Plan.of(path, stacked, packs) for path, stacked in with_path]
        memory = LargePages(layers * sum(plan.packed_bytes for plan in plans))
        arrays: list[list[jax.Array]] = [[] for _ in range(layers)]
        for plan, (_, stacked) in zip(plans, with_path, strict=True):
            for of_layer, array in zip(arrays, np.asarray(stacked), strict=True):
                of_layer.append(jax.device_put(plan.stored(array, memory), device, may_alias=True))
            if donate:
                stacked.delete()
        numbers = [jnp.int32(i) for i in range(layers)]
        all_packed = all(plan.packed_bytes for plan in plans if plan.matrix)
        return cls(arrays, numbers, graphdef, tree, [plan.in_module for plan in plans], all_packed)

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(array.nbytes for of_layer in self.arrays for array in of_layer)

    def layer(self, arrays: list[jax.Array]) -> DecoderLayer:
        """The module of one layer's `arrays`, inside a compiled function."""
        leaves = [
            array if kernel is None else kernel(array) for array, kernel in zip(arrays, self._kernels, strict=True)
        ]
        return nnx.merge(self._graphdef, jax.tree.unflatten(self._tree, leaves))


@dataclass(frozen=True)
class _Plan:
    """How one parameter of all layers is stored."""

    matrix: tuple[int, int] | None  # inputs and outputs of a kernel
    in_module: Callable[[jax.Array], Kernel] | None  # see `LayerWeights`
    packed_bytes: int  # of a layer; 0 if it is not packed

    @classmethod
    def of(cls, path: tuple[Any, ...], stacked: jax.Array, packs: bool) -> "_Plan":
        names, shape = names_in(path), stacked.shape[1:]
        if "kernel" not in names:
            return cls(None, None, 0)
        inputs = math.prod(shape[: 2 if "out_proj" in names else 1])
        matrix = (inputs, math.prod(shape) // inputs)
        by_heads = "k_proj" in names or "v_proj" in names
        if packs and can_pack(inputs, stacked.dtype) and (not by_heads or shape[-1] % PACKED_OUTPUTS == 0):
            return cls(matrix, partial(PackedKernel, shape=shape), packed_bytes(*matrix, stacked.dtype))
        return cls(matrix, partial(TransposedKernel, shape=shape), 0)

    def stored(self, array: np.ndarray, memory: LargePages) -> np.ndarray:
        """A copy of one layer's array as it is to be stored."""
        if self.matrix is None:
            return np.array(array)
        array = array.reshape(self.matrix)
        return pack(array, memory) if self.packed_bytes else np.array(array.T, np.float32, order="C")


@dataclass(frozen=True)
class OuterWeights:
    """A model's weights as programs outside the layers take them, without those of the layers."""

    arrays: list[jax.Array]
    _kernels: list[Callable[[jax.Array], Kernel] | None]  # what an array is in the module; None is an array

    @classmethod
    def of(cls, model: OPT, *, donate: bool = False, packs: bool = False) -> "OuterWeights":
        """The model's own arrays, and a copy of the vocabulary for logits.

        Args:
            donate: see `LayerWeights.of`; of what is copied.
            packs: a vocabulary that is tied to the embeddings is multiplied by `cpu_kernels`; else by XLA, as float32.
        """
        arrays: list[jax.Array] = []
        kernels: list[Callable[[jax.Array], Kernel] | None] = []
        for path, leaf in jax.tree.leaves_with_path(nnx.state(model)):
            array = leaf
            kernel: Callable[[jax.Array], Kernel] | None = None
            if path[0].key == "layers":
                array = jnp.zeros(0, leaf.dtype)
            elif path[0].key == "embed_tokens" and model.lm_head is None:
                outputs, inputs = leaf.shape
                if packs and can_pack(inputs, leaf.dtype):
                    packed = pack(np.asarray(leaf).T, LargePages(packed_bytes(inputs, outputs, leaf.dtype)))
                    array = jax.device_put(packed, next(iter(leaf.devices())), may_alias=True)
                    kernel = partial(PackedKernel, shape=(inputs, outputs))
                    if donate:
                        leaf.delete()
                else:
                    array = leaf.astype(jnp.float32)
                    kernel = partial(TransposedKernel, shape=(inputs, outputs))
            elif path[0].key == "lm_head":
                array = leaf.T.astype(jnp.float32)
                kernel = partial(TransposedKernel, shape=leaf.shape)
            arrays.append(array)
            kernels.append(kernel)
        return cls(arrays, kernels)

    def leaves(self, arrays: list[jax.Array]) -> list[Any]:
        """The leaves of the model's state of `arrays`, inside a compiled function."""
        return [array if kernel is None else kernel(array) for array, kernel in zip(arrays, self._kernels, strict=True)]
