"""Logits after bias, min_tokens and penalties, worked out by hand: which tokens count, how often, in which order."""

import jax.numpy as jnp
import numpy as np
import pytest

from apt_jax.execution.sampling import _bias, _penalise
from tests.model.test_sampling import FEW, Row, V, arrays, run
from tests.support.host_loop import EOS

LOGITS = np.zeros(V, np.float32)
LOGITS[10:14] = 4.0, 2.0, -2.0, 1.0
BEHIND = 9  # what stands in the history behind a row's tokens

CASES = {
    # prompt, output, parameters -> the logits that change, all others stay
    "presence counts the first token of the output": ((10,), (11,), {"presence_penalty": 0.5}, {11: 1.5}),
    "presence counts the last token": ((10,), (5, 6, 11), {"presence_penalty": 0.5}, {5: -0.5, 6: -0.5, 11: 1.5}),
    "presence counts a token once": ((4,), (11, 11, 11), {"presence_penalty": 0.5}, {11: 1.5}),
    "presence does not count the prompt": ((10, 11, 12), (), {"presence_penalty": 0.5}, {}),
    "presence may be negative": ((4,), (12,), {"presence_penalty": -1.5}, {12: -0.5}),
    "frequency counts each time": ((11,), (11, 12, 11, 11), {"frequency_penalty": 0.25}, {11: 1.25, 12: -2.25}),
    "frequency does not count the prompt": ((11, 11), (13,), {"frequency_penalty": 0.25}, {13: 0.75}),
    "repetition divides what is positive": ((10,), (11,), {"repetition_penalty": 2.0}, {10: 2.0, 11: 1.0}),
    "repetition multiplies what is negative": ((12,), (), {"repetition_penalty": 2.0}, {12: -4.0}),
    "repetition below 1 encourages": ((11, 12), (), {"repetition_penalty": 0.5}, {11: 4.0, 12: -1.0}),
    "repetition counts once": ((11, 11), (11,), {"repetition_penalty": 2.0}, {11: 1.0}),
    "repetition goes before the others": (
        (4,), (11, 11), {"repetition_penalty": 2.0, "frequency_penalty": 0.25, "presence_penalty": 0.125}, {11: 0.375},
    ),
    "a penalty of nothing changes nothing": ((10, 11), (12, 13), {}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_logits_after_the_penalties(name):
    prompt, output, params, changes = CASES[name]
    logits, history, num_tokens, sampling = arrays([Row(LOGITS, prompt, output, params), Row(LOGITS, (4,))])
    expected = np.stack([LOGITS, LOGITS])
    for token, value in changes.items():
        expected[0, token] = value
    assert np.array_equal(_penalise(jnp.asarray(logits), history, num_tokens, sampling), expected)


def test_what_stands_behind_the_tokens_is_not_penalised():
    logits = LOGITS.copy()
    logits[BEHIND] = 9.0
    rows = [Row(logits, params={"presence_penalty": 2.0}), Row(logits, params={"frequency_penalty": 2.0})]
    rows += [Row(logits, params={"repetition_penalty": 9.0}), Row(logits)]
    assert run(rows).token.tolist() == [BEHIND] * FEW


@pytest.mark.parametrize(
    ("output", "params", "changes"),
    [
        ((), {"min_tokens": 1}, {EOS: -np.inf, 20: -np.inf}),
        ((5,), {"min_tokens": 1}, {}),
        ((5,), {"min_tokens": 2}, {EOS: -np.inf, 20: -np.inf}),
        ((5,), {"min_tokens": 2, "ignore_eos": True}, {20: -np.inf}),
        ((), {}, {}),
        ((), {"logit_bias": {11: 1.5, 12: -0.5}}, {11: 3.5, 12: -2.5}),
        ((), {"logit_bias": {EOS: 100.0}, "min_tokens": 1}, {EOS: -np.inf, 20: -np.inf}),
    ],
)
def test_logits_after_bias_and_min_tokens(output, params, changes):
    rows = [Row(LOGITS, output=output, params={"stop_token_ids": [20], **params}), Row(LOGITS)]
    logits, _, num_tokens, sampling = arrays(rows)
    expected = np.stack([LOGITS, LOGITS])
    for token, value in changes.items():
        expected[0, token] = value
    assert np.array_equal(_bias(jnp.asarray(logits), num_tokens, sampling), expected)
