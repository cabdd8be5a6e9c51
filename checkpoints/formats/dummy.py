"""Random weights, drawn on the devices they stay on: nothing is read and nothing crosses from the host."""

import jax
import jax.numpy as jnp
import numpy as np

from apt_jax.checkpoints.skeleton import Skeleton
from apt_jax.execution.weights.layout import Placed, WeightLayout
from apt_jax.models.sharding import padded_shape

_STDDEV = 0.02  # of the model's own initialisers
_DRAWN_AT_ONCE = 2**22  # numbers; keeps the scratch memory of the draw small compared with the weights


def random_parameters(skeleton: Skeleton, seed: int, layout: WeightLayout) -> dict[tuple[str, ...], Placed]:
    """Draw kernels and embeddings from a normal distribution in one jitted program; scales are 1 and biases 0.

    The device's own generator is used: the numbers depend on the seed and on the kind of device.
    """
    paths = list(skeleton.shapes)
    entropy = np.random.SeedSequence(seed)
    placed = [layout.final_sharding(path, a.shape) for path, a in skeleton.shapes.items()]
    shapes = [padded_shape(a.shape, place) for a, place in zip(skeleton.shapes.values(), placed, strict=True)]
    # Key data from the host, one key a block: splitting keys inside the program triples its compile time.
    keys = [
        child.generate_state(4 * _blocks(shape)).reshape(-1, 4)
        for child, shape in zip(entropy.spawn(len(shapes)), shapes, strict=True)
    ]
    leaves = tuple((path[-1], shape) for path, shape in zip(skeleton.shapes, shapes, strict=True))
    # what is quantised is drawn one by one, so that only one of these is wide at a time
    parts = [[i] for i, path in enumerate(paths) if layout.is_int8(path)]
    parts.append([i for i, path in enumerate(paths) if not layout.is_int8(path)])
    result = {}
    for part in parts:
        draw = jax.jit(_draw_all, static_argnums=(1, 2), out_shardings=[placed[i] for i in part])
        chosen = tuple(leaves[i] for i in part)
        drawn = jax.block_until_ready(draw([keys[i] for i in part], chosen, skeleton.dtype))
        for i in reversed(part):
            result[paths[i]] = layout.place(paths[i], drawn.pop())
    return result


def _blocks(shape: tuple[int, ...]) -> int:
    """The least number of equal parts of axis 0 such that none has more than `_DRAWN_AT_ONCE` numbers, if any."""
    most = max(1, _DRAWN_AT_ONCE // int(np.prod(shape[1:])))
    return next(n for n in range(1, shape[0] + 1) if shape[0] % n == 0 and (shape[0] // n <= most or n == shape[0]))


def _draw_all(
    keys: list[jax.Array], leaves: tuple[tuple[str, tuple[int, ...]], ...], dtype: np.dtype
) -> list[jax.Array]:
    return [_draw(key_data, leaf, shape, dtype) for key_data, (leaf, shape) in zip(keys, leaves, strict=True)]


def _draw(key_data: jax.Array, leaf: str, shape: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    if leaf in ("bias", "scale"):
        return jnp.full(shape, 1 if leaf == "scale" else 0, dtype)
    block = (shape[0] // len(key_data), *shape[1:])

    def draw_block(data: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(data, impl="unsafe_rbg")
        return jax.random.normal(key, block, dtype) * jnp.asarray(_STDDEV, dtype)

    return jax.lax.map(draw_block, key_data).reshape(shape)
