"""Scores: how likely a text is after another, by the log-probabilities of its tokens.

Both are tokenised as one text. What is scored begins with the first token that the first text alone does not have, so
a token in which both have a part counts.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from apt_jax.output import Output
from apt_jax.request import SamplingParams
from apt_jax.serve.errors import BadRequest
from apt_jax.serve.json_text import finite
from apt_jax.serve.openai.bodies.scores import ScoreRequest
from apt_jax.serve.openai.bodies.slo import slo_of
from apt_jax.serve.openai.generation import ServedModel
from apt_jax.serve.openai.prompts import check_fits_queue, check_length, check_model
from apt_jax.serve.openai.prompts_only.prompt_only import PromptOnly
from apt_jax.serve.runtime.samples import Sample, fan_out

PARAMS = SamplingParams(max_tokens=0, prompt_logprobs=0)


class Score(PromptOnly[ScoreRequest, float]):
    """Of /score: a sample for each pair."""

    ID_PREFIX: ClassVar[str] = "score"
    WANTED: ClassVar[str] = "scores"

    def __init__(self, body: ScoreRequest, request_id: str, model_name: str, samples: list[Sample], starts: list[int]):
        super().__init__(body, request_id, model_name, samples)
        self._starts = starts  # of each prompt, the first token that is scored

    @classmethod
    def prepare(
        cls,
        body: ScoreRequest,
        model: ServedModel,
        *,
        request_id: str,
        headers: Mapping[str, str],
        arrival_s: float,
        max_samples: int,
    ) -> Self:
        """Check a body against the model that is served. Tokenises; touches no state.

        Raises:
            ModelNotFound: the body names another model.
            BadRequest: no tokenizer, a bad SLO, more than `max_samples` pairs, or too long ones.
        """
        check_model(body.model, model.names)
        tokenizer, pairs = model.engine.tokenizer, body.pairs()
        if tokenizer is None:
            raise BadRequest("this model has no tokenizer; use /v1/completions with echo and token ids", "text_1")
        check_fits_queue(len(pairs), f"{len(pairs)} pairs are", max_samples, "text_2")
        prompts, starts = [], []
        special = body.add_special_tokens is not False
        for first, second in pairs:
            check_length(first, tokenizer, model.engine.max_model_len, "text_1")
            check_length(second, tokenizer, model.engine.max_model_len, "text_2")
            before = tokenizer.encode(first, add_special_tokens=special)
            prompts.append(tokenizer.encode(first + second, add_special_tokens=special))
            starts.append(_num_shared(before, prompts[-1]))
            if not starts[-1]:
                raise BadRequest("nothing comes before what is to be scored; give more of text_1", "text_1")
        samples = fan_out(
            request_id,
            prompts,
            PARAMS,
            slo=slo_of(body.slo, headers, model.engine.config.slo),
            priority=body.priority or 0,
            arrival_s=arrival_s,
            cache_salt=body.cache_salt,
            user=body.user,
        )
        return cls(body, request_id, model.name, samples, starts)

    def _found_in(self, sample: Sample, output: Output) -> float | None:
        if output.prompt_logprobs is None:
            return None
        scored = output.prompt_logprobs[self._starts[sample.index] - 1 :]  # they are of all tokens but the first
        return finite(sum(entry.logprob for entry in scored))

    def _item(self, sample: Sample, found: float) -> dict[str, Any]:
        tokens = len(sample.prompt_token_ids) - self._starts[sample.index]
        return {"index": sample.index, "object": "score", "score": found, "tokens": tokens}


def _num_shared(before: Sequence[int], whole: Sequence[int]) -> int:
    """Tokens of a text that it also begins with when another follows: a last one may merge with what comes."""
    return next((i for i, pair in enumerate(zip(before, whole, strict=False)) if pair[0] != pair[1]), len(before))
