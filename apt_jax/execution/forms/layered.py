"""A step as one call for each layer, whose weights are separate arrays: for a CPU.

XLA's CPU backend copies a layer's part of stacked weights. One program serves all layers, so it also compiles once.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Compiled

from apt_jax.attention.pool import Pool
from apt_jax.attention.ranges import measuring_attention, no_ranges
from apt_jax.batching.arrays import Rows, Tokens
from apt_jax.batching.buckets import Bucket
from apt_jax.execution.arguments import Arguments, abstract
from apt_jax.execution.compiler import Compiler, temporary_bytes
from apt_jax.execution.forms.interface import Conversion, Ranges, Step
from apt_jax.execution.pool import convert_layer
from apt_jax.execution.steps import StepOutput, end_step, run_layer, start_step
from apt_jax.execution.weights.layout import ModuleArrays, Weights
from apt_jax.pallas_kernels.dispatch import Kernels


@dataclass(frozen=True)
class LayeredForm:
    """See `Form`."""

    weights: Weights
    arguments: Arguments
    kernels: Kernels | None
    compiler: Compiler
    pads: bool = True

    @property
    def layers(self) -> list[ModuleArrays]:
        """The weights' arrays of each layer."""
        assert self.weights.layers is not None
        return self.weights.layers

    def compile_step(self, bucket: Bucket, num_blocks: int) -> Step:
        """See `Form`."""
        arguments, decodes, weights = self.arguments, bucket.decode_only, self.weights
        first, outer, compile_program = self.layers[0], weights.outer.arrays, self.compiler.compile

        def start(
            arrays: list[jax.Array], history: jax.Array, tokens: Tokens, rows: Rows
        ) -> tuple[jax.Array, jax.Array]:
            return start_step(weights.model(arrays), history, tokens, rows)

        def layer(
            arrays: list[jax.Array], pool: Pool, x: jax.Array, index: jax.Array, tokens: Tokens, rows: Rows
        ) -> tuple[jax.Array, Pool]:
            return run_layer(
                first.module(arrays), arguments.shapes.kinds, num_blocks, decodes, pool, x, index, tokens, rows,
                self.kernels,
            )  # fmt: skip

        def end(
            arrays: list[jax.Array], x: jax.Array, rows: Rows, outside: jax.Array | None
        ) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
            last, every = end_step(weights.model(arrays), decodes, arguments.buckets.max_rows, x, rows)
            return last, every, None if outside is None else outside[0, 0, 0]

        x, tokens, rows = arguments.residual(bucket.tokens), arguments.tokens(bucket), arguments.rows(bucket)
        return LayeredStep(
            compile_program(f"start {bucket}", start, outer, arguments.history(), tokens, rows, donate=(1,)),
            compile_program(
                f"layer {bucket} {num_blocks}", layer, first.arrays, arguments.pool(num_blocks), x, arguments.numbers(),
                tokens, rows, donate=(1, 2),
            ),
            compile_program(f"end {bucket}", end, outer, x, rows, arguments.pool(num_blocks).outside),
            weights,
        )  # fmt: skip

    def compile_conversion(self, num_blocks: int) -> Conversion:
        """See `Form`."""
        first, blocks = self.layers[0], self.arguments.numbers(self.arguments.convert_pages)

        def layer(
            arrays: list[jax.Array], pool: Pool, index: jax.Array, hidden_blocks: jax.Array,
            key_blocks: jax.Array, value_blocks: jax.Array,
        ) -> Pool:  # fmt: skip
            return convert_layer(first.module(arrays), pool, index, hidden_blocks, key_blocks, value_blocks, num_blocks)

        program = self.compiler.compile(
            f"convert {num_blocks} layer", layer, first.arrays, self.arguments.pool(num_blocks),
            self.arguments.numbers(), blocks, blocks, blocks, donate=(1,),
        )  # fmt: skip
        return LayeredConversion(program, self.layers)

    def compile_ranges(self, tokens: int) -> Ranges:
        """See `Form`."""
        weights, first, numbers = self.weights, self.layers[0], self.arguments.numbers
        config = self.arguments.model_config

        def embed(arrays: list[jax.Array], ids: jax.Array) -> tuple[jax.Array, jax.Array]:
            x = weights.model(arrays).embed(ids, jnp.arange(tokens, dtype=jnp.int32))
            return x, no_ranges(config.num_hidden_layers, config.hidden_size)

        def layer(
            arrays: list[jax.Array], x: jax.Array, found: jax.Array, index: jax.Array, ids: jax.Array,
            length: jax.Array,
        ) -> tuple[jax.Array, jax.Array]:  # fmt: skip
            return first.module(arrays)(x, measuring_attention(ids, length), found, index)

        ids, found = numbers(tokens), abstract((2, config.num_hidden_layers, config.hidden_size), np.float32)
        start = self.compiler.compile(f"embed {tokens}", embed, weights.outer.arrays, ids)
        program = self.compiler.compile(
            f"ranges {tokens}", layer, first.arrays, self.arguments.residual(tokens), found, numbers(), ids, numbers()
        )

        def measure(ids: np.ndarray, length: np.ndarray) -> jax.Array:
            ids, length = jax.device_put((ids, length))
            x, found = start(weights.outer.arrays, ids)
            for number, one in enumerate(self.layers):
                x, found = program(one.arrays, x, found, jnp.int32(number), ids, length)
            return found

        return measure


class LayeredStep:
    """See `Step`; `start`, `layer` and `end` are compiled from the functions of `steps.py`."""

    def __init__(self, start: Compiled, layer: Compiled, end: Compiled, weights: Weights):
        self.programs = (start, layer, end)
        self.temporary_bytes = max(map(temporary_bytes, self.programs))
        assert weights.layers is not None
        self._outer = weights.outer.arrays
        self._layers = [(one.arrays, jnp.int32(number)) for number, one in enumerate(weights.layers)]

    def __call__(self, pool: Pool, history: jax.Array, tokens: Tokens, rows: Rows) -> StepOutput[jax.Array, Pool]:
        """See `Step`."""
        start, layer, end = self.programs
        tokens, rows = jax.device_put((tokens, rows))
        x, history = start(self._outer, history, tokens, rows)
        for arrays, number in self._layers:
            x, pool = layer(arrays, pool, x, number, tokens, rows)
        last, every, outside = end(self._outer, x, rows, pool.outside)
        return StepOutput(last, pool, history, every, outside)


class LayeredConversion:
    """See `Conversion`."""

    def __init__(self, program: Compiled, layers: list[ModuleArrays]):
        self.programs = (program,)
        self._layers = [(one.arrays, jnp.int32(number)) for number, one in enumerate(layers)]

    def __call__(self, pool: Pool, hidden_blocks: np.ndarray, key_blocks: np.ndarray, value_blocks: np.ndarray) -> Pool:
        """See `Conversion`."""
        blocks = jax.device_put((hidden_blocks, key_blocks, value_blocks))
        for arrays, number in self._layers:
            pool = self.programs[0](arrays, pool, number, *blocks)
        return pool
