"""A step as one program over stacked weights: for accelerators, and for models that are split over devices."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from apt_jax.attention.pool import Pool
from apt_jax.attention.ranges import measuring_attention, no_ranges
from apt_jax.batching.arrays import Rows, Tokens
from apt_jax.batching.buckets import Bucket
from apt_jax.execution.arguments import Arguments
from apt_jax.execution.compiler import Compiler
from apt_jax.execution.forms.interface import Conversion, Ranges, Step, WholeConversion, WholeStep
from apt_jax.execution.platform import Platform
from apt_jax.execution.pool import convert_blocks
from apt_jax.execution.steps import StepOutput, run_step
from apt_jax.execution.weights.layout import Weights
from apt_jax.models.interface import run_layers
from apt_jax.models.sharding import EVERYWHERE, POOL
from apt_jax.pallas_kernels.dispatch import Kernels


@dataclass(frozen=True)
class StackedForm:
    """See `Form`."""

    weights: Weights
    arguments: Arguments
    kernels: Kernels | None
    compiler: Compiler
    pads: bool = True

    def compile_step(self, bucket: Bucket, num_blocks: int) -> Step:
        """See `Form`."""
        weights, arguments = self.weights, self.arguments
        platform, decodes = Platform.of(arguments.device), bucket.decode_only

        def step(
            arrays: list[jax.Array], pool: Pool, history: jax.Array, tokens: Tokens, rows: Rows
        ) -> StepOutput[jax.Array, Pool]:
            return run_step(
                weights.model(arrays), arguments.shapes.kinds, num_blocks, decodes, arguments.buckets.max_rows,
                pool, history, tokens, rows, self.kernels, unroll=decodes and platform.unrolls_decode,
                by_kind=decodes and platform.branches_by_kind,
                slice_lazily=not decodes and platform.slices_lazily and arguments.parallel is None,
            )  # fmt: skip

        program = self.compiler.compile(
            f"step {bucket} {num_blocks}", step, weights.outer.arrays, arguments.pool(num_blocks), arguments.history(),
            arguments.tokens(bucket), arguments.rows(bucket), donate=(1, 2),
            outs=StepOutput(EVERYWHERE, POOL, EVERYWHERE, EVERYWHERE, EVERYWHERE),
        )  # fmt: skip
        return WholeStep(program, weights.outer.arrays)

    def compile_conversion(self, num_blocks: int) -> Conversion:
        """See `Form`."""
        weights, blocks = self.weights, self.arguments.numbers(self.arguments.convert_pages)

        def convert(
            arrays: list[jax.Array], pool: Pool, hidden_blocks: jax.Array, key_blocks: jax.Array,
            value_blocks: jax.Array,
        ) -> Pool:  # fmt: skip
            blocks = hidden_blocks, key_blocks, value_blocks
            return convert_blocks(weights.model(arrays), pool, *blocks, num_blocks, self.kernels)

        program = self.compiler.compile(
            f"convert {num_blocks}", convert, weights.outer.arrays, self.arguments.pool(num_blocks), blocks, blocks,
            blocks, donate=(1,), outs=POOL,
        )  # fmt: skip
        return WholeConversion(program, weights.outer.arrays)

    def compile_ranges(self, tokens: int) -> Ranges:
        """See `Form`."""
        weights, config = self.weights, self.arguments.model_config

        def ranges(arrays: list[jax.Array], ids: jax.Array, length: jax.Array) -> jax.Array:
            model, none = weights.model(arrays), no_ranges(config.num_hidden_layers, config.hidden_size)
            x = model.embed(ids, jnp.arange(tokens, dtype=jnp.int32))
            return run_layers(model.layers, x, measuring_attention(ids, length), none)[1]

        arguments = self.arguments.numbers(tokens), self.arguments.numbers()
        return partial(
            self.compiler.compile(f"ranges {tokens}", ranges, weights.outer.arrays, *arguments), weights.outer.arrays
        )
