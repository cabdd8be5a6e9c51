"""How long one iteration takes, from what it computes and reads. Pure host arithmetic, linear in measured scales.

    seconds = overhead + dense * max(weights read, matrix products) + tokens of context, by cache kind + ...

The terms come from FLOPs, bytes and bandwidth (a roofline per term); the scales are 1 for a preset, or fitted to
measurements of a running engine (`fit.py`). Attention is linear in cached tokens, so the penalty rho of the hidden
cache is one number: seconds per hidden token and iteration, against the same token as KV. It may be negative.

Hidden modes: `recompute` projects every cached hidden vector to keys and values again in each decode step
(Apt-Serve), 4 D^2 FLOPs per token and layer; `absorbed` folds the projections into query and output, as
multi-head latent attention does: 4 D N FLOPs per token and layer and half of KV's bytes.

Under tensor parallelism weights, heads and each cached vector (along D) are split over the devices. Absorbed
attention then sums N partial scores per token over the devices, in one collective for every `GROUP_BYTES` of vectors
on a device, and joins queries and scatters values once a layer; recomputation gathers D numbers per token.
"""

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from apt_jax.cache import KINDS, CacheKind, per_kind
from apt_jax.model_config import GROUP_BYTES, ModelConfig
from apt_jax.scheduling.costs.hardware import Hardware
from apt_jax.scheduling.costs.step_load import PaddedSizes, StepLoad

HiddenMode = Literal["recompute", "absorbed"]
Floats = NDArray[np.float64]
BYTES = 2  # per number, bfloat16 or float16


@dataclass(frozen=True)
class Scales:
    """Multipliers on the terms of the cost model; 1 (and `per_request_s` 0) is the preset."""

    overhead: float = 1.0
    dense: float = 1.0
    compute: float = 1.0  # of matrix products against weight reads, inside the dense term
    knee: float = math.inf  # how sharp the dense term bends: infinity is the larger of the two, 1 their sum
    attention: tuple[float, ...] = (1.0,) * len(KINDS)  # of decodes over cached tokens, by `CacheKind.index`
    pairs: float = 1.0
    per_request_s: float = 0.0
    exchange: float = 1.0  # of what devices exchange for each token and layer, attention's scores not included


