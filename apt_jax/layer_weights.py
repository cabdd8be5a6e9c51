"""The layers' weights as a CPU likes them: an array per layer and parameter, a kernel as `[outputs, inputs]`.

XLA's CPU backend copies a layer's part of stacked weights before it multiplies, multiplies few rows fastest with a
kernel of this orientation, and multiplies bfloat16 by converting both sides to float32, at every call: so where XLA
multiplies they are kept converted, and the products are the same (docs/performance.md).
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from apt_jax.cpu_kernels.calls import matmul, max_rows
from apt_jax.opt import OPT, DecoderLayer
from apt_jax.weight_formats import names_in


@dataclass(frozen=True)
class LayerWeights:
    """All layers' arrays, and how a layer is put together from its own."""

    arrays: list[list[jax.Array]]  # per layer; kernels are `[outputs, inputs]`
    numbers: list[jax.Array]  # per layer its number, int32
    _graphdef: nnx.GraphDef
    _tree: jax.tree_util.PyTreeDef
    _kernels: list[tuple[int, ...] | None]  # per parameter a kernel's shape as the module has it; None is no kernel
    _own_products: bool

    @classmethod
    def of(cls, model: OPT, *, donate: bool = False, own_products: bool = False) -> "LayerWeights":
        """Copies of a model's weights on a CPU.

        Args:
            donate: each stacked array is deleted once it is copied, so that little memory is needed twice; the model
                cannot be used any more.
            own_products: kernels are multiplied by `cpu_kernels` and keep their dtype; else by XLA, as float32.
        """
        graphdef, state = nnx.split(model.layers)
        with_path, tree = jax.tree.flatten_with_path(state)
        device = next(iter(with_path[0][1].devices()))
        arrays: list[list[jax.Array]] = [[] for _ in range(model.num_layers)]
        kernels: list[tuple[int, ...] | None] = []
        for path, stacked in with_path:
            names = names_in(path)
            is_kernel, num_inputs = "kernel" in names, 2 if "out_proj" in names else 1  # axes
            shape = stacked.shape[1:]
            kernels.append(shape if is_kernel else None)
            for of_layer, array in zip(arrays, np.asarray(stacked), strict=True):
                if is_kernel:
                    array = array.reshape(math.prod(shape[:num_inputs]), -1).T
                own = np.array(array, np.float32 if is_kernel and not own_products else array.dtype, order="C")
                of_layer.append(jax.device_put(own, device, may_alias=True))
            if donate:
                stacked.delete()
        numbers = [jnp.int32(i) for i in range(model.num_layers)]
        return cls(arrays, numbers, graphdef, tree, kernels, own_products)

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(array.nbytes for of_layer in self.arrays for array in of_layer)

    def layer(self, arrays: list[jax.Array]) -> DecoderLayer:
        """The module of one layer's `arrays`, inside a compiled function."""
        kernel = OwnKernel if self._own_products else TurnedKernel
        leaves = [
            array if shape is None else kernel(array, shape) for array, shape in zip(arrays, self._kernels, strict=True)
        ]
        return nnx.merge(self._graphdef, jax.tree.unflatten(self._tree, leaves))


def outside_layers(path: tuple[Any, ...], leaf: jax.Array, own_products: bool) -> jax.Array:
    """A model's parameter as programs outside the layers take it: nothing for the layers, the vocabulary in float32.

    With `own_products` a vocabulary that is tied to the embeddings stays as it is, for `with_own_table`.
    """
    if path[0].key == "layers":
        return jnp.zeros(0, leaf.dtype)
    in_float32 = path[0].key == "lm_head" or (path[0].key == "embed_tokens" and not own_products)
    return leaf.astype(jnp.float32) if in_float32 else leaf


def with_own_table(path: tuple[Any, ...], leaf: jax.Array) -> Any:
    """The embedding table as an `OwnTable`, other parameters as they are; inside a compiled function."""
    return OwnTable(leaf) if path[0].key == "embed_tokens" else leaf


@dataclass(frozen=True)
class TurnedKernel:
    """A kernel that is turned round where it is read, `kernel[...]`.

    There it is a part of the product and costs nothing. Turned before a `lax.cond`, it would be copied to enter it.
    """

    array: jax.Array  # [outputs, inputs]
    shape: tuple[int, ...]  # as the module has it: inputs first, either may be several axes

    def __getitem__(self, index: Any) -> jax.Array:
        return self.array.T.reshape(self.shape)[index]


class _Own:
    """What is multiplied by `cpu_kernels`, see `apt_jax.opt.OwnProduct`."""

    array: jax.Array  # [outputs, inputs]

    @property
    def max_rows(self) -> float:
        """More are left to XLA."""
        return max_rows(self.array.dtype)

    def product(self, x: jax.Array) -> jax.Array:
        """Float32 `[R, outputs]` of `x [R, inputs]`."""
        return matmul(x, self.array)


class OwnKernel(_Own, TurnedKernel):
    """A kernel that is multiplied by `cpu_kernels`; XLA may still read it."""


@dataclass(frozen=True)
class OwnTable(_Own):
    """Embeddings `[V, E]` that are looked up as an array and, for logits, multiplied by `cpu_kernels`."""

    array: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """As `apt_jax.opt.OwnProduct` has it: inputs first."""
        return self.array.shape[::-1]

    def __getitem__(self, index: Any) -> jax.Array:
        return self.array[index]
