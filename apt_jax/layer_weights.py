"""A model's weights as a CPU likes them: an array per layer and parameter.

`cpu_kernels` multiply kernels in panels. XLA's CPU backend copies a layer's part of stacked weights before it
multiplies, multiplies few rows fastest with a kernel `[outputs, inputs]`, and bfloat16 by converting both sides to
float32 at every call: so where XLA multiplies they are kept converted (docs/performance.md).
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

from apt_jax.cpu_kernels.calls import PANEL, matmul, panels_of
from apt_jax.opt import OPT, DecoderLayer
from apt_jax.weight_formats import names_in


@dataclass(frozen=True)
class LayerWeights:
    """All layers' arrays, and how a layer is put together from its own."""

    arrays: list[list[jax.Array]]  # per layer; kernels are in panels or `[outputs, inputs]`
    numbers: list[jax.Array]  # per layer its number, int32
    _graphdef: nnx.GraphDef
    _tree: jax.tree_util.PyTreeDef
    _kernels: list[Callable[[jax.Array], Any] | None]  # per parameter what it is in the module; None is an array

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
        arrays: list[list[jax.Array]] = [[] for _ in range(model.num_layers)]
        kernels: list[Callable[[jax.Array], Any] | None] = []
        for path, stacked in with_path:
            names = names_in(path)
            is_kernel, num_inputs = "kernel" in names, 2 if "out_proj" in names else 1  # axes
            shape = stacked.shape[1:]
            by_heads = "k_proj" in names or "v_proj" in names
            in_panels = own_products and (not by_heads or shape[-1] % PANEL == 0)
            kernels.append(partial(PanelKernel if in_panels else TurnedKernel, shape=shape) if is_kernel else None)
            for of_layer, array in zip(arrays, np.asarray(stacked), strict=True):
                own = np.array(array)
                if is_kernel:
                    matrix = array.reshape(math.prod(shape[:num_inputs]), -1)
                    own = panels_of(matrix) if in_panels else np.array(matrix.T, np.float32, order="C")
                of_layer.append(jax.device_put(own, device, may_alias=True))
            if donate:
                stacked.delete()
        numbers = [jnp.int32(i) for i in range(model.num_layers)]
        return cls(arrays, numbers, graphdef, tree, kernels)

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
            in_panels = own_products and model.lm_head is None and path[0].key == "embed_tokens"
            shapes.append(leaf.shape if in_panels else None)
            array = leaf
            if path[0].key == "layers":
                array = jnp.zeros(0, leaf.dtype)
            elif in_panels:
                array = jax.device_put(panels_of(np.asarray(leaf).T), next(iter(leaf.devices())), may_alias=True)
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
    """A kernel that is multiplied by `cpu_kernels`, an `apt_jax.opt.OwnProduct`."""

    array: jax.Array  # [panels, inputs, PANEL]
    shape: tuple[int, ...]  # as the module has it

    @property
    def parts(self) -> jax.Array:
        """See `apt_jax.opt.OwnProduct`."""
        return self.array

    def product(self, x: jax.Array) -> jax.Array:
        """See `apt_jax.opt.OwnProduct`."""
        return matmul(x, self.array, math.prod(self.shape) // x.shape[1])


class PanelTable(PanelKernel):
    """Embeddings that are looked up and, for logits, multiplied by `cpu_kernels`; its shape is `(E, V)`."""

    def __getitem__(self, index: Any) -> Any:
        if index is Ellipsis:
            return self
        return self.array[index // PANEL, :, index % PANEL]
