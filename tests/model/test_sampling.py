"""The sampler against a reference written in numpy float64, with sorts where the sampler bisects.

Two batch shapes only, so that two programs compile. What the draw sees is checked through its frequencies: a token
that the reference masks must never come, and the others must come as often as their probability says.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_st

from apt_jax.batching.sampling_rows import Sampling, empty_sampling, write_sampling
from apt_jax.execution.sampling import largest_where, sample
from apt_jax.sampling.params import MAX_LOGPROBS
from tests.support.host_loop import EOS, make_request

V, M = 32, 24  # vocabulary, and width of the history
MANY, FEW = 512, 4  # rows of the two shapes
DRAWS = 4096

step = jax.jit(sample)


@dataclass
class Row:
    """One row: logits, the tokens so far, and keywords of SamplingParams."""

    logits: np.ndarray
    prompt: Sequence[int] = (4, 5, 6)
    output: Sequence[int] = ()
    params: dict = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.output)

    def request(self):
        request = make_request(len(self.prompt), 1000, **{"temperature": 0.0, "stop_token_ids": [], **self.params})
        request.prompt_token_ids, request.output_token_ids = list(self.prompt), list(self.output)
        return request


def arrays(rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray, np.ndarray, Sampling]:
    """Arguments of `sample`. What stands in the history behind a row's tokens must not matter: it is not zero."""
    history = np.full((len(rows), M), 9, np.int32)
    sampling = empty_sampling(len(rows))
    for r, row in enumerate(rows):
        history[r, : row.num_tokens] = [*row.prompt, *row.output]
        write_sampling(sampling, r, row.request())
    logits = np.array([row.logits for row in rows], np.float32)
    return logits, history, np.array([row.num_tokens for row in rows], np.int32), sampling


def run(rows: Sequence[Row]):
    """Sample for 4 or 512 rows."""
    assert len(rows) in (FEW, MANY)
    return jax.device_get(step(*arrays(rows)))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def reference_logits(row: Row) -> np.ndarray:
    """Bias, min_tokens and penalties: what a greedy row maximises."""
    params, logits = row.request().params, np.array(row.logits, np.float64)
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    if len(row.output) < params.min_tokens:
        ends = [*params.stop_token_ids, *([] if params.ignore_eos else [EOS])]
        logits[ends] = -np.inf
    for token in {*row.prompt, *row.output}:
        positive = logits[token] > 0
        logits[token] *= 1 / params.repetition_penalty if positive else params.repetition_penalty
    for token in row.output:
        logits[token] -= params.frequency_penalty
    for token in set(row.output):
        logits[token] -= params.presence_penalty
    return logits


def keep_min_p(logits: np.ndarray, min_p: float) -> np.ndarray:
    probs = np.exp(log_softmax(logits))
    return np.where(probs < min_p * probs.max(), -np.inf, logits)


def keep_top_k(logits: np.ndarray, top_k: int) -> np.ndarray:
    if not 0 < top_k < V:
        return logits
    return np.where(logits < np.sort(logits)[-top_k], -np.inf, logits)


def keep_top_p(logits: np.ndarray, top_p: float) -> np.ndarray:
    if top_p >= 1:
        return logits
    probs = np.exp(log_softmax(logits))
    descending = np.sort(probs)[::-1]
    last = np.searchsorted(np.cumsum(descending), top_p)
    return np.where(probs < descending[min(last, V - 1)], -np.inf, logits)


def reference_probs(row: Row) -> np.ndarray:
    """What a random row draws from. The order is vLLM's: temperature, min_p, top_k, top_p."""
    params = row.request().params
    logits = reference_logits(row) / params.temperature
    logits = keep_min_p(logits, params.min_p)
    logits = keep_top_k(logits, params.top_k)
    return np.exp(log_softmax(keep_top_p(logits, params.top_p)))


