"""Checks of a request before an engine accepts it; each refusal is one sentence with value, limit and cure."""

from collections.abc import Sequence
from dataclasses import dataclass

from apt_jax.batching.sampling_rows import MAX_END_IDS
from apt_jax.model_config import ModelConfig
from apt_jax.output import ContextExceeded
from apt_jax.request import SamplingParams
from apt_jax.scheduling.state import SchedulerState


@dataclass(frozen=True)
class RequestRules:
    """The limits of one engine; of `state` only the pool's size and the allowed cache kinds count."""

    model_config: ModelConfig
    max_model_len: int
    has_tokenizer: bool
    state: SchedulerState

    def max_new_tokens(self, prompt_tokens: int, params: SamplingParams) -> int:
        """Tokens that may be generated: what was asked for, or what the context has room for.

        One where only the prompt is scored: the last position gives it, and it is never run through the model.
        """
        if params.is_prompt_only:
            return 1
        room = self.max_model_len - prompt_tokens
        return room if params.max_tokens is None else min(params.max_tokens, room)

    def check(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        """Raises ValueError if the request can never be served."""
        length = len(prompt_token_ids)
        if params.n != 1:
            raise ValueError(f"n={params.n}: the engine takes one sample at a time; fan out first")
        if length == 0:
            raise ValueError("the prompt is empty; give at least one token")
        if length > self.max_model_len - (0 if params.is_prompt_only else 1):
            answer = "" if params.is_prompt_only else " and one is needed for the answer"
            raise ContextExceeded(
                f"the prompt has {length} tokens, but the context holds {self.max_model_len}{answer}; shorten the "
                "prompt or raise --max-model-len",
                self.max_model_len,
            )
        low, high = min(prompt_token_ids), max(prompt_token_ids)
        if low < 0 or high >= self.model_config.vocab_size:
            bad = low if low < 0 else high
            raise ValueError(
                f"the prompt has token id {bad}, which is not in the vocabulary 0..{self.model_config.vocab_size - 1}"
            )
        params.check_vocabulary(self.model_config.vocab_size)
        self._check_ends(params)
        self._check_cache(length + self.max_new_tokens(length, params) - 1)  # the last token is never cached

    def _check_ends(self, params: SamplingParams) -> None:
        ends = len(params.stop_token_ids or ()) + (0 if params.ignore_eos else len(self.model_config.eos_token_ids))
        if ends > MAX_END_IDS:
            raise ValueError(
                f"stop_token_ids and the model's end-of-sequence ids are {ends} together, at most {MAX_END_IDS} are "
                "possible; give fewer, or ignore_eos"
            )
        if params.stop and not self.has_tokenizer:
            raise ValueError("stop strings need a tokenizer, and this model has none; use stop_token_ids")

    def _check_cache(self, total_tokens: int) -> None:
        if not self.state.fits_alone(total_tokens):
            pool = self.state.pool
            raise ValueError(
                f"prompt and output of up to {total_tokens} tokens do not fit in the cache of {pool.num_blocks} blocks "
                f"of {pool.block_size} tokens; lower max_tokens, or raise --num-blocks"
            )
