"""All layers of a step on a CPU by one C++ call (`cpu_kernels/layers.h`), instead of a program for each layer.

Between the matrix products of one layer XLA runs small programs and wakes its threads anew, which takes as long as a
fifth of the products of one row (docs/log/2026-11-30-performance.md).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from apt_jax.attention.pool import Pool
from apt_jax.batching.arrays import DecodeInput, Rows, Tokens
from apt_jax.batching.buckets import Bucket
from apt_jax.cpu_kernels.calls import Coded, LayersShape, all_layers, all_layers_int8
from apt_jax.cpu_kernels.packed import PackedKernel
from apt_jax.cpu_kernels.packed_int8 import PackedInt8Kernel
from apt_jax.execution.forms.interface import Iterations, Step, WholeStep
from apt_jax.execution.forms.iterations import run_iterations
from apt_jax.execution.forms.layered import LayeredForm
from apt_jax.execution.steps import StepOutput, count_of, end_step, start_step
from apt_jax.execution.weights.layout import Weights
from apt_jax.model_config import ModelConfig
from apt_jax.models.interface import Model
from apt_jax.models.kernels import Kernel, RowScaledKernel, kernel_of
from apt_jax.models.linear import Linear
from apt_jax.models.opt import DecoderLayer

_KEYS_PACKED, _HIDDEN_AT_ONCE = 4096, 64  # as kKeysPacked and kHiddenAtOnce in layers.h
_DTYPES = (jnp.float32, jnp.bfloat16)  # that the C++ call computes in


@dataclass(frozen=True)
class NativeForm(LayeredForm):
    """See `Form`; only steps and iterations are native, a conversion is layered."""

    pads: bool = False

    @staticmethod
    def takes(weights: Weights) -> bool:
        """Whether the C++ call implements these layers, and their kernels are packed for it."""
        if weights.layers is None or weights.dtype not in _DTYPES:
            return False
        layer = weights.layers[0].module(weights.layers[0].arrays)
        if not isinstance(layer, DecoderLayer) or layer.activation != "relu":
            return False
        return all(isinstance(_unscaled(own)[0], PackedKernel | PackedInt8Kernel) for own in _linears(layer))

    def compile_step(self, bucket: Bucket, num_blocks: int) -> Step:
        """See `Form`."""
        arguments = self.arguments

        def native(
            arrays: list[jax.Array], pool: Pool, history: jax.Array, tokens: Tokens, rows: Rows
        ) -> StepOutput[jax.Array, Pool]:
            return self._step(bucket, num_blocks, arrays)(pool, history, tokens, rows)

        program = self.compiler.compile(
            f"native {bucket} {num_blocks}", native, self._arrays, arguments.pool(num_blocks), arguments.history(),
            arguments.tokens(bucket), arguments.rows(bucket), donate=(1, 2),
        )  # fmt: skip
        is_quantised = self.weights.quantization != "none"
        scratch = scratch_bytes(arguments.model_config, bucket.tokens, bucket.rows, is_quantised=is_quantised)
        return WholeStep(program, self._arrays, scratch)

    def compile_iterations(self, bucket: Bucket, num_blocks: int, sample_rows: int) -> Iterations:
        """Compile decode iterations of a bucket and the sampling of so many rows; no other form has them."""
        arguments, arrays = self.arguments, self._arrays

        def iterations(
            arrays: list[jax.Array], pool: Pool, history: jax.Array, first: DecodeInput, allowed: jax.Array,
            relay: jax.Array,
        ) -> tuple[Pool, jax.Array, jax.Array]:  # fmt: skip
            step, model = self._step(bucket, num_blocks, arrays), self.weights.model(arrays[: self._num_outer])
            return run_iterations(step, model, pool, history, first, allowed, relay)

        program = self.compiler.compile(
            f"iterations {bucket} {num_blocks}", iterations, arrays, arguments.pool(num_blocks), arguments.history(),
            arguments.decode_input(bucket, sample_rows), arguments.allowed(sample_rows), arguments.numbers(1),
            donate=(1, 2),
        )  # fmt: skip
        return partial(program, arrays)

    @property
    def _arrays(self) -> list[jax.Array]:
        return [*self.weights.outer.arrays, *(array for layer in self.layers for array in layer.arrays)]

    @property
    def _num_outer(self) -> int:
        return len(self.weights.outer.arrays)

    def _step(
        self, bucket: Bucket, num_blocks: int, arrays: list[jax.Array]
    ) -> Callable[[Pool, jax.Array, Tokens, Rows], StepOutput[jax.Array, Pool]]:
        """A step with `arrays`, inside a compiled function."""
        outer, first, of_layer = arrays[: self._num_outer], self.layers[0], len(self.layers[0].arrays)
        starts = range(self._num_outer, len(arrays), of_layer)
        modules = [first.module(arrays[start : start + of_layer]) for start in starts]
        return partial(
            run_native_step, self.weights.model(outer), modules, num_blocks, bucket.decode_only,
            self.arguments.buckets.max_rows,
        )  # fmt: skip


def scratch_bytes(config: ModelConfig, tokens: int, rows: int, *, is_quantised: bool = False) -> int:
    """Bytes that the C++ call keeps for a step of this shape: `Step` in layers.h, and packed keys and values."""
    D = config.hidden_size
    of_tokens = tokens * (8 * D + 2 * config.ffn_dim + (6 * D if is_quantised else 0))
    wide = 2 * max(rows, min(tokens, _HIDDEN_AT_ONCE)) * config.num_attention_heads * D  # of hidden rows
    return 4 * (of_tokens + wide + 2 * _KEYS_PACKED * D)


def run_native_step(
    model: Model,
    layers: list[DecoderLayer],
    num_blocks: int,
    decode_only: bool,
    max_rows: int,
    pool: Pool,
    history: jax.Array,
    tokens: Tokens,
    rows: Rows,
) -> StepOutput[jax.Array, Pool]:
    """As `steps.run_step`. Pure; pool and history are to be donated.

    Args:
        model: gives everything outside the layers.
        layers: the modules of all layers, with kernels that are multiplied by `cpu_kernels`.
    """
    x, history = start_step(model, history, tokens, rows)
    first = layers[0]
    parameters = [array for layer in layers for array in _parameters(layer)]
    heads, ffn_dim = first.self_attn.q_proj.outputs[0], first.fc1.outputs[0]
    shape = LayersShape(heads, ffn_dim, num_blocks, first.norm_first, _dynamic(first))
    if pool.scales is None:
        x, numbers = all_layers(x, pool.numbers, rows, parameters, shape)
        pool = replace(pool, numbers=numbers)
    else:
        outside = jnp.zeros((1, 1, 1), jnp.uint32) if pool.outside is None else pool.outside
        channels = jnp.zeros(0) if pool.channels is None else pool.channels
        own = Coded(pool.numbers, pool.scales, outside)
        x, own = all_layers_int8(x, own, channels, rows, parameters, shape)
        counted = None if pool.outside is None else own.outside
        pool = replace(pool, numbers=own.codes, scales=own.scales, outside=counted)
    last, every = end_step(model, decode_only, max_rows, x, rows)
    return StepOutput(last, pool, history, every, count_of(pool))


def _dynamic(layer: DecoderLayer) -> list[bool]:
    """Whether rows are quantised for the layer's kernels; keys and values of KV rows are as queries are."""

    def of(linear: Linear) -> bool:
        kernel, _ = _unscaled(linear)
        return isinstance(kernel, PackedInt8Kernel) and kernel.dynamic

    q, _, _, out, fc1, fc2 = map(of, _linears(layer))
    return [q, q, q, out, fc1, fc2]


