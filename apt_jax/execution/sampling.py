"""Choosing the next token on the device, vectorised over rows; every row has its own parameters.

Order of the steps, as in vLLM: allowed tokens, logit bias and min_tokens, penalties, temperature, min_p, top_k,
top_p, draw. Work that no row asks for is skipped by `lax.cond`, all of it at once where no row asks for anything.
Shape letters: R rows, V vocabulary, M history width, W words of 32 tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from apt_jax.batching.sampling_rows import Sampling
from apt_jax.sampling.params import MAX_LOGPROBS

_MASKED = -jnp.inf


class Sampled(NamedTuple):
    """What one iteration reads back for each row."""

    token: jax.Array  # int32 [R]
    is_finite: jax.Array  # bool [R]: the logits held no NaN or infinity
    logprob: jax.Array  # float32 [R]: of the token, under the model's own logits
    rank: jax.Array  # int32 [R]: 1 for the most likely token
    top_ids: jax.Array  # int32 [R, MAX_LOGPROBS]
    top_logprobs: jax.Array  # float32 [R, MAX_LOGPROBS]


def sampled_shapes(rows: int, vocab_size: int) -> Sampled:
    """Shapes of what `sample` returns."""
    number, whole = (jax.ShapeDtypeStruct((rows,), dtype) for dtype in (jnp.float32, jnp.int32))
    top = rows, min(MAX_LOGPROBS, vocab_size)
    top_ids, top_logprobs = (jax.ShapeDtypeStruct(top, dtype) for dtype in (jnp.int32, jnp.float32))
    return Sampled(whole, jax.ShapeDtypeStruct((rows,), jnp.bool_), number, whole, top_ids, top_logprobs)  # type: ignore[arg-type]


class Scored(NamedTuple):
    """Log-probability and rank of given tokens, for each row."""

    logprob: jax.Array  # float32 [R]; not a number where the logits are none
    rank: jax.Array  # int32 [R]
    top_ids: jax.Array  # int32 [R, MAX_LOGPROBS]
    top_logprobs: jax.Array  # float32 [R, MAX_LOGPROBS]


def sample(
    logits: jax.Array,
    history: jax.Array,
    num_tokens: jax.Array,
    sampling: Sampling,
    allowed: jax.Array | None = None,
) -> Sampled:
    """Choose each row's next token.

    Args:
        logits: float32 `[R, V]`.
        history: int32 `[R, M]` token ids of prompt and output.
        num_tokens: int32 `[R]` tokens in `history` that count.
        sampling: parameters of each row. A seed and a position give the same draw in any batch.
        allowed: int32 `[R, W]`, token t is bit t % 32 of word t // 32; of rows that are restricted.
    """
    is_finite = jnp.all(jnp.isfinite(logits), axis=-1)
    asks = (
        (sampling.temperature > 0) | _too_early(num_tokens, sampling) | _penalised(sampling) | sampling.wants_logprobs
    )
    asks |= jnp.any(sampling.bias_values != 0, axis=-1) | sampling.is_restricted

    def most_likely() -> tuple[jax.Array, Scored]:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), _nothing(logits)

    # one condition around all: each of those inside would copy the logits
    token, scored = jax.lax.cond(
        jnp.any(asks), lambda: _choose(logits, history, num_tokens, sampling, allowed), most_likely
    )
    return Sampled(token, is_finite, *scored)


def _choose(
    logits: jax.Array, history: jax.Array, num_tokens: jax.Array, sampling: Sampling, allowed: jax.Array | None
) -> tuple[jax.Array, Scored]:
    raw = logits
    if allowed is not None:
        logits = _restrict(logits, sampling, allowed)
    logits = _bias(logits, num_tokens, sampling)
    logits = _penalise(logits, history, num_tokens, sampling)
    greedy = jnp.argmax(logits, axis=-1)
    random = sampling.temperature > 0

    def draw() -> jax.Array:
        below_best = logits - logits.max(-1, keepdims=True)  # so that a tiny temperature cannot overflow to +inf
        divisor = jnp.maximum(sampling.temperature, jnp.finfo(jnp.float32).tiny)  # a subnormal one may count as zero
        scaled = below_best / jnp.where(random, divisor, 1.0)[:, None]
        scaled = _truncate(scaled, sampling)

        def gumbel(seed: jax.Array, position: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), position)
            return jax.random.gumbel(key, logits.shape[1:], jnp.float32)

        drawn = jnp.argmax(scaled + jax.vmap(gumbel)(sampling.seed, num_tokens), axis=-1)
        return jnp.where(random, drawn, greedy)

    token = jax.lax.cond(jnp.any(random), draw, lambda: greedy).astype(jnp.int32)
    return token, _logprobs(raw, token, sampling.wants_logprobs)


def _restrict(logits: jax.Array, sampling: Sampling, allowed: jax.Array) -> jax.Array:
    def restrict() -> jax.Array:
        token = jnp.arange(logits.shape[1])
        bits = allowed[:, token // 32] >> (token % 32)
        return jnp.where((bits & 1) == 1, logits, _MASKED)

    return jax.lax.cond(jnp.any(sampling.is_restricted), restrict, lambda: logits)


def _too_early(num_tokens: jax.Array, sampling: Sampling) -> jax.Array:
    """bool `[R]`: rows that may not end yet."""
    return num_tokens - sampling.prompt_tokens < sampling.min_tokens


def _bias(logits: jax.Array, num_tokens: jax.Array, sampling: Sampling) -> jax.Array:
    row = jnp.arange(logits.shape[0])[:, None]

    def add_bias() -> jax.Array:
        return logits.at[row, sampling.bias_ids].add(sampling.bias_values, mode="drop")

    logits = jax.lax.cond(jnp.any(sampling.bias_values != 0), add_bias, lambda: logits)
    too_early = _too_early(num_tokens, sampling)

    def forbid_end() -> jax.Array:
        ids = jnp.where(too_early[:, None], sampling.end_ids, logits.shape[1])
        return logits.at[row, ids].set(_MASKED, mode="drop")

    return jax.lax.cond(jnp.any(too_early), forbid_end, lambda: logits)


def _penalised(sampling: Sampling) -> jax.Array:
    """bool `[R]`: rows that ask for any penalty."""
    return (sampling.repetition_penalty != 1) | (sampling.presence_penalty != 0) | (sampling.frequency_penalty != 0)


def _penalise(logits: jax.Array, history: jax.Array, num_tokens: jax.Array, sampling: Sampling) -> jax.Array:
    def penalise() -> jax.Array:
        R, V = logits.shape
        row, column = jnp.arange(R)[:, None], jnp.arange(history.shape[1])
        known = column < num_tokens[:, None]
        in_output = known & (column >= sampling.prompt_tokens[:, None])
        count = jnp.zeros((R, V), jnp.int32).at[row, jnp.where(in_output, history, V)].add(1, mode="drop")
        seen = jnp.zeros((R, V), bool).at[row, jnp.where(known, history, V)].set(True, mode="drop")
        factor = jnp.where(seen, sampling.repetition_penalty[:, None], 1.0)
        penalised = jnp.where(logits > 0, logits / factor, logits * factor)
        penalised -= sampling.frequency_penalty[:, None] * count
        return penalised - sampling.presence_penalty[:, None] * (count > 0)

    return jax.lax.cond(jnp.any(_penalised(sampling)), penalise, lambda: logits)


def _truncate(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Mask tokens outside min_p, top_k and top_p. Ties at the edge are kept, and the most likely token always is."""

    def min_p() -> jax.Array:
        probs = jax.nn.softmax(logits, axis=-1)
        floor = sampling.min_p[:, None] * probs.max(-1, keepdims=True)
        return jnp.where(probs < floor, _MASKED, logits)

    logits = jax.lax.cond(jnp.any(sampling.min_p > 0), min_p, lambda: logits)
    V = logits.shape[1]
    k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, V), V)
    before_k = logits
    logits = jax.lax.cond(
        jnp.any(k < V),
        lambda: jnp.where(before_k < largest_where(before_k, lambda kept: kept.sum(-1) >= k), _MASKED, before_k),
        lambda: before_k,
    )
    before_p = logits

    def top_p() -> jax.Array:
        probs = jax.nn.softmax(before_p, axis=-1)
        wanted = jnp.minimum(sampling.top_p, 1.0)
        edge = largest_where(probs, lambda kept: jnp.where(kept, probs, 0).sum(-1) >= wanted)
        edge = jnp.minimum(edge, probs.max(-1, keepdims=True))  # a subnormal top_p counts as 0: no token would be left
        return jnp.where((probs < edge) & (sampling.top_p < 1)[:, None], _MASKED, before_p)

    return jax.lax.cond(jnp.any(sampling.top_p < 1), top_p, lambda: before_p)


