"""How long one iteration takes, from what it computes and reads. Pure host arithmetic, linear in measured scales.

    seconds = overhead + dense * max(weights read, matrix products) + decoding requests and their context, by kind + ...

The terms come from FLOPs, bytes and bandwidth (a roofline per term) and from counts of the kernels that the device runs
(`decode_kernels.py`); the scales are 1 for a preset, or fitted to measurements of a running engine (`fit.py`).
Decode attention costs so much for each request and so much for each cached token, by cache kind: against KV a hidden
request costs `hidden_delay_s(tokens)` more, a straight line whose slope is rho, seconds per hidden token and iteration.
Both ends may be negative.

Hidden modes: `absorbed` folds the projections into query and output, as multi-head latent attention does: 4 D N FLOPs
per token and layer; by what the device runs in this package. `one-pass` is the same by a kernel that every device could
have: every vector is read once, half of KV's bytes. `recompute` projects every cached hidden vector to keys and values
again in each decode step (Apt-Serve), 4 D^2 FLOPs per token and layer.

Under tensor parallelism weights, heads and each cached vector (along D) are split over the devices. Absorbed
attention then sums N partial scores per token over the devices, in one collective for every `GROUP_BYTES` of vectors
on a device, and joins queries and scatters values once a layer; recomputation gathers D numbers per token.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from apt_jax.cache import KINDS, CacheDtype, CacheKind, per_kind
from apt_jax.model_config import GROUP_BYTES, ModelConfig, Quantization
from apt_jax.scheduling.costs.decode_kernels import ONE_PASS, RECOMPUTE, DecodeKernel, Rates
from apt_jax.scheduling.costs.hardware import Hardware
from apt_jax.scheduling.costs.host_times import HostTime
from apt_jax.scheduling.costs.prefix_kernels import ONE_READ, PROJECTED, XLA, PrefixKernel
from apt_jax.scheduling.costs.step_load import Chunk, PaddedSizes, StepLoad
from apt_jax.scheduling.costs.weight_sizes import WeightSizes

HiddenMode = Literal["absorbed", "one-pass", "recompute"]
Floats = NDArray[np.float64]
BYTES = 2  # per number, bfloat16 or float16
SCALE_BYTES = 4  # float32, for each token and head of an int8 cache


@dataclass(frozen=True)
class Scales:
    """Multipliers on the terms of the cost model; 1 (and None) is the preset.

    `per_request_s` are seconds of a decoding request by `CacheKind.index`, its context not included.
    """

    overhead: float = 1.0
    dense: float = 1.0
    compute: float = 1.0  # of matrix products against weight reads, inside the dense term
    knee: float = math.inf  # how sharp the dense term bends: infinity is the larger of the two, 1 their sum
    attention: tuple[float, ...] = (1.0,) * len(KINDS)  # of decodes over cached tokens, by `CacheKind.index`
    pairs: float = 1.0
    per_request_s: tuple[float, ...] | None = None
    exchange: float = 1.0  # of what devices exchange for each token and layer, attention's scores not included
    mixing: float = 1.0  # of `mixing_s`
    prefix: float = 1.0  # of what chunks of prompts pay for the tokens cached before them
    host: HostTime = HostTime()  # noqa: RUF009  # frozen; of an iteration that serves, beside its batch

    def at_pace(self, pace: float) -> "Scales":
        """The scales of a device and host on which everything takes `pace` times as long."""
        requests_s = self.per_request_s
        return replace(
            self, overhead=pace * self.overhead, dense=pace * self.dense,
            attention=tuple(pace * scale for scale in self.attention), pairs=pace * self.pairs,
            per_request_s=None if requests_s is None else tuple(pace * seconds for seconds in requests_s),
            exchange=pace * self.exchange, mixing=pace * self.mixing, prefix=pace * self.prefix,
            host=HostTime(pace * self.host.iteration_s, pace * self.host.candidate_s),
        )  # fmt: skip


@dataclass(frozen=True)
class CostModel:
    """Iteration time of one model on `devices` accelerators, whose cache has numbers of `cache_dtype`."""

    model: ModelConfig
    hardware: Hardware
    hidden_mode: HiddenMode = "absorbed"
    devices: int = 1
    scales: Scales = field(default_factory=Scales)
    sizes: PaddedSizes = field(default_factory=PaddedSizes)
    quantization: Quantization = "none"
    cache_dtype: CacheDtype = "auto"

    def step_s(self, load: StepLoad) -> float:
        """Seconds of one iteration with `load`, padded to the compiled sizes; 0 if it is empty."""
        load = self.sizes.pad(load)
        tokens = load.prefill_tokens + load.decode_requests
        if not tokens and not load.projected_tokens:
            return 0.0
        seconds: float = self._seconds(load, load.context_tokens)
        return seconds

    def decodes_s(self, load: StepLoad, iterations: int) -> Floats:
        """`[iterations]` the same of iterations that only decode: `load`, then with one more token for each request."""
        load = self.sizes.pad(load)
        numbers = np.arange(iterations)
        contexts = [now + numbers * more for now, more in zip(load.context_tokens, load.decodes, strict=True)]
        seconds: Floats = self._seconds(load, contexts)
        return seconds

    def _seconds(self, load: StepLoad, contexts: Sequence[Any]) -> Any:
        """Seconds of a padded load with these tokens of context by kind, numbers or arrays, instead of its own."""
        seconds: Any = self.overhead_s + self.dense_s(self.compute_s(load))
        if self.devices > 1:
            seconds += self.scales.exchange * self.exchange_s(load)
        for context_tokens, token_s in zip(contexts, self.attention_s, strict=True):
            seconds = seconds + context_tokens * token_s
        for requests, request_s in zip(load.decodes, self.request_s, strict=True):
            seconds = seconds + requests * request_s
        seconds = seconds + load.prefill_pairs * self.pair_s + self.scales.mixing * self.mixing_s(load)
        return seconds + self.scales.prefix * self.prefixes_s(load) if load.chunks else seconds

    def host_s(self, candidates: int) -> float:
        """Seconds of the host around an iteration that chooses among so many unfinished requests; 0 of a preset.

        The policy's decision, queues and blocks, what is sent, and what comes in between: all that `step_s`, which is
        the batch's own time, does not include.
        """
        return self.scales.host.seconds(candidates)

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
        read_s, products_s, knee = self.weights_s, compute_s * self.scales.compute, self.scales.knee
        seconds = max(read_s, products_s) if math.isinf(knee) else self.blend(read_s, products_s, knee)
        return self.scales.dense * seconds

    @staticmethod
    def blend[N: (float, Floats)](read_s: N, compute_s: N, knee: float) -> N:
        """Reading and computing overlap: the larger of both for knee infinity, their sum for 1, between for others."""
        if math.isinf(knee):
            return np.maximum(read_s, compute_s)
        return (read_s**knee + compute_s**knee) ** (1 / knee)

    def prefix_s(self, kind: CacheKind, tokens: int, cached_tokens: int) -> float:
        """Seconds that a chunk of `tokens` costs because `cached_tokens` of its prompt are cached as `kind`.

        They are read, or projected again, or absorbed, whichever the device does. The chunk's query-key pairs and its
        own tokens are not included, nor what other tokens of the iteration add where the device runs XLA's loops.
        """
        return self.scales.prefix * self._prefix_s(Chunk(kind.index, tokens, cached_tokens), tokens)

    def prefixes_s(self, load: StepLoad) -> float:
        """The same for all chunks of an iteration, at scale 1."""
        slots = load.prefill_tokens + load.decode_requests
        return sum(self._prefix_s(chunk, slots) for chunk in load.chunks)

    def _prefix_s(self, chunk: Chunk, slots: int) -> float:
        kernel: PrefixKernel = {"one-pass": ONE_READ, "recompute": PROJECTED}.get(
            self.hidden_mode, self.hardware.prefix_kernel
        )
        if self.devices > 1 and KINDS[chunk.kind].is_projected:
            kernel = XLA
        if not chunk.cached_tokens:
            return 0.0
        return self._layers * kernel.seconds(chunk, self.model, self._rates, slots, self.number_bytes)

    def mixing_s(self, load: StepLoad) -> float:
        """Seconds that hidden decodes add to an iteration beside what each of them costs, at scale 1.

        Weights that are read again, by what the device runs, and because keys and values of others are computed in the
        same iteration; and wide queries and contexts of the others, since the products are those of the whole batch.
        """
        seconds = 0.0
        for requests, (alone_s, beside_s, other_s) in zip(load.decodes, self._mixing_s, strict=True):
            if requests:
                others = sum(load.decodes) - requests
                seconds += alone_s + others * other_s
                if others or load.prefill_pairs:  # padding has none
                    seconds += beside_s
        return seconds

    @cached_property
    def _mixing_s(self) -> tuple[tuple[float, float, float], ...]:
        """Of each kind: seconds that its decodes add to an iteration, beside others, and for each other decode."""
        return per_kind(self._mixing_of)

    def _mixing_of(self, kind: CacheKind) -> tuple[float, float, float]:
        if not kind.is_projected or self.hidden_mode == "recompute":
            return 0.0, 0.0, 0.0
        kernel, rates, layers = self.kernel(kind), self._rates, self._layers
        keys_values_s = layers * 2 * self.model.hidden_size**2 * self._weights.number_bytes / self._bytes_per_s
        alone_s = layers * kernel.layer_s(self.model, rates)
        return alone_s, keys_values_s, layers * kernel.batch_s(self.model, kind, rates)

    @property
    def rho_s(self) -> float:
        """Seconds per hidden token and iteration, against KV; negative where hidden is faster."""
        return self.attention_s[CacheKind.HIDDEN.index] - self.attention_s[CacheKind.KV.index]

    def hidden_delay_s(self, tokens: float) -> float:
        """Seconds that an iteration takes longer if a decoding request of `tokens` tokens is hidden instead of KV.

        Negative where hidden is faster. That the iteration has hidden requests at all (`mixing_s`) is not included.
        """
        kv_s, hidden_s = (self.request_s[kind.index] for kind in (CacheKind.KV, CacheKind.HIDDEN))
        return hidden_s - kv_s + self.rho_s * tokens

    def kernel(self, kind: CacheKind) -> DecodeKernel:
        """What decode attention over a kind runs."""
        if not kind.is_projected:
            return self.hardware.kv_kernel
        if self.devices > 1 and self.hidden_mode != "recompute":
            return self.hardware.split_hidden_kernel
        modes: dict[HiddenMode, DecodeKernel] = {
            "absorbed": self.hardware.hidden_kernel, "one-pass": ONE_PASS, "recompute": RECOMPUTE,
        }  # fmt: skip
        return modes[self.hidden_mode]

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
        return self._weights.count

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, over all devices: with positions, which are only looked up."""
        return self._weights.nbytes + self.model.max_position_embeddings * self.model.hidden_size * BYTES

    @cached_property
    def _weights(self) -> WeightSizes:
        return WeightSizes(self.model, self.quantization)

    @cached_property
    def overhead_s(self) -> float:
        """Fixed seconds per iteration, the latency of two collectives per layer included."""
        latency = 2 * self.model.num_hidden_layers * self.hardware.link_latency_s if self.devices > 1 else 0.0
        return self.scales.overhead * (self.hardware.overhead_s + latency)

    @cached_property
    def weights_s(self) -> float:
        """Seconds to read the weights once."""
        return self._weights.nbytes / self._bytes_per_s

    @cached_property
    def token_s(self) -> float:
        """Seconds of matrix products per token, output embedding not included."""
        work = self._layers * self._weights.layer_work(self.hardware.int8_rate)
        return 2 * work / self._flops_per_s

    @property
    def prompt_token_s(self) -> float:
        """Seconds of one more prompt token's products, as fitted, where these and not reading weights take the time."""
        return max(self.token_s * self.scales.compute * self.scales.dense, 1e-12)

    @cached_property
    def logits_s(self) -> float:
        """Seconds of the output embedding per sampled token."""
        return 2 * self._weights.vocabulary_work(self.hardware.int8_rate) / self._flops_per_s

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
        flops, exchange = 4.0 * c.hidden_size, 0.0
        if kind.is_projected and self.hidden_mode == "recompute":
            flops += 4 * c.hidden_size**2
            exchange = self._exchange_s(c.hidden_size)
        elif kind.is_projected:
            flops *= c.num_attention_heads
            exchange = 2 * self._exchange_s(2 * c.num_attention_heads)  # float32 partial scores, summed
            if self.devices > 1:
                groups = c.hidden_size * self.number_bytes / self.devices / GROUP_BYTES
                exchange += c.num_hidden_layers * groups * self.hardware.link_latency_s
        return self._layers * self.kernel(kind).token_s(c, kind, flops, self._rates, self.number_bytes) + exchange

    @cached_property
    def request_s(self) -> tuple[float, ...]:
        """Seconds of decode attention per decoding request beside its cached tokens, by `CacheKind.index`."""
        return per_kind(self._request_s) if self.scales.per_request_s is None else self.scales.per_request_s

    def _request_s(self, kind: CacheKind) -> float:
        """Seconds of decode attention per decoding request, unscaled: query and context, and chunks not full."""
        kernel, c, rates = self.kernel(kind), self.model, self._rates
        token_s = self._attention_s(kind) / self._layers
        return self._layers * (kernel.own_s(c, kind, token_s, rates) + kernel.batch_s(c, kind, rates))

    def _reads_slices(self, load: StepLoad) -> bool:
        """Whether a decode reads vectors that have to be projected."""
        return any(load.context_tokens[kind.index] for kind in KINDS if kind.is_projected)

    @cached_property
    def slices_s(self) -> float:
        """Seconds that an iteration waits because hidden vectors are split, however few: three collectives a layer."""
        if self.devices == 1 or self.hidden_mode == "recompute":
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
    def number_bytes(self) -> float:
        """Bytes of a number in the cache, with its share of the scales beside it."""
        if self.cache_dtype == "auto":
            return BYTES
        return coded_bytes(self)

    @property
    def _layers(self) -> int:
        return self.model.num_hidden_layers

    @cached_property
    def _rates(self) -> Rates:
        return Rates(self._flops_per_s, self._bytes_per_s, self.devices, self._weights.number_bytes)

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


