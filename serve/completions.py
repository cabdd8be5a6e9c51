"""Text completions: prompts to token ids, and outputs to OpenAI's text completion objects."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from apt_jax.output import Output, TokenLogprobs
from apt_jax.request import FinishReason
from serve.errors import BadRequest
from serve.generation import Choice, Generation, ServedModel, finite
from serve.protocol import CompletionRequest
from serve.samples import Sample

if TYPE_CHECKING:
    from apt_jax.tokenizer import Tokenizer


class Completion(Generation[CompletionRequest]):
    """A request of /v1/completions."""

    ID_PREFIX = "cmpl"

    @classmethod
    def _prompts(cls, body: CompletionRequest, model: ServedModel) -> list[Sequence[int]]:
        return [_token_ids(item, model.engine.tokenizer) for item in body.prompt]

    def _object(self, choices: list[dict[str, Any]], stream: bool = False) -> dict[str, Any]:
        return {
            "id": self.request_id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model_name,
            "choices": choices,
        }

    def _delta(self, sample: Sample, output: Output, first: bool) -> dict[str, Any]:
        text = self._prompt_text(sample) + output.text if first and self.body.echo else output.text
        return self._choice(sample, text, output.logprobs, output.finish_reason)

    def _whole(self, sample: Sample, choice: Choice) -> dict[str, Any]:
        text = "".join(choice.text)
        if self.body.echo:
            text = self._prompt_text(sample) + text
        return self._choice(sample, text, choice.logprobs, choice.finish_reason)

    def _choice(
        self, sample: Sample, text: str, logprobs: Sequence[TokenLogprobs], finish_reason: FinishReason | None
    ) -> dict[str, Any]:
        wanted = sample.params.logprobs is not None
        return {
            "index": sample.index,
            "text": text,
            "logprobs": self._logprobs(self.choices[sample.index], logprobs) if wanted else None,
            "finish_reason": None if finish_reason is None else finish_reason.value,
        }

    def _logprobs(self, choice: Choice, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """OpenAI's four parallel lists; the chosen token is always in `top_logprobs`."""
        tokens, offsets, tops = [], [], []
        for entry in entries:
            tokens.append(self._token_text(entry.token_id))
            offsets.append(choice.num_chars)
            choice.num_chars += len(tokens[-1])
            top = {self._token_text(token_id): finite(logprob) for token_id, logprob in entry.top}
            tops.append({tokens[-1]: finite(entry.logprob), **top})
        return {
            "tokens": tokens,
            "token_logprobs": [finite(entry.logprob) for entry in entries],
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def _prompt_text(self, sample: Sample) -> str:
        samples_per_prompt = len(self.samples) // len(self.body.prompt)
        item = self.body.prompt[sample.index // samples_per_prompt]
        if isinstance(item, str):
            return item
        return "" if self._tokenizer is None else self._tokenizer.decode(list(item), skip_special_tokens=False)


def _token_ids(item: str | tuple[int, ...], tokenizer: "Tokenizer | None") -> Sequence[int]:
    if not isinstance(item, str):
        return item
    if tokenizer is None:
        raise BadRequest("this model has no tokenizer; give the prompt as token ids", "prompt")
    return tokenizer.encode(item)
