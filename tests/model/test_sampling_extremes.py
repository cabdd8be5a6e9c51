"""The sampler at the ends of every parameter's range, against the reference of `test_sampling`."""

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.model.test_sampling import FEW, Row, V, noise, reference_logits, run

EXTREMES = {
    "temperature": (1e-300, 1e-45, 1e-38, 1.2e-38, 1e-10, 1.0, 1e4),
    "top_p": (5e-324, 1e-45, 1e-38, 1.2e-38, 1e-30, 1 - 1e-9, 1.0),
    "min_p": (0.0, 1e-300, 1e-38, 1 - 1e-9, 1.0),
    "top_k": (-1, 0, 1, V, 2**40),
    "repetition_penalty": (1e-4, 1.0, 1e4),
    "logit_bias": ({}, {token: -100.0 for token in range(V)}, {token: 100.0 for token in range(V)}),
}
LOGITS = (noise(12), noise(13, 1e4), np.full(V, 3.0, np.float32), np.full(V, -1e30, np.float32))


@given(
    st.lists(
        st.tuples(st.sampled_from(LOGITS), st.fixed_dictionaries({k: st.sampled_from(v) for k, v in EXTREMES.items()})),
        min_size=FEW,
        max_size=FEW,
    )
)
@settings(max_examples=60, deadline=None)
@example([(LOGITS[0], {"temperature": 1.0, "top_p": 1e-38})] * FEW)
@example([(LOGITS[0], {"temperature": 1e-300, "top_p": 5e-324, "min_p": 1.0})] * FEW)
def test_at_the_ends_of_every_range_a_token_that_may_come_comes(cases):
    """Where top_p, min_p or top_k leave only the most likely tokens, one of those; never a masked one."""
    rows = [Row(logits, params={"seed": 7, **params}) for logits, params in cases]
    for row, found in zip(rows, run(rows).token, strict=True):
        best = reference_logits(row)
        sharp = row.params["temperature"] < 1e-9 or row.params.get("min_p", 0) == 1.0
        if sharp or row.params.get("top_k") == 1 or row.params.get("top_p", 1) < 1e-9:
            assert best[found] >= best.max() - 1e-3 * max(1, abs(best.max())), row
        assert np.isfinite(best[found]), row