def coded_bytes(model: CostModel) -> float:
    """Bytes of a number kept as int8 with a scale for each token and head."""
    return 1 + SCALE_BYTES / model.model.head_dim


def block_bytes(model: CostModel, block_size: int) -> float:
    """Bytes of one block over all layers and devices."""
    return model.model.num_hidden_layers * model.model.hidden_size * model.number_bytes * block_size


def cache_blocks(
    model: CostModel, *, block_size: int, max_num_batched_tokens: int, max_num_seqs: int, utilization: float = 0.9
) -> int:
    """Blocks that fit in the memory which weights and activations leave, over all devices.

    Activations: one layer's for `max_num_batched_tokens` tokens and float32 logits for `max_num_seqs` samples.

    Raises:
        ValueError: the weights leave no room.
    """
    c, devices = model.model, model.devices
    weights = model.weight_bytes
    activations = max_num_batched_tokens * (8 * c.hidden_size + 2 * c.ffn_dim) * BYTES + max_num_seqs * c.vocab_size * 8
    free = model.hardware.memory_bytes * utilization * devices - weights - activations * devices
    blocks = int(free // block_bytes(model, block_size))
    if blocks < 2:
        raise ValueError(
            f"weights of {weights / 1e9:.1f} GB and activations of {activations * devices / 1e9:.1f} GB (for "
            f"{max_num_batched_tokens=} and {max_num_seqs=}) leave no room for a cache in {utilization:g} of {devices} "
            f"x {model.hardware.memory_bytes / 1e9:.1f} GB; raise --tensor-parallel-size, take larger --hardware, or "
            "lower --max-num-batched-tokens or --max-num-seqs"
        )
    return blocks
