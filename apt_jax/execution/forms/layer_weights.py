"""A model's weights as a CPU likes them: an array per layer and parameter.

`cpu_kernels` multiply kernels in panels. XLA's CPU backend copies a layer's part of stacked weights before it
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

from apt_jax.cpu_kernels.calls import PANEL, inputs_first, matmul, outputs_at, panels_bytes, panels_of, takes
from apt_jax.cpu_kernels.large_pages import LargePages
from apt_jax.execution.tpu_layouts import names_in
from apt_jax.models.opt import OPT, DecoderLayer


@dataclass(frozen=True)
class LayerWeights:
    """All layers' arrays, and how a layer is put together from its own."""

    arrays: list[list[jax.Array]]  # per layer; kernels are in panels or `[outputs, inputs]`
    numbers: list[jax.Array]  # per layer its number, int32
    _graphdef: nnx.GraphDef
    _tree: jax.tree_util.PyTreeDef
    _kernels: list[Callable[[jax.Array], Any] | None]  # per parameter what it is in the module; None is an array
    all_in_panels: bool  # every kernel is multiplied by `cpu_kernels`

    @classmethod
    def of(cls, model: OPT, *, donate: bool = False, own_products: bool = False) -> "LayerWeights":
        """Copies of a model's weights on a CPU.

        Args:
            donate: each stacked array is deleted once it is copied, so that little memory is needed twice; the model
                cannot be used any more.
            own_products: kernels are multiplied by `cpu_kernels`, in panels of their own dtype; else by XLA, as
                float32. So are those of keys and values if heads are not whole panels: attention reads them by heads.
        """
        graphdef, state = nnx.split(model.layers)
        with_path, tree = jax.tree.flatten_with_path(state)
        device = next(iter(with_path[0][1].devices()))
        plans = [_Plan.of(path, stacked, own_products) for path, stacked in with_path]
        memory = LargePages(model.num_layers * sum(plan.panels_bytes for plan in plans))
        arrays: list[list[jax.Array]] = [[] for _ in range(model.num_layers)]
        for plan, (_, stacked) in zip(plans, with_path, strict=True):
            for of_layer, array in zip(arrays, np.asarray(stacked), strict=True):
                of_layer.append(jax.device_put(plan.stored(array, memory), device, may_alias=True))
            if donate:
                stacked.delete()
        numbers = [jnp.int32(i) for i in range(model.num_layers)]
        all_in_panels = all(plan.panels_bytes for plan in plans if plan.matrix)
        return cls(arrays, numbers, graphdef, tree, [plan.in_module for plan in plans], all_in_panels)

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
    in_module: Callable[[jax.Array], Any] | None  # see `LayerWeights`
    panels_bytes: int  # of a layer; 0 if it is not in panels

    @classmethod
    def of(cls, path: tuple[Any, ...], stacked: jax.Array, own_products: bool) -> "_Plan":
        names, shape = names_in(path), stacked.shape[1:]
        if "kernel" not in names:
            return cls(None, None, 0)
        inputs = math.prod(shape[: 2 if "out_proj" in names else 1])
        matrix = (inputs, math.prod(shape) // inputs)
        by_heads = "k_proj" in names or "v_proj" in names
        if own_products and takes(inputs, stacked.dtype) and (not by_heads or shape[-1] % PANEL == 0):
            return cls(matrix, partial(PanelKernel, shape=shape), panels_bytes(*matrix, stacked.dtype))
        return cls(matrix, partial(TurnedKernel, shape=shape), 0)

    def stored(self, array: np.ndarray, memory: LargePages) -> np.ndarray:
        """A copy of one layer's array as it is to be stored."""
        if self.matrix is None:
            return np.array(array)
        array = array.reshape(self.matrix)
        return panels_of(array, memory) if self.panels_bytes else np.array(array.T, np.float32, order="C")


@dataclass(frozen=True)
class OuterWeights:
    """A model's weights as programs outside the layers take them, without those of the layers."""

    arrays: list[jax.Array]
    _shapes: list[tuple[int, ...] | None]  # of an array that is a table in panels

    @classmethod
    def of(cls, model: OPT, *, donate: bool = False, own_products: bool = False) -> "OuterWeights":
        """The model's own arrays, and a copy of the vocabulary for logits.

        Args:
            donate: see `LayerWeights.of`; of what is copied.
            own_products: a vocabulary that is tied to the embeddings is multiplied by `cpu_kernels`; else by XLA, as
                float32.
        """
        arrays: list[jax.Array] = []
        shapes: list[tuple[int, ...] | None] = []
        for path, leaf in jax.tree.leaves_with_path(nnx.state(model)):
            in_panels = (
                own_products
                and model.lm_head is None
                and path[0].key == "embed_tokens"
                and takes(leaf.shape[1], leaf.dtype)
            )
            shapes.append(leaf.shape if in_panels else None)
            array = leaf
            if path[0].key == "layers":
                array = jnp.zeros(0, leaf.dtype)
            elif in_panels:
                outputs, inputs = leaf.shape
                panels = panels_of(np.asarray(leaf).T, LargePages(panels_bytes(inputs, outputs, leaf.dtype)))
                array = jax.device_put(panels, next(iter(leaf.devices())), may_alias=True)
                if donate:
                    leaf.delete()
            elif path[0].key == ("embed_tokens" if model.lm_head is None else "lm_head"):
                array = leaf.astype(jnp.float32)
            arrays.append(array)
        return cls(arrays, shapes)

    def leaves(self, arrays: list[jax.Array]) -> list[Any]:
        """The leaves of the model's state of `arrays`, inside a compiled function."""
        return [
            array if shape is None else PanelTable(array, shape[::-1])
            for array, shape in zip(arrays, self._shapes, strict=True)
        ]


@dataclass(frozen=True)
class TurnedKernel:
    """A kernel that is turned round where it is read, `kernel[...]`.

    There it is a part of the product and costs nothing. Turned before a `lax.cond`, it would be copied to enter it.
    """

    array: jax.Array  # [outputs, inputs]
    shape: tuple[int, ...]  # as the module has it: inputs first, either may be several axes

    def __getitem__(self, index: Any) -> jax.Array:
        return self.array.T.reshape(self.shape)[index]


@dataclass(frozen=True)
class PanelKernel:
    """A kernel that is multiplied by `cpu_kernels`, an `apt_jax.models.opt.OwnProduct`."""

    array: jax.Array  # from `panels_of`
    shape: tuple[int, ...]  # as the module has it

    @property
    def parts(self) -> jax.Array:
        """See `apt_jax.models.opt.OwnProduct`."""
        return inputs_first(self.array)

    def product(self, x: jax.Array) -> jax.Array:
        """See `apt_jax.models.opt.OwnProduct`."""
        return matmul(x, self.array, math.prod(self.shape) // x.shape[1])


class PanelTable(PanelKernel):
    """Embeddings that are looked up and, for logits, multiplied by `cpu_kernels`; its shape is `(E, V)`."""

    def __getitem__(self, index: Any) -> Any:
        if index is Ellipsis:
            return self
        return outputs_at(self.array, index)
