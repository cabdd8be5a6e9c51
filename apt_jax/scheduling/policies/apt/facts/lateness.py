"""Which requests can no longer attain their SLO, how they are demoted, and the bound on their wait.

A late request is demoted: its value shrinks to 1/10,000, so it never takes memory from a request that can still be
served in time (Apt-Serve, section 5). Alone that starves it for as long as others keep coming. The aging fallback
bounds the wait: late requests that have been in the system for `patience_s` queue, in order of arrival, for a lane.
A request in the lane is scheduled in every iteration, cannot be preempted, and leaves only when finished.

Bound, in iterations. A request is eligible once it is late and its patience is over, and stays so: being late does not
turn back. The oldest eligible one is always in the lane, its chunk is the first of the iteration, and nobody takes its
memory; so in every iteration it computes min(16, what is left of its prompt) tokens or more, or one output token. (It
needs room for 16 tokens beside one for each of `max_num_seqs`.) With n tokens to compute and o to generate it is served
by w = ceil(n / 16) + o iterations at the head. Let a request become eligible. Only older requests, and those that hold
seats or blocks in the lane already, can be served before it; the head advances in every iteration. If j of the older
ones are still in time then and become late afterwards, each may push those behind it out of the lane, whose work is
lost; so is the work of one that outgrows the pool as KV, and begins again as hidden. So a request is finished after at
most the sum of w over those and itself, and j times the largest w (2 j + 1 times with KV), whatever else arrives.

In seconds: let an iteration with the decodes alone take T, 16 prompt tokens with their cached prefix C, and let P be
the tightest promise: a gap of those that decode or a first token of anyone unfinished. `budget.py` makes an iteration
at most max(P / 4, 2 T, T + C) long by the cost model, attention among the prompts' own tokens, logits, padding and
weights read again for mixed kinds not counted. `tests/unit/test_apt_lane.py` holds the policy to both.
"""

from typing import Literal

import numpy as np

from apt_jax.scheduling.policies.apt.facts.ledger import Queue
from apt_jax.scheduling.policies.apt.knapsack.problem import Bools, Floats, Ints

Fallback = Literal["aging", "constant", "none"]
DEMOTED_VALUE = 1e-4  # of the paper's released code


def is_late(queue: Queue, pending_s: Floats, remaining_tokens: Floats | None, prefill_s: Floats) -> Bools:
    """`[n]` whether a request can no longer attain its SLO, strictly read.

    That is so when its first token or a stall limit is overdue, or will be even if its prompt is computed at once,
    which takes `prefill_s`; or when more gaps are too long than the 99th percentile forgives: one in a hundred of all
    gaps. `remaining_tokens` are the tokens expected to come; without them only the gaps so far count.
    """
    total = queue.generated + (0 if remaining_tokens is None else remaining_tokens)
    forgiven = np.floor(np.maximum(total - 1, 0) / 100)
    gaps = queue.late_gaps + (pending_s > queue.tbt_slo_s)
    overdue = pending_s + prefill_s > queue.limit_s
    return queue.missed | queue.given_up | overdue | (queue.started & (gaps > forgiven))


def is_overdue(queue: Queue, pending_s: Floats) -> Bools:
    """`[n]` the released Apt-Serve's test: the next token is late. Forgets earlier misses."""
    return np.asarray(pending_s > queue.slo_s())


def lane(
    waiting: Queue, running: Queue, late_waiting: Bools, late_running: Bools, *, now: float, patience_s: float,
    blocks_waiting: Ints, blocks_running: Ints, share_blocks: int,
) -> tuple[Bools, Bools]:  # fmt: skip
    """Masks of the waiting and running requests in the lane: the oldest eligible ones, while they fit in its share.

    At least one is in it if any is eligible. `blocks_*` is what each takes in its smallest kind.
    """
    eligible_w = np.flatnonzero(late_waiting & (now - waiting.arrival_s > patience_s))
    eligible_r = np.flatnonzero(late_running & (now - running.arrival_s > patience_s))
    in_w, in_r = np.zeros(len(waiting), np.bool_), np.zeros(len(running), np.bool_)
    entries = [(waiting.requests[i].order, True, i) for i in eligible_w[:16]]
    entries += [(running.requests[i].order, False, i) for i in eligible_r[:16]]
    used = 0
    for _, is_waiting, i in sorted(entries):
        used += int((blocks_waiting if is_waiting else blocks_running)[i])
        if used > share_blocks and (in_w.any() or in_r.any()):
            break
        (in_w if is_waiting else in_r)[i] = True
    return in_w, in_r
