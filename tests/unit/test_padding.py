"""Padding of the default shapes on real request lengths stays under a quarter of the token slots."""

from pathlib import Path

import pytest

from experiments.padding_waste import measure, read_lengths

TRACE = Path(__file__).parents[3] / "shared" / "traces" / "sharegpt_v3_firstturn_le2048.csv"


@pytest.mark.parametrize(("rate", "seqs", "tokens"), [(0.5, 64, 512), (2.0, 64, 512), (2.0, 256, 2048)])
def test_sharegpt_padding_is_under_a_quarter(rate, seqs, tokens):
    if not TRACE.exists():
        pytest.skip(f"the trace {TRACE.name} is not here; it does not ship with the project")
    found = measure(read_lengths(TRACE)[:150], rate=rate, max_num_seqs=seqs, max_num_batched_tokens=tokens)
    assert found.prefill_tokens > 10_000
    assert found.decode_tokens > 10_000
    assert found.waste < 0.25
