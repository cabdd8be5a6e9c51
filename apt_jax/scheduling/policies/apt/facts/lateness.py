"""Which requests can no longer attain their SLO, how they are demoted, and the bound on their wait.

A late request is demoted: its value shrinks to 1/10,000, so it never takes memory from a request that can still be
served in time (Apt-Serve, section 5). Alone that starves it for as long as others keep coming. The aging fallback
bounds the wait: late requests that have been in the system for `patience_s` queue, in order of arrival, for a lane.
A request that has entered the lane is scheduled in every iteration and cannot be preempted, and leaves when finished;
should those in it outgrow the pool by themselves, the newest of them leaves and queues again.

Bound, in iterations. A request is eligible once it is late and its patience is over, and stays so: being late does not
turn back. The oldest in the lane gets the first chunk of every iteration and nobody takes its memory, so it computes
min(16, what is left of its prompt) tokens or more, or one output token. (It needs room for 16 tokens beside one for
each of `max_num_seqs`.) With n tokens to compute and o to generate it is served by w = ceil(n / 16) + o iterations.
Only older requests, and those in the lane already, go before a request that is eligible. So while the lane does not
outgrow the pool, a request is finished after at most the sum of w over those and itself (twice, where it may be KV: one
that outgrows the pool as KV begins again as hidden), whatever else arrives. One that the lane sends back computes its
tokens again, each time after an older one has ended.

In seconds: let an iteration with the decodes alone take T, 16 prompt tokens with their cached prefix C, and let P be
the tightest promise of those in time (of all, if all are late): a gap or a first token. `budget.py` makes an iteration
at most max(P / 4, 2 T, T + C) long by the cost model, attention among the prompts' own tokens, logits, padding and
weights read again for mixed kinds not counted. `tests/unit/test_apt_lane.py` holds the policy to both.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np

from apt_jax.scheduling.policies.apt.facts.queue import Queue
from apt_jax.scheduling.policies.apt.knapsack.problem import Bools, Floats, Ints

Fallback = Literal["aging", "constant", "none"]
Remaining = Callable[[], Floats | None]  # predicted tokens to come of each, None without prediction
DEMOTED_VALUE = 1e-4  # of the paper's released code


def is_late(queue: Queue, pending_s: Floats, remaining_tokens: Remaining, prefill_s: Floats | float) -> Bools:
    """`[n]` whether a request can no longer attain its SLO, strictly read.

    That is so when its first token or a stall limit is overdue, or will be even if its prompt is computed at once,
    which takes `prefill_s`; or when more gaps are too long than the 99th percentile forgives: one in a hundred of all
    gaps. `remaining_tokens` are the tokens expected to come, asked for where someone has such a gap; without them only
    the gaps so far count.
    """
    late = queue.missed | queue.given_up | (pending_s + prefill_s > queue.limit_s)
    gaps = queue.late_gaps + (pending_s > queue.tbt_slo_s)
    gaps[~queue.started] = 0
    if gaps.any():
        remaining = remaining_tokens()
        total = queue.generated + (0 if remaining is None else remaining)
        late |= gaps > np.floor(np.maximum(total - 1, 0) / 100)
    return late


def is_overdue(queue: Queue, pending_s: Floats) -> Bools:
    """`[n]` the released Apt-Serve's test: the next token is late. Forgets earlier misses."""
    return np.asarray(pending_s > queue.slo_s)


def lane(
    waiting: Queue, running: Queue, late_waiting: Bools, late_running: Bools, *, now: float, patience_s: float,
    blocks_waiting: Ints, blocks_running: Ints, share_blocks: int, share_seats: int,
) -> tuple[Bools, Bools]:  # fmt: skip
    """Masks of the waiting and running requests in the lane: who has entered it, then the oldest eligible ones.

    Those that have not entered it yet come in while all fit in its shares of blocks and of seats; at least one is in it
    if any is eligible. `blocks_*` is what each takes in its smallest kind.
    """
    in_w, in_r = late_waiting & waiting.in_lane, late_running & running.in_lane
    seats = int(in_w.sum() + in_r.sum())
    blocks = int(blocks_waiting[in_w].sum() + blocks_running[in_r].sum())
    entries = [
        (queue.requests[i].order, int(needed[i]), mask, i)
        for queue, late, needed, mask in (
            (waiting, late_waiting, blocks_waiting, in_w),
            (running, late_running, blocks_running, in_r),
        )
        for i in np.flatnonzero(late & ~mask & (now - queue.arrival_s > patience_s))[:share_seats].tolist()
    ]
    for _, needed, mask, i in sorted(entries, key=lambda entry: entry[0]):
        seats, blocks = seats + 1, blocks + needed
        if seats > 1 and (seats > share_seats or blocks > share_blocks):
            break
        mask[i] = True
    return in_w, in_r
