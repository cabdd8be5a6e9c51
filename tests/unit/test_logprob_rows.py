"""Log-probabilities that are kept packed read back as they were."""

import gc
import math
import pickle

import numpy as np
import pytest

from apt_jax.logprob_rows import LogprobRows
from apt_jax.output import TokenLogprobs

FIRST = TokenLogprobs(7, -0.1, 3, ((9, -0.05), (7, -0.1)))
SECOND = TokenLogprobs(2**31 - 1, -math.inf, 50_000, ())


def test_what_was_added_is_read_again():
    rows = LogprobRows([FIRST])
    rows.append(SECOND)
    rows.extend(LogprobRows([FIRST, SECOND]))
    rows.extend(iter([FIRST]))
    assert [*rows] == [FIRST, SECOND, FIRST, SECOND, FIRST]
    assert (len(rows), rows[1], rows[-1]) == (5, SECOND, FIRST)
    assert rows[1:3] == [SECOND, FIRST] and isinstance(rows[1:3], LogprobRows)
    with pytest.raises(IndexError):
        rows[5]


def test_rows_are_equal_to_any_sequence_of_the_same_entries():
    rows = LogprobRows([FIRST, SECOND])
    assert rows == [FIRST, SECOND] and rows == (FIRST, SECOND) and rows == LogprobRows([FIRST, SECOND])
    assert rows != [SECOND, FIRST] and rows != [FIRST] and rows != None  # noqa: E711
    assert pickle.loads(pickle.dumps(rows)) == rows
    assert repr(LogprobRows([SECOND])) == f"LogprobRows([{SECOND}])"


@pytest.mark.parametrize("num_top", [0, 1, 20])
def test_arrays_of_a_device_are_the_entries_that_they_hold(num_top):
    top_ids = np.arange(3 * num_top, dtype=np.int32).reshape(3, num_top)
    top_logprobs = np.float32(-0.1) - top_ids.astype(np.float32)
    rows = LogprobRows([FIRST])
    rows.extend_from_arrays(
        *(np.array([5, 6, 7], np.int32), np.array([1, 2, 3], np.int32), np.array([-0.3, -np.inf, -2], np.float32)),
        *(top_ids, top_logprobs),
    )
    tops = [
        tuple(zip(ids, values, strict=True))
        for ids, values in zip(top_ids.tolist(), top_logprobs.tolist(), strict=True)
    ]
    assert [*rows] == [
        FIRST,
        TokenLogprobs(5, float(np.float32(-0.3)), 1, tops[0]),
        TokenLogprobs(6, -math.inf, 2, tops[1]),
        TokenLogprobs(7, -2.0, 3, tops[2]),
    ]


def test_a_long_answer_gives_the_garbage_collector_nothing_to_look_at():
    """Each object would be looked at, with Python's lock held, as long as the answer grows."""
    ids, values = np.zeros((1000, 20), np.int32), np.zeros((1000, 20), np.float32)
    rows = LogprobRows()
    gc.collect()
    before = len(gc.get_objects())
    rows.extend_from_arrays(ids[:, 0], ids[:, 0], values[:, 0], ids, values)
    rows.extend(TokenLogprobs(i, -1.0, 1, tuple((k, -1.0) for k in range(20))) for i in range(1000))
    gc.collect()
    assert len(rows) == 2000 and len(gc.get_objects()) - before < 50