def draw(row: Row, first_seed: int = 0) -> np.ndarray:
    """How often each token comes for seeds first_seed .. first_seed + DRAWS - 1."""
    logits, history, num_tokens, sampling = arrays([row] * MANY)
    counts = np.zeros(V, np.int64)
    for start in range(first_seed, first_seed + DRAWS, MANY):
        seed = np.stack([np.zeros(MANY), np.arange(start, start + MANY)], 1).astype(np.uint32)
        token = step(logits, history, num_tokens, sampling._replace(seed=seed)).token
        counts += np.bincount(np.asarray(token), minlength=V)
    return counts


def assert_drawn_from(counts: np.ndarray, probs: np.ndarray) -> None:
    """Masked tokens never come; for the others Pearson's chi-square stays under its 1 - 1e-4 quantile."""
    assert not counts[probs == 0].any(), f"masked tokens were drawn: {np.flatnonzero(counts * (probs == 0))}"
    expected = probs * counts.sum()
    common = expected >= 5
    pairs = [*zip(counts[common], expected[common], strict=True), (counts[~common].sum(), expected[~common].sum())]
    pairs = [(count, mean) for count, mean in pairs if mean > 0]
    freedom = len(pairs) - 1
    if freedom == 0:
        return
    statistic = sum((count - mean) ** 2 / mean for count, mean in pairs)
    spread = 2 / (9 * freedom)  # Wilson and Hilferty's approximation of the quantile
    assert statistic < freedom * (1 - spread + 3.72 * spread**0.5) ** 3


def from_probs(*probs: float) -> np.ndarray:
    """Logits of the given probabilities for tokens 10, 11, ...; what is left is shared by the others."""
    rest = max(1 - sum(probs), 1e-9) / (V - len(probs))
    values = np.full(V, rest)
    values[10 : 10 + len(probs)] = probs
    return np.log(values).astype(np.float32)


def noise(seed: int, scale: float = 1.5) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=V) * scale).astype(np.float32)


