"""Steps of int8 weights and int8 pools, compiled for TPUs: no wide copy of a weight, none of the pool, and what fits.

`make test-aot`; without libtpu these are skipped.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from apt_jax.attention.kinds import KindMix
from apt_jax.batching.buckets import Bucket, Buckets
from apt_jax.cache import CacheKind
from apt_jax.checkpoints.skeleton import Skeleton
from apt_jax.execution.arguments import Arguments, Shapes
from apt_jax.execution.compiler import Compiler
from apt_jax.execution.forms.stacked import StackedForm
from apt_jax.execution.pool import block_bytes
from apt_jax.execution.weights.int8 import Int8Choice
from apt_jax.execution.weights.layout import ModuleArrays, Weights, paths_of
from apt_jax.execution.weights.tpu_layouts import tpu_format
from apt_jax.model_config import ModelConfig
from apt_jax.pallas_kernels import dispatch
from tests.aot.test_tpu_steps import made_arrays
from tests.aot.tpu_compiler import MISSING, OPT_SIZES, abstract_mesh, device

if MISSING:
    pytest.skip(MISSING, allow_module_level=True)

CONTEXT, BLOCK_SIZE = 2048, 32
LAYERS = {"6.7B": 32, "13B": 40}
GIB = 2**30
SPARE = GIB // 4  # for what a step takes beside weights and pool; a copy of an int8 pool's scales would not fit
KV, HIDDEN = CacheKind.KV, CacheKind.HIDDEN


def form_of(
    chip: str, size: str, quantization="int8", *, layers=None, rows=32, tokens=256, kinds=(HIDDEN,), cache_dtype="int8"
) -> StackedForm:
    """The form of a step, its weights as shapes that lie as an engine places them; the TPU kernels attend and write."""
    N, H = OPT_SIZES[size]
    config = ModelConfig(
        hidden_size=N * H, num_attention_heads=N, num_hidden_layers=layers or LAYERS[size], ffn_dim=4 * N * H,
        word_embed_proj_dim=N * H, max_position_embeddings=CONTEXT,
    )  # fmt: skip
    skeleton, target = Skeleton.of(config, jnp.dtype("bfloat16")), device(chip)
    choice, sharding = Int8Choice.of(skeleton.model, quantization), SingleDeviceSharding(target)

    def placed(path, leaf, *, is_large=True):
        leaf = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=tpu_format(path, leaf)) if is_large else leaf

    leaves = []
    for path in paths_of(skeleton.model):
        wide = skeleton.shapes[path]
        if choice is None or path not in choice.paths:
            leaves.append(((placed(path, wide),), None))
            continue
        parts = [part for part in choice.shapes(path, wide.shape) if part is not None]
        arrays = tuple(placed(path, part, is_large=part.dtype == np.int8) for part in parts)
        leaves.append((arrays, choice.in_module(path)))
    weights = Weights(ModuleArrays.of(skeleton.model, leaves), None, skeleton.dtype, quantization=quantization)
    shapes = Shapes(rows, CONTEXT, CONTEXT // BLOCK_SIZE, BLOCK_SIZE, KindMix(kinds), cache_dtype)
    buckets = Buckets(max_num_seqs=rows, max_num_batched_tokens=tokens)
    arguments = Arguments(config, shapes, buckets, skeleton.dtype, target, None)
    kernels = dispatch.tpu_kernels("tpu", cores=target.num_cores, interpret=False)
    return StackedForm(weights, arguments, kernels, Compiler(arguments, "tpu", quantization))


def compile_step(form: StackedForm, chip: str, bucket: Bucket, num_blocks: int):
    with abstract_mesh(chip):
        (program,) = form.compile_step(bucket, num_blocks).programs
    return program


@pytest.mark.parametrize("quantization", ["int8", "int8-dynamic"])
@pytest.mark.parametrize(
    ("chip", "size", "decodes"), [("v5e", "6.7B", True), ("v6e", "13B", True), ("v6e", "13B", False)]
)
def test_no_step_makes_a_wide_copy_of_a_weight(chip, size, decodes, quantization):
    form = form_of(chip, size, quantization, layers=3)
    bucket = (form.arguments.buckets.decode if decodes else form.arguments.buckets.prefill)[-1]
    program = compile_step(form, chip, bucket, 256)
    width = math.prod(OPT_SIZES[size])
    assert not (copies := made_arrays(program.as_text(), width**2)), "\n".join(copies)
    print(f"{chip} {size} {bucket} {quantization}: {program.memory_analysis().temp_size_in_bytes / 1e6:.0f} MB")


@pytest.mark.parametrize(("chip", "size", "decodes"), [("v5e", "6.7B", True), ("v6e", "13B", False)])
def test_no_step_copies_an_int8_pool(chip, size, decodes):
    """Rows of both kinds, and conversion; the pool is larger than all that may be beside it."""
    form = form_of(chip, size, layers=2, kinds=(KV, HIDDEN))
    blocks = int(5.4e9 // bytes_of(form)[1])
    bucket = (form.arguments.buckets.decode if decodes else form.arguments.buckets.prefill)[-1]
    with abstract_mesh(chip):
        conversion = form.compile_conversion(blocks)._program
    for program in (compile_step(form, chip, bucket, blocks), conversion):
        memory = program.memory_analysis()
        assert memory.alias_size_in_bytes > 5.2e9, "the pool was not donated"
        assert memory.temp_size_in_bytes < 1e9, "it was copied"


@pytest.mark.parametrize(("chip", "size", "memory"), [("v6e", "13B", 32 * GIB), ("v5e", "6.7B", 16 * GIB)])
def test_what_fits_beside_int8_weights(chip, size, memory):
    """OPT-13B on one v6e and OPT-6.7B on one v5e in 90% of the memory: weights and blocks of either type.

    Steps of 128 requests and chunks of 512 tokens, compiled with the pool that is left beside their temporaries, which
    are first measured with a small pool.
    """
    for quantization, cache_dtype in (("none", "auto"), ("int8", "auto"), ("int8", "int8")):
        form = form_of(chip, size, quantization, rows=128, tokens=512, cache_dtype=cache_dtype)
        weights, one = bytes_of(form)
        steps = form.arguments.buckets.decode[-1], form.arguments.buckets.prefill[-1]
        small = (compile_step(form, chip, step, 128).memory_analysis() for step in steps)
        temporary = max(found.temp_size_in_bytes for found in small)
        blocks = int((0.9 * memory - weights - temporary - SPARE) // one)
        for step in steps:
            found = compile_step(form, chip, step, blocks).memory_analysis()
            beside = found.argument_size_in_bytes - weights - blocks * one
            assert 0 <= beside < SPARE, "more arguments than weights and pool"
            assert found.argument_size_in_bytes + found.temp_size_in_bytes < 0.9 * memory
        print(
            f"{chip} {size} {quantization} {cache_dtype}: weights {weights / GIB:.2f} GiB, temporaries "
            f"{temporary / GIB:.2f} GiB, {blocks * BLOCK_SIZE:,} hidden tokens"
        )


def bytes_of(form: StackedForm) -> tuple[int, int]:
    """Bytes of the weights, and of a block over all layers."""
    arrays = form.weights.outer.arrays
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays), block_bytes(form.arguments.pool(1), 1)