def largest_where(values: jax.Array, enough) -> jax.Array:  # type: ignore[no-untyped-def]
    """The largest threshold t per row such that `enough(values >= t)`, exactly, without a sort.

    Bisects over the bit patterns of float32 in 32 passes; -inf where even all values are not enough.

    Args:
        values: float32 `[R, V]`.
        enough: maps a bool mask `[R, V]` to bool `[R]`; once true it stays true for larger masks.

    Returns:
        float32 `[R, 1]`.
    """
    low = jnp.full(values.shape[:1], _order_bits(jnp.float32(-jnp.inf)), jnp.int32)
    high = jnp.full(values.shape[:1], _order_bits(jnp.float32(jnp.inf)), jnp.int32)
    keys = _order_bits(values)

    def body(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # low is always good enough (or -inf); the answer is in low..high
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)
        good = enough(keys >= middle[:, None])
        return jnp.where(good, middle, low), jnp.where(good, high, middle - 1)

    low, _ = jax.lax.fori_loop(0, 32, body, (low, high))
    return _from_order_bits(low)[:, None]


def _order_bits(values: jax.Array) -> jax.Array:
    """int32 in the same order as the float32 values."""
    bits = jax.lax.bitcast_convert_type(values + 0.0, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _from_order_bits(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits), jnp.float32)


def score(logits: jax.Array, token: jax.Array) -> Scored:
    """Log-probability and rank of each row's `token` (int32 `[R]`) under `logits` (float32 `[R, V]`). Pure."""
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(logprobs, token[:, None], axis=-1)
    rank = 1 + (logprobs > chosen).sum(-1)
    values, ids = jax.lax.top_k(logprobs, min(MAX_LOGPROBS, logits.shape[1]))
    return Scored(chosen[:, 0], rank.astype(jnp.int32), ids.astype(jnp.int32), values)


def _logprobs(logits: jax.Array, token: jax.Array, wanted: jax.Array) -> Scored:
    return jax.lax.cond(jnp.any(wanted), lambda: score(logits, token), lambda: _nothing(logits))


def _nothing(logits: jax.Array) -> Scored:
    """Zeros in the shapes of results that no row asked for."""
    shapes = jax.eval_shape(score, logits, jax.ShapeDtypeStruct(logits.shape[:1], jnp.int32))
    return Scored(*(jnp.zeros(leaf.shape, leaf.dtype) for leaf in shapes))
