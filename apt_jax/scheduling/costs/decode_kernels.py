"""What decode attention moves and computes on each device: the implementation that this package runs there, as counts.

A table, not measurements: no accelerator has run these kernels yet. Counts are of one layer. Letters as in
docs/architecture.md; "wide" numbers are a request's absorbed query or its context, N times D (of a KV request D).
docs/cost_model.md explains the terms; the sources are beside the figures.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from apt_jax.cache import CacheKind
from apt_jax.model_config import ModelConfig

NUMBER_BYTES = 2  # bfloat16 or float16
START_S = 4e-3 / 1500  # of one device program after another: docs/log/2026-11-30-gpu-kernels.md, prefill


@dataclass(frozen=True)
class Loops:
    """Programs that XLA starts one after another, in a loop over requests and one over chunks of their tokens.

    Attributes:
        chunk_tokens: cached tokens of one request that a step of the inner loop takes.
        chunk_starts: programs of such a step, its condition included.
        chunk_wide_bytes: bytes moved in such a step for each wide number.
        row_starts: programs of the outer loop's step, without the inner loop's.
    """

    chunk_tokens: int
    chunk_starts: int
    chunk_wide_bytes: float
    row_starts: int


@dataclass(frozen=True)
class DecodeKernel:
    """Decode attention over one cache kind.

    Attributes:
        name: what runs.
        source: where the counts are from.
        passes: times that a cached token's vectors cross the device memory's bus.
        head_bytes: moved for each cached token and head: softmax weights that are written and read.
        own_bytes: moved for each wide number of a request of this kind, by the kernel itself.
        batch_bytes: moved for each wide number of every request that decodes in such an iteration, whatever its kind:
            the products around the kernel are computed for the whole batch.
        value_bytes: moved for each number of a layer's Wv beyond the one read that any iteration has.
        layer_starts: programs of a layer beyond those of a KV layer.
        cycles: instruction bundles for a cached token, by model width D; others are interpolated. Where there are some,
            they stand for the products.
        cycles_per_s: of all cores of the device.
        rate: of its products, as a share of the 16-bit peak.
        loops: where XLA loops.
    """

    name: str
    source: str
    passes: float = 1.0
    head_bytes: float = 0.0
    own_bytes: float = 0.0
    batch_bytes: float = 0.0
    value_bytes: float = 0.0
    layer_starts: int = 0
    cycles: Mapping[int, float] = field(default_factory=dict)
    cycles_per_s: float = 1.0
    rate: float = 1.0
    loops: Loops | None = None

    def token_s(
        self, model: ModelConfig, kind: CacheKind, flops: float, rates: "Rates", number_bytes: float = NUMBER_BYTES
    ) -> float:
        """Seconds of a layer for one cached token, given the FLOPs of its products and the bytes of a cached number."""
        moved = kind.blocks_per_page * model.hidden_size * (kind.spec.number_bytes or number_bytes) * self.passes
        moved += self.head_bytes * model.num_attention_heads
        computing = flops / self.rate / rates.flops_per_s
        if self.cycles:
            computing = self.cycles_of(model.hidden_size) / self.cycles_per_s / rates.devices
        starting = 0.0
        if self.loops is not None:
            moved += self.loops.chunk_wide_bytes * wide_numbers(model, kind) / self.loops.chunk_tokens
            starting = self.loops.chunk_starts * START_S / self.loops.chunk_tokens
        return max(moved / rates.bytes_per_s, computing, starting)

    def own_s(self, model: ModelConfig, kind: CacheKind, token_s: float, rates: "Rates") -> float:
        """Seconds of a layer for one request of this kind, its cached tokens (each `token_s`) not included."""
        own_s = self.own_bytes * wide_numbers(model, kind) / rates.bytes_per_s
        if self.loops is not None:  # the last chunk is half full, on average
            own_s += token_s * self.loops.chunk_tokens / 2
        return own_s

    def batch_s(self, model: ModelConfig, kind: CacheKind, rates: "Rates") -> float:
        """Seconds of a layer for every request that decodes in an iteration with one of this kind."""
        moving = self.batch_bytes * wide_numbers(model, kind) / rates.bytes_per_s
        return max(moving, self.loops.row_starts * START_S) if self.loops is not None else moving

    def layer_s(self, model: ModelConfig, rates: "Rates") -> float:
        """Seconds of a layer in every iteration in which a request of this kind decodes."""
        return self.value_bytes * model.hidden_size**2 / rates.bytes_per_s + self.layer_starts * START_S

    def cycles_of(self, width: int) -> float:
        """Bundles for a cached token of a model of this width; beyond the widths that were counted, in proportion."""
        widths = sorted(self.cycles)
        counted = float(np.interp(width, widths, [self.cycles[w] for w in widths]))
        return counted * width / min(max(width, widths[0]), widths[-1])


@dataclass(frozen=True)
class Rates:
    """What large kernels reach, all devices together."""

    flops_per_s: float
    bytes_per_s: float
    devices: int
    weight_bytes: float = NUMBER_BYTES  # of a number of a projection


def wide_numbers(model: ModelConfig, kind: CacheKind) -> int:
    """Numbers of a request's query as attention over this kind takes it."""
    return model.hidden_size * (model.num_attention_heads if kind.is_projected else 1)


