"""Counted work of one layer's decode attention, and the time it needs by a chip's data sheet.

Counted per layer and step for B requests of L cached tokens, D wide, N heads, 2 bytes a number. Three ways:

* kv: reads K and V.
* hidden: reads the hidden vectors once; queries and results are N times D wide (docs/log/2026-11-30-gpu-kernels.md).
* recompute: reads the hidden vectors and projects each to a key and a value again, as Apt-Serve does.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from apt_jax.scheduling.costs.hardware import HARDWARE, MODELS, Hardware

WAYS = ("kv", "hidden", "recompute")
CHIPS = {
    "h200": "h200", "h100": "h100-80gb", "a100": "a100-80gb",
    "v5e": "tpu-v5e", "v5p": "tpu-v5p", "v6e": "tpu-v6e", "tpu7x": "tpu7x",
}  # fmt: skip
_NUMBER_BYTES, _FLOAT_BYTES = 2, 4


@dataclass(frozen=True)
class Shape:
    """One decode step's attention."""

    model: str
    batch: int
    context_tokens: int

    @property
    def num_heads(self) -> int:
        """N."""
        return MODELS[self.model].num_attention_heads

    @property
    def hidden_size(self) -> int:
        """D."""
        return MODELS[self.model].hidden_size


@dataclass(frozen=True)
class Work:
    """FLOPs, and bytes from and to device memory if every operand is moved once."""

    flops: float
    bytes: float

    def bound_s(self, chip: Hardware) -> float:
        """The roofline: no faster than this at the chip's peaks."""
        return max(self.flops / chip.flops_per_s, self.bytes / chip.bytes_per_s)


def count(shape: Shape, way: str, *, is_coded: bool = False) -> Work:
    """Work of one layer's decode attention in one of `WAYS`. Pure.

    Args:
        is_coded: over an int8 pool: a byte for each number, and a float32 scale for each token, of keys and values for
            each head too.
    """
    tokens = shape.batch * shape.context_tokens
    D, N = shape.hidden_size, shape.num_heads
    key_bytes, hidden_bytes = (D + N * _FLOAT_BYTES, D + _FLOAT_BYTES) if is_coded else (D * _NUMBER_BYTES,) * 2
    narrow_bytes = shape.batch * D * (_NUMBER_BYTES + _FLOAT_BYTES)  # queries in, results out
    match way:
        case "kv":
            return Work(4.0 * tokens * D, 2.0 * tokens * key_bytes + narrow_bytes)
        case "hidden":
            return Work(4.0 * tokens * D * N, 1.0 * tokens * hidden_bytes + N * narrow_bytes)
        case "recompute":
            weights = 2 * D * D * _NUMBER_BYTES
            return Work(4.0 * tokens * D * (D + 1), 1.0 * tokens * hidden_bytes + narrow_bytes + weights)
    raise ValueError(f"unknown {way=}; known: {', '.join(WAYS)}")


def counted_table(shapes: Iterable[Shape], chips: Iterable[str]) -> str:
    """A table of counts and bounds: one row per shape and way, one column pair per chip (of `CHIPS`)."""
    found = [HARDWARE[CHIPS[chip]] for chip in chips]
    head = f"{'model':<9} {'batch':>5} {'context':>7} {'way':<9} {'GFLOP':>9} {'MB':>8} {'FLOP/B':>7}"
    lines = [
        "counted for one layer; us = bound by the chip's sheet, c: compute-bound; x = against kv on the same chip",
        head + "".join(f" {chip.name + ' us':>14} {'x':>5}" for chip in found),
    ]
    for shape in shapes:
        reference = count(shape, "kv")
        for way in WAYS:
            work = count(shape, way)
            line = (
                f"{shape.model:<9} {shape.batch:>5} {shape.context_tokens:>7} {way:<9} {work.flops / 1e9:>9.2f} "
                f"{work.bytes / 1e6:>8.1f} {work.flops / work.bytes:>7.1f}"
            )
            for chip in found:
                bound = work.bound_s(chip)
                mark = "c" if work.flops / chip.flops_per_s > work.bytes / chip.bytes_per_s else " "
                line += f" {bound * 1e6:>13.1f}{mark} {bound / reference.bound_s(chip):>5.2f}"
            lines.append(line)
    return "\n".join(lines)
