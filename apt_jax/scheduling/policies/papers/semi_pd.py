"""semi-PD in time: prompts and decodes share every iteration, and measured latencies set the shares.

semi-PD gives prefill a share x of the chip and decode the rest, side by side. One program has no such shares, so x is
the prompts' share of each iteration's seconds: a chunk budget of x / (1 - x) times the seconds of the decodes. After
every window the latencies of the requests that ended in it are compared with their SLOs: TTFT is taken to be
a / (x - l) + b, l being the share that prompts need, and TPOT a / (1 - x) + b. If only one of the two is missed, its
share is raised step by step until the estimate holds; if both are, nothing changes. Source: arXiv 2504.19867, section 4
"""

from dataclasses import dataclass

import numpy as np

from apt_jax.cache import KINDS, per_kind
from apt_jax.ranges import check_finite
from apt_jax.request import Request
from apt_jax.scheduling.costs.step_load import StepLoad
from apt_jax.scheduling.plan import Plan
from apt_jax.scheduling.policies.interface import PolicyContext
from apt_jax.scheduling.policies.packing import plan_mixed
from apt_jax.scheduling.state import SchedulerState

LEAST_SHARE, MOST_SHARE = 0.05, 0.95
STEP = 0.05
ENOUGH = 10  # requests in a window
PERCENTILE = 90


@dataclass(frozen=True)
class SemiPdOptions:
    """`share`: of an iteration's seconds that prompts get at first. `window_s`: between two changes of it."""

    share: float = 0.5
    window_s: float = 10.0

    def __post_init__(self) -> None:
        check_finite(self)
        if not LEAST_SHARE <= self.share <= MOST_SHARE:
            raise ValueError(f"share={self.share} must be in {LEAST_SHARE}..{MOST_SHARE}")
        if not self.window_s > 0:
            raise ValueError(f"window_s={self.window_s} must be greater than 0")


class Shares:
    """The share of prompts, and what the window has shown: the feedback loop of both forms, in time and in space."""

    def __init__(self, options: SemiPdOptions):
        self.share, self._window_s = options.share, options.window_s
        self._began_s: float | None = None  # of the window
        self._latencies: list[tuple[float, float]] = []  # TTFT and TPOT of each that ended, in units of their SLOs
        self._prompt_s = 0.0  # seconds that the prompts of the window need of the whole chip

    def at(self, now: float) -> float:
        """The share from `now` on."""
        self._began_s = now if self._began_s is None else self._began_s
        if now - self._began_s >= self._window_s and len(self._latencies) >= ENOUGH:
            self._adjust(now - self._began_s)
            self._began_s, self._latencies, self._prompt_s = now, [], 0.0
        return self.share

    def computed(self, seconds: float) -> None:
        """Prompts were planned that need so many seconds of the whole chip."""
        self._prompt_s += seconds

    def ended(self, ttft: float, tpot: float) -> None:
        """A request has ended, with these latencies in units of its SLO."""
        self._latencies.append((ttft, tpot))

    def _adjust(self, seconds: float) -> None:
        """Change the share by what the window has shown."""
        found = np.array(self._latencies)
        ttft, tpot = np.percentile(found, PERCENTILE, axis=0).tolist()
        least_ttft, least_tpot = found.min(axis=0).tolist()
        if (ttft > 1) == (tpot > 1):
            return
        if ttft > 1:
            needed = min(self._prompt_s / seconds, self.share - STEP / 2)
            slope = (ttft - least_ttft) * (self.share - needed)
            while self.share < MOST_SHARE - 1e-9:
                self.share = min(self.share + STEP, MOST_SHARE)
                if slope / (self.share - needed) + least_ttft <= 1:
                    break
        else:
            slope = (tpot - least_tpot) * (1 - self.share)
            while self.share > LEAST_SHARE + 1e-9:
                self.share = max(self.share - STEP, LEAST_SHARE)
                if slope / (1 - self.share) + least_tpot <= 1:
                    break


class SemiPd:
    """Decode everything beside as many prompt tokens as their share of the seconds allows."""

    Options = SemiPdOptions
    uses_cost_model = True

    def __init__(self, context: PolicyContext | None = None, options: SemiPdOptions | None = None):
        self._context, self.shares = context or PolicyContext(), Shares(options or SemiPdOptions())

    def schedule(self, state: SchedulerState, now: float) -> Plan:
        """Decodes and prompt chunks together."""
        share = self.shares.at(now)
        tokens = state.limits.max_num_batched_tokens
        decodes, decode_s = self._decode_s(state)
        model = self._context.cost_model
        if model is not None and decodes:
            tokens = decodes + int(share / (1 - share) * decode_s / self._token_s)
        plan = plan_mixed(state, tokens, least_tokens=1)
        prompts = plan.num_tokens - sum(e.request.is_decoding for e in plan.scheduled)
        self.shares.computed(prompts * self._token_s)
        return plan

    def finished(self, request: Request, now: float) -> None:
        """Note how late it was."""
        first, last, count = request.first_token_s, request.last_token_s, request.num_generated_tokens
        if first is not None and last is not None:
            tpot_s = (last - first) / max(count - 1, 1)
            ttft_s = first - request.arrival_s
            self.shares.ended(ttft_s / request.slo.ttft_s, tpot_s / request.slo.tbt_s)

    @property
    def _token_s(self) -> float:
        """Seconds of a prompt token's products."""
        model = self._context.cost_model
        return 1e-4 if model is None else model.prompt_token_s

    def _decode_s(self, state: SchedulerState) -> tuple[int, float]:
        """Running requests that decode, and the seconds of an iteration with them alone."""
        progress, model = state.running_progress(), self._context.cost_model
        decoding = progress.is_decoding
        count = int(decoding.sum())
        if model is None or not count:
            return count, 0.0
        tokens, kinds = progress.tokens[decoding], progress.kind[decoding]
        of_kind = [kinds == kind.index for kind in KINDS]
        load = StepLoad(
            decode_requests=count, samples=count,
            context_tokens=per_kind(lambda kind: int(tokens[of_kind[kind.index]].sum())),
            decodes=per_kind(lambda kind: int(of_kind[kind.index].sum())),
        )  # fmt: skip
        return count, model.step_s(load)
