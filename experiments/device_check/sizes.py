"""What is measured on a GPU, and its small form on a CPU, where kernels are interpreted."""

from dataclasses import dataclass
from typing import Literal

from apt_jax.engine_config import EngineConfig
from apt_jax.pallas_kernels.bench.kernel_counts import Shape

Platform = Literal["gpu", "cpu"]


@dataclass(frozen=True)
class Serving:
    """Load on the engine: two policies at two rates, the higher first."""

    rates: tuple[float, float]
    arrivals_s: float
    cache_bytes: int
    """What the scheduler may use of the pool, with all layers."""
    ttft_slo_s: float
    tbt_slo_s: float


@dataclass(frozen=True)
class Sizes:
    """All sizes of one form of the check.

    Attributes:
        checked: heads and head size of the shapes whose kernels are compared with the references.
        numbers: their number types; int8 is that of the cache, of bfloat16 queries.
        block_size, int8_block_size: tokens of a block of a 16-bit and of an int8 cache.
        decodes: decode attention; a few batches and contexts, the most telling first.
        chunks: tokens of a chunk, and cached tokens before it.
        layers: of the engine's model, few and all: decode steps are compiled layer by layer on a GPU, so few say
            soon what a layer costs, and all come if time is left for them.
        options: of the engine, whose programs the stages "steps" and "serving" share.
        decode_rows: padded shapes of decode steps besides the largest.
        prefill_tokens: those of prefill steps, likewise.
        steps: batch and context of decode steps.
        patience: factor of time limits of single measurements.
    """

    checked: tuple[tuple[int, int], ...]
    numbers: tuple[str, ...]
    block_size: int
    int8_block_size: int
    decodes: tuple[Shape, ...]
    chunk_model: str
    chunks: tuple[tuple[int, int], ...]
    model: str
    layers: tuple[int, int]
    options: EngineConfig
    decode_rows: tuple[int, ...]
    prefill_tokens: tuple[int, ...]
    steps: tuple[tuple[int, int], ...]
    serving: Serving
    patience: float = 1.0


_BLOCK_BYTES = 16 * 5120 * 2 * 40  # of OPT-13B: 16 tokens, 16 bits, all layers

GPU = Sizes(
    checked=((40, 128), (12, 64)),  # OPT-13B and OPT-125M
    numbers=("bfloat16", "int8", "float32"),
    block_size=16,
    int8_block_size=64,
    decodes=(Shape("opt-13b", 32, 1024), Shape("opt-13b", 128, 1024), Shape("opt-13b", 8, 2048)),
    chunk_model="opt-13b",
    chunks=((512, 1024), (16, 1024)),
    model="opt-13b",
    layers=(4, 40),
    options=EngineConfig(
        dtype="bfloat16", max_model_len=2048, max_num_seqs=64, max_num_batched_tokens=512, block_size=16,
        num_blocks=24_000_000_000 // _BLOCK_BYTES, seed=0,
    ),
    decode_rows=(),
    prefill_tokens=(),
    steps=((64, 256), (64, 448), (32, 896)),
    serving=Serving(
        rates=(12.0, 9.0), arrivals_s=15.0, cache_bytes=10_000_000_000, ttft_slo_s=1.0, tbt_slo_s=1.0
    ),
)  # fmt: skip
CPU = Sizes(
    checked=((2, 64),),
    numbers=("bfloat16", "int8"),
    block_size=16,
    int8_block_size=32,
    decodes=(Shape("opt-125m", 1, 40),),
    chunk_model="opt-125m",
    chunks=((8, 24),),
    model="opt-125m",
    layers=(2, 12),
    options=EngineConfig(
        dtype="float32", max_model_len=128, max_num_seqs=4, max_num_batched_tokens=64, block_size=16, num_blocks=64
    ),
    decode_rows=(),
    prefill_tokens=(),
    steps=((2, 32),),
    serving=Serving(
        rates=(4.0, 2.0), arrivals_s=2.0, cache_bytes=32 * 589_824, ttft_slo_s=5.0, tbt_slo_s=5.0
    ),
    patience=10.0,
)  # fmt: skip
SIZES: dict[Platform, Sizes] = {"gpu": GPU, "cpu": CPU}
