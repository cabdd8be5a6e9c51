"""An engine without a model: real queues, blocks and policy, tokens computed by hand (each is the last one plus one).

With `CharTokenizer` a token is a character, so the completion of "a" is "bcd...".
"""

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from apt_jax.cache import BlockPool
from apt_jax.engine.interface import EngineFigures
from apt_jax.engine_config import EngineConfig
from apt_jax.model_config import ModelConfig
from apt_jax.output import ContextExceeded, Output, QueueFull, TokenLogprobs
from apt_jax.request import FinishReason, Request, SamplingParams, Slo
from apt_jax.routing.instance import InstanceLoad, instance_load
from apt_jax.scheduling.plan import Plan
from apt_jax.scheduling.policies.catalogue import make_policy
from apt_jax.scheduling.policies.interface import PolicyContext
from apt_jax.scheduling.prefix_pool import PrefixPool
from apt_jax.scheduling.state import Limits, SchedulerState
from apt_jax.tokenization.grammars.compiling import Grammars
from apt_jax.tokenization.token_texts import ByteTokenTexts, TokenText

VOCABULARY = 256
EOS = 2


class CharTokenizer:
    """One token per Latin-1 character (? for others), </s> first."""

    def __init__(self, chat_template: str | None = None):
        self.chat_template = chat_template
        self.special_tokens = {"eos_token": "</s>"}
        self.grammars = Grammars(str, None)  # refuses each

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [*([EOS] if add_special_tokens else []), *text.encode("latin-1", "replace")]

    def encode_pieces(self, text: str, add_special_tokens: bool = True) -> Iterator[list[int]]:
        yield self.encode(text, add_special_tokens)

    def encode_end(self, text: str, limit: int, add_special_tokens: bool = True) -> list[int]:
        special = [EOS] if add_special_tokens else []
        return [*special, *self.encode(text, add_special_tokens=False)[-(limit - len(special)) :]]

    def fewest_tokens(self, text: str) -> int:
        return len(text)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        kept = [i for i in token_ids if i < VOCABULARY and not (skip_special_tokens and i == EOS)]
        return bytes(kept).decode("latin-1")

    def decode_pieces(self, token_ids: Sequence[int]) -> Iterator[str]:
        yield self.decode(token_ids, skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 0xF0 else b""

    def token_texts(self, skip_special_tokens=True, prompt_token_ids=(), offset=0) -> ByteTokenTexts:
        return ByteTokenTexts(self.token_bytes, {EOS} if skip_special_tokens else (), offset)

    def prompt_texts(self, prompt: str | None, ids: Sequence[int]) -> tuple[str, list[TokenText]]:
        text = self.decode(ids, skip_special_tokens=False) if prompt is None else prompt
        texts = ByteTokenTexts(self.token_bytes, {EOS} if prompt is not None and not text.startswith(chr(EOS)) else ())
        return text, [texts.push(token_id) for token_id in ids]

    def token_text(self, token_id: int) -> str:
        return self.decode([token_id], skip_special_tokens=False)


class FakeEngine:
    """A `ServingEngine`. With `paced`, a step waits for `allow_step()`. Its clock is `ahead_s` seconds ahead.

    `fail_with` makes the next step raise, `fails_with` every step with requests until it is None again.
    """

    def __init__(
        self, config: EngineConfig | None = None, tokenizer: Any = None, *, num_blocks: int = 64, paced: bool = False
    ):
        self.config = config or EngineConfig(
            max_num_seqs=4, max_num_queued_reqs=8, max_num_batched_tokens=64, scheduling_policy="fcfs"
        )
        self.model_config = ModelConfig(vocab_size=VOCABULARY, max_position_embeddings=128)
        self.max_model_len, self.fingerprint = 128, "weights:fake"
        self.tokenizer = tokenizer
        self.sampling_defaults: dict[str, float] = {}
        limits = Limits(self.config.max_num_seqs or 4, self.config.max_num_batched_tokens or 64)
        make_pool = PrefixPool if self.config.enable_prefix_caching else BlockPool
        self.state = SchedulerState(make_pool(num_blocks, 4), limits)
        self.warmed = False
        self.fail_with: Exception | None = None
        self.fails_with: Exception | None = None
        self.longest_step_s, self.idle_s, self.spare_s = 0.01, 0.0, 0.0
        self.saved_pages = None  # its pages have no contents
        self.num_policies = 1
        self.num_begun = 0  # steps, of which the last may wait to be allowed
        self.num_steps = 0
        self.ahead_s = 0.0
        self.num_failed_steps = 0
        self.num_recompiles = 0
        self.last_plan = Plan()
        self.schedule_s = 0.0
        self.predictor = PolicyContext().predictor
        self._policy = make_policy("fcfs", PolicyContext(abandon_after_s=self.config.abandon_after))
        self._requests: dict[str, Request] = {}
        self._ended: list[Output] = []
        self._steps = threading.Semaphore(0) if paced else None

    @property
    def is_paced(self) -> bool:
        return self._steps is not None

    def allow_step(self, count: int = 1) -> None:
        assert self._steps is not None
        self._steps.release(count)

    def warm_up(self, progress: bool = False) -> None:
        self.warmed = True

    @property
    def max_num_seqs(self) -> int:
        return self.state.limits.max_num_seqs

    @property
    def num_waiting(self) -> int:
        return len(self.state.waiting)

    @property
    def num_running(self) -> int:
        return len(self.state.running)

    @property
    def has_unfinished(self) -> bool:
        return self.state.num_unfinished > 0 or bool(self._ended)

    def add(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str,
        slo: Slo | None = None,
        priority: int = 0,
        arrival_s: float | None = None,
        output_token_ids: Sequence[int] = (),
        cache_salt: str | None = None,
        user: str | None = None,
        restriction: Any = None,
    ) -> Request:
        assert params.n == 1 and request_id not in self._requests
        if not prompt_token_ids:
            raise ValueError("prompt is empty; give at least one token id")
        vocab_size = self.model_config.vocab_size
        for token_id in prompt_token_ids:
            if not 0 <= token_id < vocab_size:
                raise ValueError(f"prompt has token id {token_id}, the vocabulary is 0..{vocab_size - 1}")
        room = self.max_model_len - len(prompt_token_ids) + params.is_prompt_only
        if room < 1:
            raise ContextExceeded(
                f"prompt has {len(prompt_token_ids)} tokens, the context holds {self.max_model_len}", self.max_model_len
            )
        if len(self.state.waiting) >= self.config.max_num_queued_reqs:
            raise QueueFull(f"{len(self.state.waiting)} requests are waiting; raise --max-num-queued-reqs")
        request = Request(
            request_id,
            list(prompt_token_ids),
            params,
            time.monotonic() if arrival_s is None else arrival_s,
            1 if params.is_prompt_only else min(room, params.max_tokens or room),
            frozenset({EOS}),
            slo or Slo(),
            priority,
            cache_salt=cache_salt,
            user=user,
            output_token_ids=list(output_token_ids),
        )
        self.state.add(request)
        self._requests[request_id] = request
        return request

    def abort(self, request_id: str) -> None:
        request = self._requests.pop(request_id, None)
        if request is not None:
            self.state.finish(request, FinishReason.ABORT)
            self._ended.append(Output(request, "", (), (), FinishReason.ABORT))

    def step(self) -> list[Output]:
        self.num_begun += 1
        if self._steps is not None:
            self._steps.acquire()
        self.num_steps += 1
        if self.fail_with is not None:
            error, self.fail_with = self.fail_with, None
            raise error
        if self.fails_with is not None and self.state.num_unfinished:
            raise self.fails_with
        now = time.monotonic() + self.ahead_s
        self.last_plan = self._policy.schedule(self.state, now)
        self.schedule_s = time.monotonic() + self.ahead_s - now
        spans = self.state.apply(self.last_plan, now)
        for abandoned in self.last_plan.abandoned:
            del self._requests[abandoned.request.request_id]
            self._ended.append(Output(abandoned.request, "", (), (), FinishReason.ABANDONED))
        self.state.keep(self.state.written(spans))
        outputs = [*self._ended, *(self._sample(span.request, now) for span in spans if span.samples)]
        self._ended = []
        return outputs

    def reset_prefix_cache(self) -> None:
        self.state.forget_prefixes()

    def renew_policy(self) -> None:
        self.num_policies += 1

    def figures(self) -> EngineFigures:
        return EngineFigures(
            num_waiting=self.num_waiting,
            num_running=self.num_running,
            num_blocks=self.state.pool.num_blocks,
            blocks=self.state.blocks_by_kind(),
            plan=self.last_plan,
            schedule_s=self.schedule_s,
            padded_tokens=self.last_plan.num_tokens,
            num_failed_steps=self.num_failed_steps,
            num_recompiles=self.num_recompiles,
            prefix_queries=self.state.prefix_queries,
            prefix_hits=self.state.prefix_hits,
            cache_config={"block_size": "4", "enable_prefix_caching": str(self.config.enable_prefix_caching)},
            weights={"dtype": "float32", "quantization": "int8"},
        )

    def recent_plans(self) -> list[dict[str, Any]]:
        return self.state.plans.as_dicts()

    def load(self, now: float) -> InstanceLoad:
        return instance_load(self.state, None, now, predictor=self.predictor)

    @property
    def is_idle(self) -> bool:
        return self.state.num_unfinished == 0 and self.state.pool.num_free == self.state.pool.num_blocks

    def _sample(self, request: Request, now: float) -> Output:
        token = ((*request.prompt_token_ids, *request.output_token_ids)[-1] + 1) % VOCABULARY
        finish_reason = self.state.commit(request, token, now)
        self.state.check()
        if finish_reason is not None:
            del self._requests[request.request_id]
        shown = request.output_token_ids if request.first_token_s == request.last_token_s else [token]
        text = "" if self.tokenizer is None else self.tokenizer.decode(shown)
        logprobs: tuple[TokenLogprobs, ...] = ()
        if request.params.logprobs is not None:
            top = tuple((token + i, -0.5 - i) for i in range(request.params.logprobs))
            logprobs = (TokenLogprobs(token, -0.5, 1, top),)
        prompt_logprobs = None
        if request.params.prompt_logprobs is not None and request.first_token_s == request.last_token_s:
            prompt_logprobs = tuple(
                TokenLogprobs(
                    i,
                    -1.5,
                    2,
                    tuple(((i + 1 - k) % VOCABULARY, -0.5 - k) for k in range(request.params.prompt_logprobs)),
                )
                for i in request.prompt_token_ids[1:]
            )
        hidden = None
        if request.params.pools:
            hidden = np.array([request.num_prompt_tokens, request.prompt_token_ids[-1], 0, 0], np.float32)
        return Output(request, text, (token,), logprobs, finish_reason, None, prompt_logprobs, hidden)
