"""Vectors of an int8 cache: how precise they are with outliers planted, and what their reading leaves out and adds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apt_jax.attention.int8 import Channels, Coded, decode, encode
from apt_jax.execution.cache.ranges import channels_of

T, D, N, H = 96, 512, 8, 64
SOME_TEXT = 2000  # tokens of calibration


def test_codes_are_within_half_a_step_and_nothing_is_clipped():
    x = (
        np.random.default_rng(0).standard_normal((7, 64), np.float32)
        * np.logspace(-20, 20, 7, dtype=np.float32)[:, None]
    )
    codes, scales = encode(jnp.asarray(x), 4)
    assert codes.dtype == jnp.int8 and scales.shape == (7, 4)
    assert np.abs(np.asarray(codes)).reshape(7, 4, 16).max(-1).min() == 127, "every group uses the whole range"
    error = np.abs(np.asarray(decode(Coded(codes, scales))) - x).reshape(7, 4, 16)
    assert (error <= np.asarray(scales)[..., None] * 0.501).all()


def test_zeros_stay_zeros_and_what_is_not_finite_stays_so():
    x = np.ones((4, 8), np.float32)
    x[0], x[1, 2], x[2, 5] = 0, np.nan, np.inf
    found = np.asarray(decode(encode(jnp.asarray(x), 2)))
    assert (found[0] == 0).all() and not np.isfinite(found[1, :4]).any() and not np.isfinite(found[2, 4:]).any()
    np.testing.assert_allclose(found[3], 1)
    np.testing.assert_allclose(found[1, 4:], 1, err_msg="another group is not touched")


def layer_with_outliers(count: int, factor: float, seed: int = 0):
    """A layer that computes the same with `count` channels times `factor`: hidden vectors `draw(tokens)`, attention."""
    rng = np.random.default_rng(seed)
    gain, outliers = np.ones(D), rng.choice(D, count, replace=False)
    gain[outliers] = factor
    offset = 0.3 * rng.standard_normal(D)
    offset[outliers] *= 3  # OPT's lie off centre
    Wk, Wv = (rng.standard_normal((D, N, H)) / np.sqrt(D) / gain[:, None, None] for _ in range(2))
    q = 3 * rng.standard_normal((T, N, H)) / np.sqrt(H)

    def draw(tokens: int) -> np.ndarray:
        return (offset + rng.standard_normal((tokens, D))) * gain

    def attend(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
        scores = np.einsum("tnh,cnh->ntc", q, keys)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return np.einsum("ntc,cnh->tnh", weights / weights.sum(-1, keepdims=True), values)

    def keys_values(h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.einsum("cd,dnh->cnh", h, Wk), np.einsum("cd,dnh->cnh", h, Wv)

    return draw, attend, keys_values


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def as_hidden(h: np.ndarray, channels: Channels) -> np.ndarray:
    return np.asarray(channels.vectors(decode(encode(channels.relative(jnp.float32(h)), 1)), jnp.float32))


def as_heads(x: np.ndarray) -> np.ndarray:
    return np.asarray(decode(encode(jnp.float32(x).reshape(len(x), -1), N))).reshape(x.shape)


@pytest.mark.parametrize(("count", "factor"), [(0, 1), (4, 30), (6, 100)])
def test_outlier_channels_cost_nothing_with_static_widths_and_ruin_scales_of_tokens_alone(count, factor):
    draw, attend, keys_values = layer_with_outliers(count, factor)
    calibration, h = draw(SOME_TEXT), draw(T)
    expected = attend(*keys_values(h))
    channels = Channels(*channels_of(calibration.min(0), calibration.max(0)))
    alone = relative(attend(*keys_values(as_hidden(h, Channels(jnp.zeros(D), jnp.ones(D))))), expected)
    assert relative(attend(*keys_values(as_hidden(h, channels))), expected) < 0.02
    assert relative(attend(*map(as_heads, keys_values(h))), expected) < 0.02
    assert alone < 0.03 if factor == 1 else alone > 0.2


@pytest.mark.parametrize(("count", "factor"), [(4, 30), (6, 100)])
@pytest.mark.parametrize("wider", [1, 1.6])
@pytest.mark.parametrize("first", [1, 25])
def test_outlier_tokens_and_text_unlike_the_calibration_text(count, factor, wider, first):
    """A first token 25 times as large, and vectors 1.6 times as wide: the token's own scale takes both in."""
    draw, attend, keys_values = layer_with_outliers(count, factor)
    calibration, h = draw(SOME_TEXT), draw(T)
    centre = calibration.mean(0)
    h = centre + (h - centre) * wider
    h[0] *= first
    channels = Channels(*channels_of(calibration.min(0), calibration.max(0)))
    assert relative(attend(*keys_values(as_hidden(h, channels))), attend(*keys_values(h))) < 0.04


def test_absorbed_attention_over_codes_is_attention_over_the_vectors_they_stand_for():
    """Widths in query and context, the centre once in the context and as a constant in the log-sum-exp."""
    rng = np.random.default_rng(1)
    channels = Channels(*jnp.float32([rng.normal(size=32) * 5, rng.uniform(0.1, 9, 32)]))
    wide, x = (jnp.asarray(rng.standard_normal((n, 32), np.float32)) for n in (5, 40))
    with jax.default_matmul_precision("highest"):
        vectors = channels.vectors(x, jnp.float32)
        plain = wide @ vectors.T
        folded = channels.query(wide) @ x.T
        lse = jax.nn.logsumexp(folded, -1) + channels.constant_score(wide)
        np.testing.assert_allclose(lse, jax.nn.logsumexp(plain, -1), rtol=1e-5)
        found = channels.context(jax.nn.softmax(folded) @ x)
        np.testing.assert_allclose(found, jax.nn.softmax(plain) @ vectors, rtol=1e-3, atol=1e-4)


def test_a_channel_that_hardly_varied_does_not_ruin_the_others_where_it_does():
    least, greatest = -np.ones((2, 8), np.float32), np.ones((2, 8), np.float32)
    greatest[0, 3] = least[0, 3] = 5.0
    centre, width = channels_of(least, greatest)
    assert centre[0, 3] == 5 and width[0, 3] == pytest.approx(5 / 256 / 127)
    greatest[0, 3] = least[0, 3] = 0.5
    assert channels_of(least, greatest)[1][0, 3] == pytest.approx(0.01 / 127)
    np.testing.assert_allclose(np.delete(width[0], 3), 1 / 127)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_large_channel_that_is_constant_may_be_rounded_otherwise_than_when_it_was_measured(dtype):
    """As a checkpoint converted in float16 and served in bfloat16: one channel coarsened all others of every token."""
    h = np.random.default_rng(0).uniform(-1, 1, (SOME_TEXT, 64)).astype(np.float32)
    h[:, 5] = 100.1
    channels = Channels(*channels_of(h.min(0), h.max(0)))
    scales = encode(channels.relative(jnp.asarray(h, dtype)), 1).scales
    assert float(scales.max()) < 1.05


def test_ranges_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match=r"hidden vectors are not finite .* use --cache-dtype auto"):
        channels_of(np.full((1, 4), np.nan), np.ones((1, 4)))