@dataclass(frozen=True)
class CostModel:
    """Iteration time of one model on `devices` accelerators."""

    model: ModelConfig
    hardware: Hardware
    hidden_mode: HiddenMode = "absorbed"
    devices: int = 1
    scales: Scales = field(default_factory=Scales)
    sizes: PaddedSizes = field(default_factory=PaddedSizes)

    def step_s(self, load: StepLoad) -> float:
        """Seconds of one iteration with `load`, padded to the compiled sizes; 0 if it is empty."""
        load = self.sizes.pad(load)
        tokens = load.prefill_tokens + load.decode_requests
        if not tokens and not load.projected_tokens:
            return 0.0
        seconds = self.overhead_s + self.dense_s(self.compute_s(load)) + self.scales.exchange * self.exchange_s(load)
        for context_tokens, token_s in zip(load.context_tokens, self.attention_s, strict=True):
            seconds += context_tokens * token_s
        return seconds + load.prefill_pairs * self.pair_s + load.decode_requests * self.scales.per_request_s

    def compute_s(self, load: StepLoad) -> float:
        """Seconds of an iteration's matrix products at full rate, those of attention not included."""
        tokens = load.prefill_tokens + load.decode_requests
        return tokens * self.token_s + load.samples * self.logits_s + load.projected_tokens * self.projection_s

    def exchange_s(self, load: StepLoad) -> float:
        """Seconds of what devices exchange in an iteration, except for scores; 0 on one device."""
        tokens = load.prefill_tokens + load.decode_requests
        return tokens * self.exchange_token_s + (self.slices_s if self._reads_slices(load) else 0.0)

    def dense_s(self, compute_s: float) -> float:
        """Seconds of the weight-bound part, given its matrix products: whichever is slower, reading or computing."""
        return self.scales.dense * float(self.blend(self.weights_s, compute_s * self.scales.compute, self.scales.knee))

    @staticmethod
    def blend[N: (float, Floats)](read_s: N, compute_s: N, knee: float) -> N:
        """Reading and computing overlap: the larger of both for knee infinity, their sum for 1, between for others."""
        if math.isinf(knee):
            return np.maximum(read_s, compute_s)
        return (read_s**knee + compute_s**knee) ** (1 / knee)

    @property
    def rho_s(self) -> float:
        """Seconds per hidden token and iteration, against KV; negative where hidden is faster."""
        return self.attention_s[CacheKind.HIDDEN.index] - self.attention_s[CacheKind.KV.index]

    @property
    def free_tokens(self) -> int:
        """Tokens that an iteration computes while it reads the weights anyway (the roofline's knee)."""
        return int(self.weights_s / (self.token_s * self.scales.compute))

    def with_scales(self, scales: Scales) -> "CostModel":
        """The same model with other scales."""
        return replace(self, scales=scales)

    @cached_property
    def num_weights(self) -> int:
        """Weights that every iteration reads: the layers and the output embedding."""
        c = self.model
        layer = 4 * c.hidden_size**2 + 2 * c.hidden_size * c.ffn_dim + 9 * c.hidden_size + c.ffn_dim
        return c.num_hidden_layers * layer + c.vocab_size * c.word_embed_proj_dim

    @cached_property
    def overhead_s(self) -> float:
        """Fixed seconds per iteration, the latency of two collectives per layer included."""
        latency = 2 * self.model.num_hidden_layers * self.hardware.link_latency_s if self.devices > 1 else 0.0
        return self.scales.overhead * (self.hardware.overhead_s + latency)

    @cached_property
    def weights_s(self) -> float:
        """Seconds to read the weights once."""
        return self.num_weights * BYTES / self._bytes_per_s

    @cached_property
    def token_s(self) -> float:
        """Seconds of matrix products per token, output embedding not included."""
        c = self.model
        return 2 * (self.num_weights - c.vocab_size * c.word_embed_proj_dim) / self._flops_per_s

    @cached_property
    def logits_s(self) -> float:
        """Seconds of the output embedding per sampled token."""
        return 2 * self.model.vocab_size * self.model.word_embed_proj_dim / self._flops_per_s

    @cached_property
    def exchange_token_s(self) -> float:
        """Seconds of the two all-reduces per layer, per token."""
        return 2 * self._exchange_s(2 * self.model.hidden_size)

    @cached_property
    def attention_s(self) -> tuple[float, ...]:
        """Seconds of decode attention per cached token, by `CacheKind.index`."""
        return per_kind(lambda kind: self.scales.attention[kind.index] * self._attention_s(kind))

    def _attention_s(self, kind: CacheKind) -> float:
        """Seconds of decode attention per cached token, at scale 1."""
        c = self.model
        numbers = c.num_hidden_layers * kind.blocks_per_page * c.hidden_size
        read = numbers * (kind.spec.number_bytes or BYTES) / self._bytes_per_s
        exchange = 0.0
        if not kind.is_projected:
            flops = c.num_hidden_layers * 4 * c.hidden_size / self._flops_per_s
        elif self.hidden_mode == "absorbed":
            flops = c.num_hidden_layers * 4 * c.hidden_size * c.num_attention_heads / self._flops_per_s
            exchange = 2 * self._exchange_s(2 * c.num_attention_heads)  # float32 partial scores, summed
            if self.devices > 1:
                groups = c.hidden_size * BYTES / self.devices / GROUP_BYTES
                exchange += c.num_hidden_layers * groups * self.hardware.link_latency_s
        else:
            flops = c.num_hidden_layers * (4 * c.hidden_size**2 + 4 * c.hidden_size) / self._flops_per_s
            exchange = self._exchange_s(c.hidden_size)
        return max(read, flops) + exchange

    def _reads_slices(self, load: StepLoad) -> bool:
        """Whether a decode reads vectors that have to be projected."""
        return any(load.context_tokens[kind.index] for kind in KINDS if kind.is_projected)

    @cached_property
    def slices_s(self) -> float:
        """Seconds that an iteration waits because hidden vectors are split, however few: three collectives a layer."""
        if self.devices == 1 or self.hidden_mode != "absorbed":
            return 0.0
        return 3 * self.model.num_hidden_layers * self.hardware.link_latency_s

    @cached_property
    def projection_s(self) -> float:
        """Seconds to project one cached hidden token to keys and values in every layer."""
        return self.model.num_hidden_layers * 4 * self.model.hidden_size**2 / self._flops_per_s

    @cached_property
    def pair_s(self) -> float:
        """Seconds of prefill attention per query-key pair."""
        return self.scales.pairs * self.model.num_hidden_layers * 4 * self.model.hidden_size / self._flops_per_s

    @property
    def _flops_per_s(self) -> float:
        return self.hardware.flops_per_s * self.hardware.flops_efficiency * self.devices

    @property
    def _bytes_per_s(self) -> float:
        return self.hardware.bytes_per_s * self.hardware.bandwidth_efficiency * self.devices

    def _exchange_s(self, numbers: int) -> float:
        """Seconds to move `numbers` 16-bit numbers per layer once around the devices."""
        if self.devices == 1:
            return 0.0
        share = (self.devices - 1) / self.devices
        return self.model.num_hidden_layers * numbers * BYTES * share / self.hardware.link_bytes_per_s


def cache_blocks(
    model: CostModel, *, block_size: int, max_num_batched_tokens: int, max_num_seqs: int, utilization: float = 0.9
) -> int:
    """Blocks that fit in the memory which weights and activations leave, over all devices.

    Activations: one layer's for `max_num_batched_tokens` tokens and float32 logits for `max_num_seqs` samples.

    Raises:
        ValueError: the weights leave no room.
    """
    c, devices = model.model, model.devices
    weights = (model.num_weights + c.max_position_embeddings * c.hidden_size) * BYTES
    activations = max_num_batched_tokens * (8 * c.hidden_size + 2 * c.ffn_dim) * BYTES + max_num_seqs * c.vocab_size * 8
    free = model.hardware.memory_bytes * utilization * devices - weights - activations * devices
    blocks = int(free // (c.num_hidden_layers * c.hidden_size * BYTES * block_size))
    if blocks < 2:
        raise ValueError(
            f"weights of {weights / 1e9:.1f} GB leave no room for a cache in {devices} x "
            f"{model.hardware.memory_bytes / 1e9:.1f} GB; raise --tensor-parallel-size or take larger --hardware"
        )
    return blocks
