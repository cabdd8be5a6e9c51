"""An engine that gives every request a token per step at a steady rate, for tests of who waits for whom."""

import time
from functools import cache
from typing import Any

from apt_jax.cache import CacheKind
from apt_jax.engine_config import EngineConfig
from apt_jax.model_config import ModelConfig
from apt_jax.output import Output, TokenLogprobs
from apt_jax.request import FinishReason, Request
from apt_jax.scheduling.plan import Plan, Reason, Scheduled
from tests.support.fake_engine import FakeEngine

TOKEN = 120


class SteadyEngine(FakeEngine):
    """`streams` requests at once; one that ignores the end of text never ends."""

    def __init__(self, tokenizer, *, streams: int = 256, period_s: float = 0.004, max_model_len: int = 2048):
        config = EngineConfig(max_num_seqs=streams, max_num_queued_reqs=1024)
        super().__init__(config, tokenizer, num_blocks=8 * streams)
        self.model_config = ModelConfig(vocab_size=4096)
        self.max_model_len = max_model_len
        self._period_s = period_s
        self._next_s = 0.0

    def add(self, *args: Any, **kwargs: Any) -> Request:
        request = super().add(*args, **kwargs)
        if request.params.ignore_eos:
            request.max_new_tokens = 1 << 40
        return request

    def step(self) -> list[Output]:
        time.sleep(max(0.0, self._next_s - time.monotonic()))
        self._next_s = max(self._next_s, time.monotonic() - self._period_s) + self._period_s
        now = time.monotonic()
        outputs, self._ended = self._ended, []
        requests = list(self._requests.values())[: self.max_num_seqs]
        self.last_plan = Plan(scheduled=tuple(Scheduled(r, 1, CacheKind.KV, Reason.DECODES) for r in requests))
        for request in requests:
            request.num_inflight_tokens += 1
            reason: FinishReason | None = self.state.commit(request, TOKEN, now)
            outputs.append(_output(request, reason))
            if reason is not None:
                del self._requests[request.request_id]
        return outputs


def _output(request: Request, reason: FinishReason | None) -> Output:
    wanted, scored = request.params.logprobs, None
    logprobs = () if wanted is None else (_likely(TOKEN, wanted),)
    if request.params.prompt_logprobs is not None and len(request.output_token_ids) == 1:
        scored = tuple(_likely(i, request.params.prompt_logprobs) for i in request.prompt_token_ids[1:])
    return Output(request, "x", (TOKEN,), logprobs, reason, prompt_logprobs=scored)


@cache
def _likely(token: int, count: int) -> TokenLogprobs:
    return TokenLogprobs(token, -0.5, 1, tuple((TOKEN + i, -0.5 - i) for i in range(count)))
