"""Whole steps with the TPU kernels, compiled for every chip: nothing copies the pool or a weight.

`make test-aot`; without libtpu these are skipped.
"""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import SingleDeviceSharding

from apt_jax.attention.kinds import KindMix
from apt_jax.attention.pool import Pool
from apt_jax.batching.arrays import Rows, Tokens
from apt_jax.cache import CacheKind
from apt_jax.execution.pool import convert_blocks
from apt_jax.execution.steps import run_step
from apt_jax.execution.weights.tpu_layouts import tpu_format
from apt_jax.model_config import ModelConfig
from apt_jax.models.opt import OPT
from apt_jax.pallas_kernels import dispatch
from tests.aot.tpu_compiler import MISSING, OPT_SIZES, TOPOLOGIES, compile_for, device

if MISSING:
    pytest.skip(MISSING, allow_module_level=True)

CHIPS = pytest.mark.parametrize("chip", list(TOPOLOGIES))
BLOCK_SIZE, ROWS, CONTEXT = 16, 32, 2048


def shape(*sizes: int, dtype=jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype))


class Model:
    """An OPT of some layers, and a pool of 5.4 GB: more than all that a step may keep beside it."""

    def __init__(self, size: str, num_layers: int = 2):
        N, H = OPT_SIZES[size]
        self.width = N * H
        self.num_blocks = 5_400_000_000 // (num_layers * BLOCK_SIZE * self.width * 2)
        config = ModelConfig(
            hidden_size=N * H, num_attention_heads=N, num_hidden_layers=num_layers, ffn_dim=4 * N * H,
            word_embed_proj_dim=N * H, max_position_embeddings=CONTEXT,
        )  # fmt: skip
        self.graphdef, self.weights = nnx.split(
            nnx.eval_shape(lambda: OPT(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
        )
        self.pool = shape(num_layers * self.num_blocks, BLOCK_SIZE, N * H, dtype=jnp.bfloat16)

    def placed(self, chip: str):
        """Shapes of the weights, as they lie on the chip."""
        sharding = SingleDeviceSharding(device(chip))

        def place(path, leaf):
            leaf = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=tpu_format(path, leaf))

        return jax.tree.map_with_path(place, self.weights)


def compile_step(model: Model, chip: str, kinds: KindMix, *, num_tokens: int | None = None):
    """As `Runner` compiles it; a decode step without `num_tokens`."""
    decode_only, num_tokens = num_tokens is None, num_tokens or ROWS
    kernels = dispatch.tpu_kernels("tpu", cores=device(chip).num_cores, interpret=False)

    def step(weights, pool, history, tokens, rows):
        return run_step(
            nnx.merge(model.graphdef, weights), kinds, model.num_blocks, decode_only, ROWS, Pool(pool), history, tokens,
            rows,
            kernels, by_kind=decode_only, slice_lazily=not decode_only,
        )  # fmt: skip

    number, flag = functools.partial(shape, dtype=jnp.int32), functools.partial(shape, dtype=jnp.bool_)
    tokens = Tokens(number(num_tokens), flag(num_tokens), number(num_tokens), number(num_tokens))
    table = number(ROWS, CONTEXT // BLOCK_SIZE)
    rows = Rows(*(number(ROWS) for _ in range(7)), (table, table))
    history = number(ROWS, CONTEXT)
    return compile_for(chip, step, model.placed(chip), model.pool, history, tokens, rows, donate=(1, 2))


def in_place(program, model: Model) -> None:
    """The pool that comes out is the one that went in, and there is no other of its size."""
    memory = program.memory_analysis()
    pool_bytes = model.pool.size * 2
    assert memory.alias_size_in_bytes >= pool_bytes, "the pool was not donated"
    assert memory.temp_size_in_bytes < pool_bytes / 3, f"{memory.temp_size_in_bytes=}, the pool is {pool_bytes}"
    pool_type = "bf16[" + ",".join(map(str, model.pool.shape)) + "]"
    copies = [line for line in program.as_text().splitlines() if re.search(re.escape(pool_type) + r"\S* copy", line)]
    assert not copies, copies[0]


def made_arrays(text: str, smallest: int) -> list[str]:
    """Instructions outside of fusions that write an array of `smallest` numbers or more to HBM (not to VMEM, S(1))."""
    fused = set(re.findall(r" fusion\(.*calls=%([\w.-]+)", text))
    writes = re.compile(r"^\s*(?:ROOT )?%\S+ = \(?(?:bf16|f32)\[([0-9,]+)\](\S*) .*?([\w-]+)\(")
    reads = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "custom-call"}
    found, computation = [], ""
    for line in text.splitlines():
        if header := re.match(r"^(?:ENTRY )?%(\S+) \(", line):
            computation = header[1]
        elif computation not in fused and (match := writes.match(line)) and match[3] not in reads:
            if "S(1)" in match[2]:
                continue
            sizes = [int(size) for size in match[1].split(",")]
            if functools.reduce(lambda a, b: a * b, sizes) >= smallest:
                found.append(line.strip())
    return found


@pytest.mark.parametrize(
    ("chip", "size", "num_tokens"),
    [
        ("v5e", "13B", None), ("v5p", "1.3B", None), ("v6e", "2.7B", None), ("tpu7x", "13B", None),
        ("tpu7x", "2.7B", None), ("v5e", "13B", 256), ("v6e", "2.7B", 256), ("tpu7x", "13B", 256),
    ],
)  # fmt: skip
def test_no_step_copies_the_pool_or_a_weight(chip, size, num_tokens):
    """Heads of 128, 64 and 80 columns, decoding or with prefill chunks; rows of both kinds.

    A decode step has layers for KV rows, for hidden rows and for both. What a step writes, beside the pool, is smaller
    than the smallest matrix of a layer; of the keys and values of a prefix projected anew a step may keep one row's.
    """
    model = Model(size, num_layers=3)
    program = compile_step(model, chip, KindMix((CacheKind.KV, CacheKind.HIDDEN)), num_tokens=num_tokens)
    in_place(program, model)
    text, matrix = program.as_text(), model.width**2
    kept = f"[{model.pool.shape[0]},", f"[2,{CONTEXT // BLOCK_SIZE},{BLOCK_SIZE},"
    copies = [line for line in made_arrays(text, matrix) if not any(shape in line for shape in kept)]
    assert not copies, "\n".join(copies)
    # decoding: for either kind, and both, attention and the cache writes; else kernels for prefixes, single tokens, the
    # chunks themselves, and the cache writes
    assert text.count("tpu_custom_call") >= (7 if num_tokens is None else 6)
    temporaries = program.memory_analysis().temp_size_in_bytes
    print(f"{chip} {size} {num_tokens or 'decode'}: temporaries {temporaries / 1e6:.0f} MB")
    wide_query = 4 * ROWS * OPT_SIZES[size][0] * model.width
    written = 4 * (num_tokens or ROWS) * model.width  # keys and values
    assert temporaries < (max(2 * matrix, 3 * wide_query) if num_tokens is None else 8 * matrix) + written


@CHIPS
def test_conversion_does_not_copy_the_pool(chip):
    model = Model("13B")

    def convert(weights, pool, hidden_blocks, key_blocks, value_blocks):
        layers = nnx.merge(model.graphdef, weights)
        return convert_blocks(layers, Pool(pool), hidden_blocks, key_blocks, value_blocks, model.num_blocks)

    in_place(
        compile_for(chip, convert, model.placed(chip), model.pool, shape(16), shape(16), shape(16), donate=(1,)), model
    )
