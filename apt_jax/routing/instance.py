"""The report of an instance to a router, counted from the scheduler's state.

The engine, the simulator and a replica behind a router all call `instance_load`. It walks over the unfinished
requests once: tens of microseconds, cheap enough to do after every iteration.
"""

from dataclasses import dataclass

import numpy as np

from apt_jax.cache import KINDS
from apt_jax.request import Request
from apt_jax.scheduling.costs.cost_model import CostModel
from apt_jax.scheduling.costs.step_load import StepLoad
from apt_jax.scheduling.length import LengthPredictor
from apt_jax.scheduling.state import SchedulerState


@dataclass(frozen=True, slots=True)
class InstanceLoad:
    """One instance's report. Plain numbers: it survives JSON and pickle.

    Blocks are blocks of the pool: a page of a KV request takes two, one of a hidden request takes one.

    Attributes:
        instance: its name, the same in every report, by which the router remembers what it sent there.
        time_s: when it was counted, in the ROUTER's clock. Clocks of two machines differ: the receiver of a report from
            another machine replaces this by the time at which it asked for the report.
        num_waiting: requests without blocks.
        num_running: requests with blocks.
        pending_s: seconds since each unfinished request's last token, or arrival, summed over them (the paper's
            cumulative pending time).
        total_blocks: size of the pool.
        free_blocks: blocks that nobody holds.
        needed_blocks: blocks that the waiting requests' known tokens take in the smallest kind allowed here.
        block_size: tokens per page.
        blocks_per_page: of the smallest kind allowed here.
        queued_tokens: prompt tokens to be computed, of waiting requests and of those in the middle of a prefill; those
            that are cached do not count.
        backlog_s: predicted seconds of the iterations that compute `queued_tokens`, at least of one iteration; None
            without a cost model.
        token_s: predicted seconds that one more prompt token adds to these; None without a cost model.
        freed_blocks_per_s: predicted blocks per second that requests give back when they finish, less those by which
            the running ones grow; may be negative; None without a cost model or a length predictor.
    """

    instance: str
    time_s: float
    num_waiting: int
    num_running: int
    pending_s: float
    total_blocks: int
    free_blocks: int
    needed_blocks: int
    block_size: int
    blocks_per_page: int
    queued_tokens: int
    backlog_s: float | None = None
    token_s: float | None = None
    freed_blocks_per_s: float | None = None

    @property
    def num_requests(self) -> int:
        """Unfinished requests."""
        return self.num_waiting + self.num_running

    @property
    def taken_blocks(self) -> int:
        """Blocks held or waited for; more than `total_blocks` where requests must wait."""
        return self.total_blocks - self.free_blocks + self.needed_blocks

    def blocks_for(self, tokens: float) -> float:
        """Blocks that a request of `tokens` tokens takes here at least."""
        return -(-tokens // self.block_size) * self.blocks_per_page


def instance_load(
    state: SchedulerState,
    cost_model: CostModel | None,
    now: float,
    *,
    instance: str = "",
    predictor: LengthPredictor | None = None,
) -> InstanceLoad:
    """The report of the instance whose scheduler state this is. Pure.

    Args:
        state: queues and blocks, between or during iterations.
        cost_model: seconds of an iteration; None leaves the predictions out.
        now: seconds, in the clock of the requests' arrivals.
        instance: its name.
        predictor: output lengths; None leaves out what needs them.
    """
    waiting, running, block_size = state.waiting, state.running, state.pool.block_size
    per_page = min(kind.blocks_per_page for kind in state.limits.kinds)
    since_s, pages, queued = 0.0, 0, 0
    for request in waiting:
        tokens = request.num_tokens
        since_s += request.arrival_s if request.last_token_s is None else request.last_token_s
        pages += -(-tokens // block_size)
        queued += min(state.tokens_to_compute(request, kind) for kind in state.limits.kinds)
    context_tokens, decodes = [0] * len(KINDS), [0] * len(KINDS)
    for request in running:
        tokens, uncomputed = request.num_tokens, request.num_uncomputed_tokens
        since_s += request.arrival_s if request.last_token_s is None else request.last_token_s
        if uncomputed > 1:
            queued += uncomputed
        assert request.table is not None
        context_tokens[request.table.kind.index] += tokens
        decodes[request.table.kind.index] += 1
    backlog_s = token_s = freed_blocks_per_s = None
    if cost_model is not None:
        decode = StepLoad(
            decode_requests=len(running), context_tokens=tuple(context_tokens), decodes=tuple(decodes)
        )  # fmt: skip
        backlog_s = _backlog_s(cost_model, decode, queued, state.limits.max_num_batched_tokens)
        token_s = cost_model.token_s * cost_model.scales.dense * cost_model.scales.compute
        if predictor is not None:
            freed = _freed_blocks(running, _remaining_tokens(predictor, running), block_size)
            freed_blocks_per_s = freed / max(cost_model.step_s(decode), 1e-9)
    num_unfinished = len(waiting) + len(running)
    return InstanceLoad(
        instance=instance,
        time_s=now,
        num_waiting=len(waiting),
        num_running=len(running),
        pending_s=num_unfinished * now - since_s,
        total_blocks=state.pool.num_blocks,
        free_blocks=state.pool.num_free,
        needed_blocks=pages * per_page,
        block_size=block_size,
        blocks_per_page=per_page,
        queued_tokens=queued,
        backlog_s=backlog_s,
        token_s=token_s,
        freed_blocks_per_s=freed_blocks_per_s,
    )


def _backlog_s(model: CostModel, decode: StepLoad, queued_tokens: int, max_num_batched_tokens: int) -> float:
    """Seconds of the iterations that compute the queued tokens together with one token of every running request."""
    room = max(1, max_num_batched_tokens - decode.decode_requests)
    steps = max(1, -(-queued_tokens // room))
    step = StepLoad(
        prefill_tokens=-(-queued_tokens // steps),
        decode_requests=decode.decode_requests,
        context_tokens=decode.context_tokens,
        samples=decode.decode_requests,
        decodes=decode.decodes,
    )
    return steps * model.step_s(step)


def _freed_blocks(running: list[Request], remaining: np.ndarray, block_size: int) -> float:
    """Expected blocks given back in one decode iteration, less growth: each ends with probability 1 / remaining."""
    held = np.array([r.table.num_blocks for r in running if r.table is not None], np.float64)
    per_page = sum(r.table.kind.blocks_per_page for r in running if r.table is not None)
    return float((held / remaining).sum()) - per_page / block_size


def _remaining_tokens(predictor: LengthPredictor, requests: list[Request]) -> np.ndarray:
    prompt = np.array([len(r.prompt_token_ids) for r in requests], np.float64)
    return predictor.remaining_tokens(prompt, np.array([r.num_generated_tokens for r in requests], np.float64))
