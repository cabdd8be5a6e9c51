"""An engine that gives every request a token per step at a steady rate, for tests of who waits for whom.

Log-probabilities go through the real engine's hands, so that they are as many objects here as there.
"""

import time
from typing import Any

import numpy as np

from apt_jax.batching.arrays import ScoreChunk
from apt_jax.cache import CacheKind
from apt_jax.engine.prompt_logprobs import PromptLogprobs
from apt_jax.engine.requests import token_logprobs
from apt_jax.engine_config import EngineConfig
from apt_jax.execution.sampling import Sampled, Scored
from apt_jax.model_config import ModelConfig
from apt_jax.output import Output
from apt_jax.request import FinishReason, Request
from apt_jax.sampling.params import MAX_LOGPROBS
from apt_jax.scheduling.plan import Plan, Reason, Scheduled
from tests.support.fake_engine import FakeEngine

TOKEN = 120
MOST_POSITIONS = 4096


def _scored(rows: int) -> Scored:
    ids = TOKEN + np.arange(rows * MAX_LOGPROBS, dtype=np.int32).reshape(rows, -1) % MAX_LOGPROBS
    return Scored(
        np.full(rows, -0.5, np.float32),  # type: ignore[arg-type]
        np.ones(rows, np.int32),  # type: ignore[arg-type]
        ids,  # type: ignore[arg-type]
        np.full(ids.shape, -1.5, np.float32),  # type: ignore[arg-type]
    )


class SteadyEngine(FakeEngine):
    """`streams` requests at once; one that ignores the end of text never ends."""

    def __init__(self, tokenizer, *, streams: int = 256, period_s: float = 0.004, max_model_len: int = 2048):
        config = EngineConfig(max_num_seqs=streams, max_num_queued_reqs=1024)
        super().__init__(config, tokenizer, num_blocks=8 * streams)
        self.model_config = ModelConfig(vocab_size=4096)
        self.max_model_len = max_model_len
        self._period_s = period_s
        self._next_s = 0.0
        self._prompt_logprobs = PromptLogprobs(MOST_POSITIONS)
        self._scored = _scored(MOST_POSITIONS)
        self._sampled = Sampled(np.full(1, TOKEN), np.ones(1, bool), *_scored(1))  # type: ignore[arg-type]

    def add(self, *args: Any, **kwargs: Any) -> Request:
        request = super().add(*args, **kwargs)
        self._prompt_logprobs.add(request)
        if request.params.ignore_eos and request.params.logprobs is None:
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
            self._score_prompt(request)
            request.num_inflight_tokens += 1
            reason: FinishReason | None = self.state.commit(request, TOKEN, now)
            logprobs = token_logprobs(request, TOKEN, 0, self._sampled)
            scores = self._prompt_logprobs.pop(request)
            outputs.append(Output(request, "x", (TOKEN,), logprobs, reason, prompt_logprobs=scores))
            if reason is not None:
                del self._requests[request.request_id]
        return outputs

    def _score_prompt(self, request: Request) -> None:
        if request.params.prompt_logprobs is not None and not request.output_token_ids:
            count = request.num_prompt_tokens - 1
            target = np.array(request.prompt_token_ids[1:], np.int32)
            chunk = ScoreChunk(np.zeros(count, np.int32), target, (request,) * count)
            self._prompt_logprobs.take([chunk], [Scored(*(array[:count] for array in self._scored))])
