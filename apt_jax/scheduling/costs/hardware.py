"""Devices and OPT sizes by name, for the cost model and the simulator. Figures: the makers' sheets."""

from dataclasses import dataclass

from apt_jax.model_config import ModelConfig
from apt_jax.scheduling.costs.decode_kernels import (
    HIDDEN_TPU7X,
    HIDDEN_V5E,
    HIDDEN_V5P,
    HIDDEN_V6E,
    KV,
    KV_TPU7X,
    KV_V5E,
    KV_V5P,
    KV_V6E,
    ONE_PASS,
    SLICES_GPU,
    SLICES_TPU,
    TWO_PASSES,
    XLA_AMPERE,
    DecodeKernel,
)
from apt_jax.scheduling.costs.prefix_kernels import HOPPER, ONE_READ, TPU, XLA, PrefixKernel

GIB = 2**30


@dataclass(frozen=True)
class Hardware:
    """One accelerator chip.

    Attributes:
        name: as given on the command line.
        memory_bytes: device memory.
        flops_per_s: dense 16-bit matrix peak.
        bytes_per_s: peak bandwidth of the device memory.
        link_bytes_per_s: to its neighbours, one direction.
        source: where the figures come from.
        flops_efficiency, bandwidth_efficiency: share of the peaks that large kernels reach. Assumed, the same for
            all; a calibration replaces them.
        overhead_s: launch and host time of one iteration. Assumed.
        link_latency_s: of one collective. Assumed.
        host_bytes_per_s: to and from the host's memory, one direction: four fifths of sixteen lanes of PCIe, generation
            4 (A100) or 5 (H100, H200) by the same document; of TPUs nothing is published, and 4 is assumed.
        int8_rate: how many times as fast as 16-bit numbers int8 is multiplied, by the same document; 1 where it does
            not say.
        kv_kernel, hidden_kernel: what this package's decode attention runs there.
        split_hidden_kernel: the same for hidden requests of a model split over several of them.
        prefix_kernel: what attention of prompts' later chunks over their cached tokens runs.
    """

    name: str
    memory_bytes: float
    flops_per_s: float
    bytes_per_s: float
    link_bytes_per_s: float
    source: str
    flops_efficiency: float = 0.6
    bandwidth_efficiency: float = 0.8
    overhead_s: float = 0.003
    link_latency_s: float = 10e-6
    kv_kernel: DecodeKernel = KV
    hidden_kernel: DecodeKernel = ONE_PASS
    split_hidden_kernel: DecodeKernel = SLICES_GPU
    prefix_kernel: PrefixKernel = ONE_READ
    int8_rate: float = 2.0
    host_bytes_per_s: float = 25e9


# Links: half of the bidirectional NVLink or inter-chip (ICI) figure of the same document.
_NVIDIA = "https://resources.nvidia.com"
_A100 = (
    "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/"
    "nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"
)
_H100 = f"{_NVIDIA}/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet"
_H200 = f"{_NVIDIA}/en-us-data-center-overview-mc/en-us-data-center-overview/hpc-datasheet-sc23-h200"
_TPU = "https://docs.cloud.google.com/tpu/docs"

_ALL = (
    Hardware(
        "a100-40gb", 40 * GIB, 312e12, 1555e9, 300e9, f"NVIDIA A100 datasheet, SXM4 40 GB: {_A100}",
        hidden_kernel=XLA_AMPERE, prefix_kernel=XLA,
    ),
    Hardware(
        "a100-80gb", 80 * GIB, 312e12, 2039e9, 300e9, f"NVIDIA A100 datasheet, SXM4 80 GB: {_A100}",
        hidden_kernel=XLA_AMPERE, prefix_kernel=XLA,
    ),
    Hardware(
        "h100-80gb", 80 * GIB, 989.4e12, 3350e9, 450e9, f"NVIDIA H100 datasheet, SXM5, without sparsity: {_H100}",
        hidden_kernel=TWO_PASSES, prefix_kernel=HOPPER, host_bytes_per_s=51e9,
    ),
    Hardware(
        "h200", 141e9, 989.4e12, 4800e9, 450e9, f"NVIDIA H200 datasheet, SXM, without sparsity: {_H200}",
        hidden_kernel=TWO_PASSES, prefix_kernel=HOPPER, host_bytes_per_s=51e9,
    ),
    Hardware(
        "tpu-v5e", 16 * GIB, 197e12, 819e9, 200e9, f"Google Cloud, TPU v5e: {_TPU}/v5e",
        kv_kernel=KV_V5E, hidden_kernel=HIDDEN_V5E, split_hidden_kernel=SLICES_TPU, prefix_kernel=TPU,
    ),
    Hardware(
        "tpu-v5p", 95 * GIB, 459e12, 2765e9, 600e9, f"Google Cloud, TPU v5p: {_TPU}/v5p",
        kv_kernel=KV_V5P, hidden_kernel=HIDDEN_V5P, split_hidden_kernel=SLICES_TPU, prefix_kernel=TPU,
    ),
    Hardware(
        "tpu-v6e", 32 * GIB, 918e12, 1638e9, 400e9, f"Google Cloud, TPU v6e (Trillium): {_TPU}/v6e",
        kv_kernel=KV_V6E, hidden_kernel=HIDDEN_V6E, split_hidden_kernel=SLICES_TPU, prefix_kernel=TPU,
    ),
    Hardware(
        "tpu7x", 192 * GIB, 2307e12, 7380e9, 600e9, f"Google Cloud, TPU7x (Ironwood): {_TPU}/tpu7x",
        kv_kernel=KV_TPU7X, hidden_kernel=HIDDEN_TPU7X, split_hidden_kernel=SLICES_TPU, prefix_kernel=TPU,
        int8_rate=1.0,
    ),
)  # fmt: skip
HARDWARE = {hardware.name: hardware for hardware in _ALL}


def _opt(hidden_size: int, layers: int, heads: int) -> ModelConfig:
    return ModelConfig(
        hidden_size=hidden_size, num_hidden_layers=layers, num_attention_heads=heads,
        ffn_dim=4 * hidden_size, word_embed_proj_dim=hidden_size,
    )  # fmt: skip


# Zhang et al., "OPT: Open Pre-trained Transformer Language Models", table 1. OPT-350m embeds in 512 numbers.
MODELS = {
    "opt-125m": _opt(768, 12, 12),
    "opt-350m": _opt(1024, 24, 16),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-2.7b": _opt(2560, 32, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "opt-13b": _opt(5120, 40, 40),
    "opt-30b": _opt(7168, 48, 56),
    "opt-66b": _opt(9216, 64, 72),
}


def by_name[T](table: dict[str, T], name: str, what: str) -> T:
    """`table[name]`.

    Raises:
        ValueError: there is no such name; the message lists those there are.
    """
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}; known: {', '.join(table)}")
    return table[name]