# A query and a result of D numbers, in 16 bits and float32, each written and read.
_KV_BYTES = 2 * 2 + 2 * 4
_COMPILED = "OPT-13B decode step of 64 requests, compiled by tests/aot"

KV = DecodeKernel("one pass", "every vector once; queries and results written and read", own_bytes=_KV_BYTES)

ONE_PASS = DecodeKernel(
    "one pass",
    "what a kernel needs that reads every vector once: q' in 16 bits and the context in float32, each written and read "
    "once (docs/log/2026-11-30-gpu-kernels.md, floors)",
    own_bytes=2 + 4,
    batch_bytes=2 + 4,
)

RECOMPUTE = DecodeKernel("recompute", "keys and values projected again from vectors read once (arXiv 2504.07494)")

TWO_PASSES = DecodeKernel(
    "Mosaic GPU, two passes (pallas_kernels/gpu/hidden_decode.py)",
    f"{_COMPILED}/test_gpu_steps.py for an H200: both passes read the vectors (what L2 keeps between them is not "
    "credited), weights of 16 bits are written and read; q' in 16 bits, the context in float32; Wv is written and "
    "read as float32; 21 programs a layer against 17",
    passes=2.0,
    head_bytes=2 + 2,
    own_bytes=2 + 4,
    batch_bytes=2 + 4,
    value_bytes=4 + 4,
    layer_starts=4,
)

XLA_AMPERE = DecodeKernel(
    "XLA (apt_jax/attention/xla.py: hidden_decode)",
    f"{_COMPILED}/test_gpu_steps.py for an A100, without a hidden kernel: the chunk is gathered (read and written) and "
    "read by both products, which are in float32 (TF32, half of the 16-bit rate: NVIDIA A100 datasheet); a step of the "
    "inner loop reads q' and writes, reads and adds float32 contexts; the outer loop visits every row of the batch; "
    "Wv is written and read as float32",
    passes=4.0,
    batch_bytes=4 + (4 + 4) + 4 + (4 + 4) + 4 + 4,  # q'; its row; zeros; the row's context; all zeros; read by Wv
    value_bytes=4 + 4,
    rate=0.5,
    loops=Loops(chunk_tokens=128, chunk_starts=12, chunk_wide_bytes=4 + 4 + (4 + 4 + 4), row_starts=11),
)

SLICES_GPU = DecodeKernel(
    "XLA, vectors split along D (apt_jax/attention/hidden_slices.py)",
    "docs/log/2026-11-30-tensor-parallelism.md: gathered vectors are a buffer, written and read twice; q' and the "
    "context in 16 bits",
    passes=4.0,
    batch_bytes=2 + 2 + 2 + 2,
)
SLICES_TPU = DecodeKernel(
    "XLA, vectors split along D (apt_jax/attention/hidden_slices.py)",
    "docs/log/2026-11-30-tensor-parallelism.md: gathered straight into VMEM; q' and the context in 16 bits",
    batch_bytes=2 + 2 + 2 + 2,
)


# -- TPU: bundles by width (`apt-jax bench kernels`, libtpu 0.0.50); cores and clock as there --------------------------

_BUNDLES = "bundles of the loop over full chunks: docs/log/2026-11-30-tpu-kernels.md and `apt-jax bench kernels`"
_TRAFFIC = (
    "q' and context in 16 bits; XLA copies q' into another order. All of it is counted as crossing HBM, an "
    "upper bound: in batches of up to 128 requests XLA keeps most of it in VMEM (all on v5e, all but the copy on v6e)"
)


def _kv_tpu(cycles_per_s: float, cycles: Mapping[int, float]) -> DecodeKernel:
    return DecodeKernel(
        "Pallas TPU (pallas_kernels/tpu/kv_decode.py)",
        f"{_BUNDLES}; queries and results written and read",
        own_bytes=_KV_BYTES,
        cycles=cycles,
        cycles_per_s=cycles_per_s,
    )


def _hidden_tpu(cycles_per_s: float, cycles: Mapping[int, float]) -> DecodeKernel:
    return DecodeKernel(
        "Pallas TPU, wide heads (pallas_kernels/tpu/hidden_decode.py)",
        f"{_BUNDLES}; {_COMPILED}/test_tpu_steps.py: {_TRAFFIC}",
        own_bytes=2 + 2,
        batch_bytes=2 + (2 + 2) + 2,
        cycles=cycles,
        cycles_per_s=cycles_per_s,
    )


KV_V5E, HIDDEN_V5E = _kv_tpu(1.5e9, {4096: 9.0, 5120: 9.9}), _hidden_tpu(1.5e9, {4096: 7.9, 5120: 10.5})
KV_V5P, HIDDEN_V5P = _kv_tpu(2 * 1.75e9, {4096: 8.9, 5120: 10.0}), _hidden_tpu(2 * 1.75e9, {4096: 8.0, 5120: 10.6})
KV_V6E, HIDDEN_V6E = _kv_tpu(1.75e9, {4096: 7.7, 5120: 8.5}), _hidden_tpu(1.75e9, {4096: 5.7, 5120: 7.1})
KV_TPU7X, HIDDEN_TPU7X = _kv_tpu(2 * 1.91e9, {5120: 7.6}), _hidden_tpu(2 * 1.91e9, {5120: 8.1})
