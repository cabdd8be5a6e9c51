"""Prefill chunks over cached prefixes of both kinds, and among their own tokens, by the kernels and by XLA."""

from dataclasses import asdict
from functools import partial
from typing import Any

from apt_jax.pallas_kernels.bench.chunk_runs import Chunk, ChunkResult, implementations, run_one
from experiments.device_check.attention import LIMIT_S, NotMeasured
from experiments.device_check.session import Session


def run(session: Session) -> None:
    """Kernels first, XLA after them."""
    sizes = session.sizes
    for by in ("kernel", "xla"):
        for tokens, cached in sizes.chunks:
            for kind, length in (("kv", cached), ("hidden", cached), ("own", 0)):
                found = implementations(session.device, over_prefix=length > 0, kind=kind, interpreted=True)
                if by in found:
                    base = ChunkResult(
                        sizes.chunk_model, tokens, 1, by, length, kind=kind if length else "kv"
                    )  # fmt: skip
                    name = f"{kind} {by} {base.model} {tokens} over {length}"
                    session.check(name, partial(_measure, base, found[by]), limit_s=LIMIT_S)


def _measure(base: ChunkResult, run: Chunk) -> dict[str, Any]:
    found = run_one(base, run)
    if found.error is not None:
        raise NotMeasured(found.error)
    assert found.times is not None
    return {**asdict(found), "flops_per_s": found.flops / found.times.median_s}