FOUR = from_probs(0.4, 0.3, 0.2, 0.1)
DISTRIBUTIONS = {
    "plain": Row(noise(1), params={"temperature": 1.0}),
    "hot": Row(noise(2), params={"temperature": 2.5}),
    "cold": Row(noise(3), params={"temperature": 0.4}),
    "large logits": Row(noise(3) + 30_000, params={"temperature": 1.0}),
    "top_k": Row(noise(4), params={"temperature": 1.0, "top_k": 7}),
    "top_k of 1": Row(noise(4), params={"temperature": 1.0, "top_k": 1}),
    "top_k past the vocabulary": Row(noise(4), params={"temperature": 1.0, "top_k": 10**12}),
    "top_p": Row(noise(5), params={"temperature": 1.0, "top_p": 0.8}),
    "top_p so small that one is left": Row(noise(5), params={"temperature": 1.0, "top_p": 1e-9}),
    "a subnormal top_p": Row(noise(5), params={"temperature": 1.0, "top_p": 1e-38}),
    "top_p almost 1": Row(noise(5), params={"temperature": 1.0, "top_p": 0.999}),
    "min_p": Row(noise(6), params={"temperature": 1.0, "min_p": 0.2}),
    "min_p of 1": Row(noise(6), params={"temperature": 1.0, "min_p": 1.0}),
    "all of them": Row(noise(7), params={"temperature": 1.3, "top_k": 9, "top_p": 0.9, "min_p": 0.05}),
    "ties at the edge of top_k": Row(from_probs(0.3, 0.2, 0.2, 0.2), params={"temperature": 1.0, "top_k": 2}),
    "ties at the edge of top_p": Row(from_probs(0.3, 0.2, 0.2, 0.2), params={"temperature": 1.0, "top_p": 0.4}),
    "top_k before top_p": Row(FOUR, params={"temperature": 1.0, "top_k": 2, "top_p": 0.57}),
    "min_p before top_p": Row(FOUR, params={"temperature": 1.0, "min_p": 0.6, "top_p": 0.57}),
    "min_p before top_k": Row(FOUR, params={"temperature": 1.0, "min_p": 0.6, "top_k": 3}),
    "temperature before min_p": Row(FOUR, params={"temperature": 2.0, "min_p": 0.6}),
    "temperature before top_p": Row(FOUR, params={"temperature": 3.0, "top_p": 0.65}),
    "bias": Row(noise(8), params={"temperature": 1.0, "logit_bias": {3: 5.0, 9: -100.0, 31: 1.5}}),
    "min_tokens with top_p": Row(
        from_probs(0.1) + 4 * np.eye(V, dtype=np.float32)[EOS],
        params={"temperature": 1.0, "min_tokens": 1, "top_p": 0.9, "stop_token_ids": [10]},
    ),
    "penalties before temperature": Row(
        noise(9), (4, 5, 5), (6, 6, 7),
        {"temperature": 0.8, "repetition_penalty": 1.4, "presence_penalty": 0.6, "frequency_penalty": 0.5},
    ),
    "bias before penalties": Row(
        noise(10), (4, 5), (6,), {"temperature": 1.0, "repetition_penalty": 3.0, "logit_bias": {4: 4.0, 6: 6.0}}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_tokens_come_as_often_as_the_reference_says(name):
    assert_drawn_from(draw(DISTRIBUTIONS[name]), reference_probs(DISTRIBUTIONS[name]))


def test_the_cases_of_order_would_notice_another_order():
    """Left: the other order. Each keeps other tokens than the sampler must."""
    flat = log_softmax(FOUR.astype(np.float64))
    others = {
        "top_k before top_p": keep_top_k(keep_top_p(flat, 0.57), 2),
        "min_p before top_p": keep_min_p(keep_top_p(flat, 0.57), 0.6),
        "temperature before min_p": keep_min_p(flat, 0.6),
        "temperature before top_p": keep_top_p(flat, 0.65),
    }
    for name, logits in others.items():
        assert (np.isfinite(logits) != (reference_probs(DISTRIBUTIONS[name]) > 0)).any(), name
    row = DISTRIBUTIONS["bias before penalties"]
    late = reference_logits(Row(row.logits, row.prompt, row.output, {"repetition_penalty": 3.0})) + 4 * np.eye(V)[4]
    assert abs(late[4] - reference_logits(row)[4]) > 0.5


def test_the_draws_of_one_seed_over_positions_are_independent_too():
    row = Row(noise(1), params={"temperature": 1.0, "seed": 5})
    logits, history, _, sampling = arrays([row] * MANY)
    counts = np.zeros(V, np.int64)
    for start in range(3, 3 + DRAWS, MANY):
        token = step(logits, history, np.arange(start, start + MANY, dtype=np.int32), sampling).token
        counts += np.bincount(np.asarray(token), minlength=V)
    assert_drawn_from(counts, reference_probs(row))


@pytest.mark.parametrize("temperature", [1e-2, 1e-6, 1e-20, 1e-37, 1.2e-38, 1e-40, 1e-50])
def test_a_tiny_temperature_is_greedy(temperature):
    row = Row(noise(11, 100.0), params={"temperature": temperature, "top_p": 0.9})
    assert row.logits[: row.logits.argmax()].max() > 0, "the first positive token must be a wrong answer"
    logits, history, num_tokens, sampling = arrays([row] * FEW)
    seed = np.arange(2 * FEW, dtype=np.uint32).reshape(FEW, 2)
    token = np.asarray(step(logits, history, num_tokens, sampling._replace(seed=seed)).token)
    assert (token == row.logits.argmax()).all()


ids = st.integers(0, V - 1)
greedy_rows = st.builds(
    lambda seed, prompt, output, params: Row(noise(seed, 3.0), prompt, output, params),
    st.integers(0, 10**6),
    st.lists(ids, min_size=1, max_size=12),
    st.lists(ids, max_size=12),
    st.fixed_dictionaries(
        {"min_tokens": st.integers(0, 6), "ignore_eos": st.booleans(), "stop_token_ids": st.lists(ids, max_size=5)},
        optional={
            "repetition_penalty": st.floats(0.3, 4.0),
            "presence_penalty": st.floats(-2.0, 2.0),
            "frequency_penalty": st.floats(-2.0, 2.0),
            "logit_bias": st.dictionaries(ids, st.floats(-6.0, 6.0) | st.just(-100.0), max_size=6),
        },
    ),
)


@given(st.lists(greedy_rows, min_size=FEW, max_size=FEW))
@settings(max_examples=60, deadline=None)
def test_greedy_takes_the_best_after_bias_min_tokens_and_penalties(rows):
    token = run(rows).token
    for row, found in zip(rows, token, strict=True):
        expected = reference_logits(row)
        assert expected[found] >= expected.max() - 1e-4, (row, found)


def test_prompt_and_output_are_told_apart():
    """Repetition counts both; presence and frequency only the output, frequency each time."""
    logits = np.full(V, -5.0)
    logits[[10, 11, 12]] = 3.0, 2.0, 1.0
    penalties = [{"repetition_penalty": 2.0}, {"presence_penalty": 1.5}, {"frequency_penalty": 0.7}]
    found = {}
    for place in ("prompt", "output"):
        tokens = {"prompt": (4,), "output": (), place: (10, 10, 10)}
        first, second, third, off = (Row(logits, params=p, **tokens) for p in (*penalties, {}))
        found[place] = run([first, second, third, off]).token.tolist()
    assert found == {"prompt": [11, 10, 10, 10], "output": [11, 11, 11, 10]}


def test_negative_logits_are_multiplied_by_the_repetition_penalty():
    logits = np.full(V, -9.0)
    logits[[10, 11]] = -1.0, -1.5
    rows = [Row(logits, (10,), (), {"repetition_penalty": p}) for p in (1.0, 1.4, 1.6, 0.5)]
    assert run(rows).token.tolist() == [10, 10, 11, 10]


def test_ends_are_forbidden_until_min_tokens_and_not_longer():
    logits = np.zeros(V)
    logits[[EOS, 20, 21]] = 9.0, 8.0, 1.0
    params = {"min_tokens": 2, "stop_token_ids": [20]}
    rows = [Row(logits, output=(7,) * n, params=params) for n in (0, 1, 2)]
    ignoring = Row(logits, params={**params, "ignore_eos": True})
    assert run([*rows, ignoring]).token.tolist() == [21, 21, EOS, EOS]


def test_greedy_rows_do_not_notice_random_ones_beside_them():
    greedy = Row(noise(20), params={"repetition_penalty": 1.2})
    hot = Row(noise(20), params={"temperature": 50.0, "top_k": 3, "logit_bias": {1: 9.0}, "min_tokens": 5, "seed": 1})
    assert run([greedy, hot, hot, greedy]).token[[0, 3]].tolist() == run([greedy] * FEW).token[:2].tolist()


def seeded(seed: int, position: int, number: int) -> Row:
    return Row(noise(number), (4,) * position, (), {"temperature": 1.0, "seed": seed, "top_p": 0.95})


def test_a_seed_gives_the_same_draw_in_any_batch_and_row():
    others = [Row(noise(n), params={"temperature": 0.9, "seed": n, "top_k": n % 5}) for n in range(MANY)]
    cases = [(seed, position) for seed in (0, 1, 2**40 + 1, -3) for position in (1, 2, 9, 20)]
    large = list(others)
    for number, case in enumerate(cases):
        large[(37 * number + 5) % MANY] = seeded(*case, number)
    in_large = run(large).token
    for number, case in enumerate(cases):
        row = number % FEW
        small = [*others[:row], seeded(*case, number), *others[row + 1 : FEW]]
        assert run(small).token[row] == in_large[(37 * number + 5) % MANY]


def test_seeds_that_differ_anywhere_draw_differently():
    """Also in their high half, in their sign, and in the position."""

    def tokens(seed: int, shift: int = 0) -> tuple[int, ...]:
        row = Row(np.zeros(V), params={"temperature": 1.0, "seed": seed})
        logits, history, _, sampling = arrays([row] * MANY)
        return tuple(step(logits, history, np.arange(MANY, dtype=np.int32) + shift, sampling).token[:16].tolist())

    streams = [tokens(seed) for seed in (0, 1, 2**31, 2**32, 2**32 + 1, -1, 2**63 - 1, -(2**63))] + [tokens(0, 16)]
    assert len(set(streams)) == len(streams)
    assert tokens(2**32) == streams[3]


def test_logprobs_are_those_of_the_model_before_bias_penalties_and_temperature():
    changed = {"logit_bias": {30: 50.0}, "repetition_penalty": 2.0, "temperature": 3.0, "top_k": 2, "logprobs": 5}
    rows = [
        Row(noise(30), params={"logprobs": 3}),
        Row(noise(31), output=(1, 1), params=changed),
        Row(noise(32)),
        Row(noise(33, 20.0), params={"logprobs": 0}),
    ]
    found = run(rows)
    assert found.token[1] == 30
    for r in (0, 1, 3):
        logprobs = log_softmax(rows[r].logits.astype(np.float64))
        token = found.token[r]
        assert found.logprob[r] == pytest.approx(logprobs[token], abs=1e-5)
        assert found.rank[r] == 1 + (logprobs > logprobs[token]).sum()
        assert found.top_ids[r].tolist() == np.argsort(-logprobs)[:MAX_LOGPROBS].tolist()
        assert found.top_logprobs[r] == pytest.approx(np.sort(logprobs)[::-1][:MAX_LOGPROBS], abs=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_flagged_in_their_row_only(bad):
    rows = [Row(noise(n), params={"temperature": 1.0, "seed": n, "logprobs": 1}) for n in range(FEW)]
    good = run(rows)
    rows[2].logits[7] = bad
    found = run(rows)
    assert good.is_finite.all() and found.is_finite.tolist() == [True, True, False, True]
    assert (found.token == good.token)[[0, 1, 3]].all()
    assert (found.top_logprobs == good.top_logprobs)[[0, 1, 3]].all()
    assert 0 <= found.token[2] < V


def test_masked_tokens_do_not_count_as_infinite_logits():
    row = Row(noise(1), params={"min_tokens": 3, "logit_bias": {5: -100.0}})
    assert run([row] * FEW).is_finite.all()


values = numpy_st.arrays(
    np.float32,
    (4, 12),
    elements=st.floats(width=32, allow_nan=False, allow_subnormal=False) | st.sampled_from([-1.0, -0.0, 0.0, 1.0]),
)


@jax.jit
def threshold_of_count(values, wanted):
    return largest_where(values, lambda kept: kept.sum(-1) >= wanted)


@jax.jit
def threshold_of_sum(values, wanted):
    return largest_where(values, lambda kept: jnp.where(kept, values, 0).sum(-1) >= wanted)


@given(values, st.lists(st.integers(1, 13), min_size=4, max_size=4))
@example(np.tile(np.array([-np.inf, np.inf, 0.0, -0.0] * 3, np.float32), (4, 1)), [1, 4, 10, 13])
@settings(max_examples=150, deadline=None)
def test_largest_where_of_a_count_is_the_nth_largest(values, wanted):
    found = np.asarray(threshold_of_count(values, np.array(wanted, np.int32)))
    assert found.shape == (4, 1)
    for row, count, threshold in zip(values, wanted, found[:, 0], strict=True):
        assert threshold == (np.sort(row)[-count] if count <= len(row) else -np.inf)


@given(
    numpy_st.arrays(np.int32, (4, 12), elements=st.integers(0, 50)),
    st.lists(st.integers(1, 700), min_size=4, max_size=4),
)
@settings(max_examples=100, deadline=None)
def test_largest_where_of_a_sum_is_where_the_sorted_sum_reaches_it(weights, wanted):
    """Whole numbers, so that float32 sums are exact."""
    found = np.asarray(threshold_of_sum(weights.astype(np.float32), np.array(wanted, np.float32)))[:, 0]
    for row, total, threshold in zip(weights, wanted, found, strict=True):
        enough = [edge for edge in row if row[row >= edge].sum() >= total]
        assert threshold == max(enough, default=-np.inf)
