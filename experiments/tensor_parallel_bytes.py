"""What a decode step reads, exchanges and keeps on each device, for every way to split hidden vectors over devices.

    python -m experiments.tensor_parallel_bytes [--times]

Counts per device and step, for OPT-13B on 2 devices, 30B on 2 and 66B on 4: bytes of weights and cache read, bytes
sent over links (ring collectives), number of collectives, bytes of cache a token takes and tokens that fit. `--times`
prints estimates from data sheets instead: reading or computing, whichever is slower, plus exchanging, nothing
overlapped, against a step in which every request caches KV. No device is used.

* kv: KV blocks by heads.
* slices: every device holds a slice of D of each hidden vector; partial scores are summed (what apt-jax does).
* replicated: every device holds whole hidden vectors and attends with its own heads.
* partitioned: each request's whole hidden vectors lie on one device, which attends for it with all heads; Wk and Wv
  are whole on every device.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

from apt_jax.attention.hidden_slices import num_groups
from apt_jax.scheduling.costs.cost_model import BYTES, CostModel
from apt_jax.scheduling.costs.hardware import HARDWARE, MODELS

SPLITS = (("opt-13b", 2), ("opt-30b", 2), ("opt-66b", 4))
BATCHES, CONTEXTS = (8, 32, 128), (512, 2048)
DEVICES = ("h200", "a100-80gb", "tpu-v5e", "tpu-v6e")
LONGEST = 2048
FORMS = ("kv", "slices", "replicated", "partitioned")
SCORE_BYTES = 4  # partial scores and values are summed in float32


@dataclass(frozen=True)
class Count:
    """One decode step on one device."""

    weight_bytes: int
    cache_bytes: int
    sent_bytes: int
    collectives: int
    flops: int  # of attention
    token_bytes: int  # of cache that a cached token takes

    def seconds(self, model: CostModel) -> float:
        """Estimate on the model's hardware, without the projections' matrix products, which are the same for all."""
        h = model.hardware
        read = self.weight_bytes / (h.bytes_per_s * h.bandwidth_efficiency)
        attention = max(
            self.cache_bytes / (h.bytes_per_s * h.bandwidth_efficiency),
            self.flops / (h.flops_per_s * h.flops_efficiency),
        )
        return read + attention + self.sent_bytes / h.link_bytes_per_s + self.collectives * h.link_latency_s


def count(form: str, model: CostModel, batch: int, context: int) -> Count:
    """A step of `batch` requests that have `context` cached tokens each, all of one kind."""
    c, n, B = model.model, model.devices, batch
    L, D, N, V = c.num_hidden_layers, c.hidden_size, c.num_attention_heads, c.vocab_size
    share = (n - 1) / n
    weights = model.num_weights * BYTES / n
    tokens = B * context
    # embedding, logits, and two all-reduces a layer; an all-reduce sends what it sums twice
    sent = 2 * share * B * D * BYTES * (2 * L + 1) + share * B * V * SCORE_BYTES
    collectives = 2 * L + 2
    vector = L * D * BYTES
    if form == "kv":
        cache, flops, token = 2 * vector * tokens / n, 4 * D * tokens * L / n, 2 * vector / n
    elif form == "slices":
        cache, flops, token = vector * tokens / n, 4 * D * N * tokens * L / n, vector / n
        groups = num_groups([context] * B, LONGEST, D * BYTES // n)
        sent += L * share * (B * D * BYTES + 2 * tokens * N * SCORE_BYTES + B * D * SCORE_BYTES)
        collectives += L * (1 + groups + 1)  # queries, scores, values
    elif form == "replicated":
        cache, flops, token = vector * tokens, 4 * D * N * tokens * L / n, vector
    else:
        cache, flops, token = vector * tokens / n, 4 * D * N * tokens * L / n, vector / n
        weights += 2 * D * D * L * BYTES * share
        sent += L * share * B * D / n * (BYTES + SCORE_BYTES)
        collectives += 2 * L  # queries to the requests' devices, values back to the heads'
    return Count(*map(round, (weights, cache, sent, collectives, flops, token)))


def cases() -> Iterator[tuple[str, int, int, int]]:
    """(model, devices, batch, context)."""
    for model, devices in SPLITS:
        for batch in BATCHES:
            for context in CONTEXTS:
                yield model, devices, batch, context


def bytes_table() -> Iterator[str]:
    """One Markdown line per case: MB read, MB sent and collectives, by form."""
    yield "| model | batch | context | " + " | ".join(f"{form}: cache + sent MB, collectives" for form in FORMS) + " |"
    yield "|---|---:|---:|" + "---:|" * len(FORMS)
    for name, devices, batch, context in cases():
        model = CostModel(MODELS[name], HARDWARE[DEVICES[0]], devices=devices)
        cells = [
            f"{c.cache_bytes / 1e6:,.0f} + {c.sent_bytes / 1e6:,.0f}, {c.collectives}"
            for c in (count(form, model, batch, context) for form in FORMS)
        ]
        yield f"| {name} x{devices} | {batch} | {context} | " + " | ".join(cells) + " |"


def constants_table() -> Iterator[str]:
    """One Markdown line per model: MB of weights read per step and KB of cache per token, by form."""
    yield "| model | " + " | ".join(f"{form}: weights GB, KB a token" for form in FORMS) + " |"
    yield "|---|" + "---:|" * len(FORMS)
    for name, devices in SPLITS:
        model = CostModel(MODELS[name], HARDWARE[DEVICES[0]], devices=devices)
        cells = [
            f"{c.weight_bytes / 1e9:.1f}, {c.token_bytes / 1e3:,.0f}"
            for c in (count(form, model, 1, 1) for form in FORMS)
        ]
        yield f"| {name} x{devices} | " + " | ".join(cells) + " |"


def room_table() -> Iterator[str]:
    """One Markdown line per model and device: tokens that fit next to the weights into 90% of the memory, by form."""
    yield "| model | device | " + " | ".join(f"{form}: tokens" for form in FORMS) + " |"
    yield "|---|---|" + "---:|" * len(FORMS)
    for name, devices in SPLITS:
        for device in ("a100-40gb", *DEVICES):
            model = CostModel(MODELS[name], HARDWARE[device], devices=devices)
            counts = [count(form, model, 1, 1) for form in FORMS]
            rooms = [0.9 * model.hardware.memory_bytes - c.weight_bytes for c in counts]
            if max(rooms) > 0:
                tokens = [max(int(room / c.token_bytes), 0) for room, c in zip(rooms, counts, strict=True)]
                yield f"| {name} x{devices} | {device} | " + " | ".join(f"{t:,}" for t in tokens) + " |"


def times_table() -> Iterator[str]:
    """One Markdown line per case: estimated ms of the KV step, and the other forms as multiples of it, by device."""
    yield (
        "| model | batch | context | " + " | ".join(f"{name}: kv ms, {', '.join(FORMS[1:])}" for name in DEVICES) + " |"
    )
    yield "|---|---:|---:|" + "---:|" * len(DEVICES)
    for name, devices, batch, context in cases():
        cells = []
        for device in DEVICES:
            model = CostModel(MODELS[name], HARDWARE[device], devices=devices)
            kv, *others = (count(form, model, batch, context).seconds(model) for form in FORMS)
            cells.append(f"{1e3 * kv:.1f}, " + ", ".join(f"{seconds / kv:.2f}" for seconds in others))
        yield f"| {name} x{devices} | {batch} | {context} | " + " | ".join(cells) + " |"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--times", action="store_true", help="estimated times instead of bytes")
    args = parser.parse_args()
    tables = [times_table()] if args.times else [constants_table(), room_table(), bytes_table()]
    print("\n\n".join("\n".join(table) for table in tables))


if __name__ == "__main__":
    main()
