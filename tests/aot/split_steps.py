"""Steps of a model that is split over devices, compiled for a mesh of devices that are not there.

The layers run in a loop, so two of them have the program of all 48 or 64; on GPUs decode steps are unrolled, where two
layers have two of everything.
"""

import dataclasses
import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from apt_jax.attention.kinds import KindMix
from apt_jax.attention.pool import Pool
from apt_jax.batching.arrays import Rows, Tokens
from apt_jax.cache import CacheKind
from apt_jax.execution.pool import convert_blocks, pool_shape
from apt_jax.execution.steps import StepOutput, run_step
from apt_jax.models.collectives import AXIS
from apt_jax.models.opt import OPT
from apt_jax.models.sharding import EVERYWHERE, POOL, Parallel
from apt_jax.pallas_kernels.dispatch import Kernels
from apt_jax.scheduling.costs.hardware import MODELS

LAYERS, BLOCK_SIZE, CONTEXT_TOKENS = 2, 16, 2048
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program for each of `devices`."""

    program: Any
    pool: jax.ShapeDtypeStruct
    weight_bytes: int  # on each device
    devices: int

    @property
    def pool_bytes(self) -> int:
        """On each device."""
        return int(np.prod(self.pool.shape)) * 2 // self.devices

    def collectives(self) -> Counter[tuple[str, str]]:
        """How often each (kind, type of its result) is in the program; loops count once."""
        found: Counter[tuple[str, str]] = Counter()
        for line in self.program.as_text().splitlines():
            match = re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(", line)
            if match:
                found[match[2], re.sub(r"\{[^}]*\}", "", match[1])] += 1
        return found

    def check(self, temporaries: float) -> None:
        """The pool that comes out is the one that went in; nothing of its size is copied, gathered or kept beside it.

        `temporaries`: the most bytes that a device may keep beside pool and weights.
        """
        memory = self.program.memory_analysis()
        assert memory.alias_size_in_bytes >= self.pool_bytes, "the pool was not donated"
        used = memory.temp_size_in_bytes
        assert used < temporaries, f"{used / 1e6:.0f} MB of temporaries, the pool is {self.pool_bytes / 1e6:.0f} MB"
        rows, _, width = self.pool.shape
        pool = rf"bf16\[{rows},{BLOCK_SIZE},({width}|{width // self.devices})\]"
        copies = [line for line in self.program.as_text().splitlines() if re.search(rf"{pool}\S* (copy|all-)", line)]
        assert not copies, copies[0]

    def report(self, name: str) -> None:
        """Print figures of a device, and collectives."""
        memory = self.program.memory_analysis()
        sizes = [x / 1e6 for x in (self.weight_bytes, self.pool_bytes, memory.temp_size_in_bytes)]
        print(f"{name}: MB on each of {self.devices} devices: weights {sizes[0]:.0f}, pool {sizes[1]:.0f}, "
              f"temporaries {sizes[2]:.1f}")  # fmt: skip
        for (kind, result), count in sorted(self.collectives().items()):
            print(f"    {count} x {kind} {result}")


def compile_split(
    devices: list[Any],
    model: str,
    kinds: KindMix,
    *,
    rows: int = 32,
    tokens: int | None = None,
    kernels: Kernels | None = None,
    unroll: bool = False,
    convert: bool = False,
) -> Compiled:
    """A decode step of `rows` requests (or a prefill step of `tokens`, or the conversion) of two layers of `model`."""
    config = dataclasses.replace(MODELS[model], num_hidden_layers=LAYERS)
    parallel = Parallel(Mesh(np.array(devices), (AXIS,)), CacheKind.HIDDEN in kinds)
    parallel.check(config)
    count = parallel.num_devices
    num_blocks = 8192 * count
    graphdef, state = nnx.split(nnx.eval_shape(lambda: OPT(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))))
    leaves, tree = jax.tree.flatten(state)
    paths = [tuple(map(str, path)) for path, _ in nnx.to_flat_state(state)]
    assert len(paths) == len(leaves)
    weights = [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=parallel.weight_sharding(path, leaf.shape))
        for path, leaf in zip(paths, leaves, strict=True)
    ]
    pool = jax.ShapeDtypeStruct(
        pool_shape(config, num_blocks, BLOCK_SIZE), jnp.bfloat16, sharding=NamedSharding(parallel.mesh, POOL)
    )

    def shape(*sizes: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    def merged(weights: list[jax.Array]) -> OPT:
        return nnx.merge(graphdef, jax.tree.unflatten(tree, weights))

    if convert:

        def program(weights, pool, hidden_blocks, key_blocks, value_blocks):  # type: ignore[no-untyped-def]
            return convert_blocks(merged(weights), Pool(pool), hidden_blocks, key_blocks, value_blocks, num_blocks)

        args, outs, donate = (pool, shape(16), shape(16), shape(16)), POOL, (1,)
    else:

        def program(weights, pool, history, tokens, rows):  # type: ignore[no-untyped-def]
            return run_step(merged(weights), kinds, num_blocks, decode_only, R, Pool(pool), history, tokens, rows,
                            kernels, unroll=unroll)  # fmt: skip

        R, T, decode_only = rows, tokens or rows, tokens is None
        table = shape(R, CONTEXT_TOKENS // BLOCK_SIZE)
        args = (
            pool, shape(R, CONTEXT_TOKENS),
            Tokens(shape(T), shape(T, dtype=jnp.bool_), shape(T), shape(T)),
            Rows(*(shape(R) for _ in range(7)), (table, table)),
        )  # fmt: skip
        outs, donate = StepOutput(EVERYWHERE, POOL, EVERYWHERE, EVERYWHERE), (1, 2)
    split, args = parallel.split_program(program, weights, args, outs)
    compiled = jax.jit(split, donate_argnums=donate).lower(weights, *args).compile()
    weight_bytes = sum(int(np.prod(w.sharding.shard_shape(w.shape))) * 2 for w in weights)
    return Compiled(compiled, pool, weight_bytes, count)
