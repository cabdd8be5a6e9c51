"""The layouts of weights in a TPU's memory, chosen so that no step copies a weight to another layout.

XLA stores an array with its last two axes in tiles of 8 x 128. For the query, key and value projections `[L, D, N, H]`
these would be (N, H), while every product wants a head's matrix in tiles: (D, H), or (H, D) where H is no multiple of
128 and would be padded. These are the layouts that `Layout.AUTO` chooses for v5e and v6e; the others stay as they are.

On a TPU7x XLA reads bfloat16 matrices in tiles of 16 x 128, but puts arguments in tiles of 8 x 128, with `Layout.AUTO`
too, and copies the stacks of most matrices once in every step, unless they come in the tiles that it reads.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import Sharding

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_OTHERS = ("out_proj", "fc1", "fc2")
_LANES = 128
_TALL_TILES = ((16, 128), (2, 1))  # pairs of bfloat16 rows share registers' 32 bits


def names_in(path: Sequence[object]) -> set[object]:
    """Names of modules and parameter in a weight's path in the model's state."""
    return {getattr(key, "key", getattr(key, "name", key)) for key in path}


def tpu_format(path: Sequence[object], leaf: jax.Array | jax.ShapeDtypeStruct) -> Format | Sharding:
    """The `Format` of a weight, by its path in the model's state: its sharding, with a layout where it needs one. Pure.

    Args:
        leaf: with a sharding.
    """
    names = names_in(path)
    is_projection = bool(names.intersection(_PROJECTIONS))
    if "kernel" not in names or not (is_projection or names.intersection(_OTHERS)):
        return leaf.sharding
    order = tuple(range(leaf.ndim))
    if is_projection:
        order = (0, 2, 1, 3) if leaf.shape[-1] % _LANES == 0 else (0, 2, 3, 1)
    chip = next(iter(leaf.sharding.device_set)).device_kind
    if "7x" in chip and leaf.dtype == jnp.bfloat16:
        return Format(Layout(order, tiling=_TALL_TILES), leaf.sharding)
    return Format(Layout(order), leaf.sharding) if is_projection else leaf.sharding