def _linears(layer: DecoderLayer) -> list[Linear]:
    attention = layer.self_attn
    return [attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj, layer.fc1, layer.fc2]


def _parameters(layer: DecoderLayer) -> list[jax.Array]:
    """A layer's parameters in the order that the C++ call takes them in."""
    q, k, v, out, fc1, fc2 = ([*_packed(own), _or_nothing(own.bias)] for own in _linears(layer))
    attention_norm, final_norm = (
        [_or_nothing(norm.scale), _or_nothing(norm.bias)]
        for norm in (layer.self_attn_layer_norm, layer.final_layer_norm)
    )
    return [*attention_norm, *q, *k, *v, *out, *final_norm, *fc1, *fc2]


def _packed(linear: Linear) -> list[jax.Array]:
    """A kernel as it is stored, the scales of its outputs and the factors of its inputs."""
    kernel, factor = _unscaled(linear)
    if isinstance(kernel, PackedInt8Kernel):
        return [kernel.stored, kernel.scale, jnp.zeros(0) if factor is None else factor]
    assert isinstance(kernel, PackedKernel) and factor is None
    return [kernel.stored, jnp.zeros(0), jnp.zeros(0)]


def _unscaled(linear: Linear) -> tuple[Kernel, jax.Array | None]:
    """A projection's kernel without the factors of its inputs, and these."""
    kernel = kernel_of(linear.kernel)
    return (kernel.kernel, kernel.factor) if isinstance(kernel, RowScaledKernel) else (kernel, None)


def _or_nothing(parameter: nnx.Param | None) -> jax.Array:
    return jnp.zeros(0) if parameter is None else parameter[...]
