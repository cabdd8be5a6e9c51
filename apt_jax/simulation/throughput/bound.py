"""The fluid bound: the highest rate that a device can serve for long, whatever the order of service.

A request of p prompt and o output tokens holds about p + k tokens while it computes output token k, so over its life
it takes o (p + o/2) token-steps of the pool. A pool of M tokens then finishes M / E[o (p + o/2)] requests a step, and
a step takes as long as one in which that many tokens are read, and the prompts of as many new requests are computed
behind the decodes. A policy loses against it by blocks that stand empty, by prompts that wait, and by work done twice.
Where prefixes are cached, a beginning that all share is held once, and only what no earlier request had is computed.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from apt_jax.cache import KINDS, CacheKind
from apt_jax.scheduling.costs.cost_model import CostModel
from apt_jax.scheduling.costs.step_load import StepLoad


def fluid_bound(
    prompt_tokens: NDArray[np.int64], output_tokens: NDArray[np.int64], cost_model: CostModel, *,
    kinds: Sequence[CacheKind], num_blocks: int, block_size: int, max_num_seqs: int,
    uncached_tokens: NDArray[np.int64] | None = None, shared_tokens: int = 0,
) -> float:  # fmt: skip
    """Requests per second that one pool can serve for long, of requests drawn evenly from `[n]` lengths. Pure.

    Args:
        prompt_tokens: `[n]`.
        output_tokens: `[n]`.
        cost_model: seconds of an iteration.
        kinds: the cache kinds allowed; the bound is that of the best of them for all requests.
        num_blocks: of the pool.
        block_size: tokens per block.
        max_num_seqs: requests in an iteration.
        uncached_tokens: `[n]` of each prompt, those that are computed; None: all.
        shared_tokens: the first ones of every prompt, which are held once.
    """
    uncached = prompt_tokens if uncached_tokens is None else uncached_tokens
    return max(
        _of_kind(prompt_tokens, output_tokens, uncached, shared_tokens, cost_model, kind,
                 max(num_blocks // kind.blocks_per_page * block_size - shared_tokens, 0), max_num_seqs)
        for kind in kinds
    )  # fmt: skip


def _of_kind(
    prompt: NDArray[np.int64], output: NDArray[np.int64], uncached: NDArray[np.int64], shared: int,
    cost_model: CostModel, kind: CacheKind, pool_tokens: int, max_num_seqs: int,
) -> float:  # fmt: skip
    read = (output * (prompt + output / 2)).mean()  # token-steps of a request
    held = read - shared * output.mean()  # those that are its own
    mean_output = output.mean()
    requests = min(pool_tokens * mean_output / held, max_num_seqs)  # at a time
    ends = requests / mean_output  # in a step, and as many begin
    context = requests * read / mean_output
    load = StepLoad(
        prefill_tokens=_whole(ends * uncached.mean()),
        decode_requests=_whole(requests),
        context_tokens=tuple(_whole(context) if k is kind else 0 for k in KINDS),
        samples=_whole(requests + ends),
        decodes=tuple(_whole(requests) if k is kind else 0 for k in KINDS),
    )
    # pairs apart: a policy may gather prompts in few iterations, so what hidden decodes pay beside them is no bound
    pairs = uncached * (prompt - uncached) + uncached * (uncached + 1) / 2
    pairs_s = ends * float(pairs.mean()) * cost_model.pair_s
    return float(ends / (cost_model.step_s(load) + pairs_s))


def _whole(number: float) -> int:
    return round(float(number))
