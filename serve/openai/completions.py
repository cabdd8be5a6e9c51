"""Text completions: prompts to token ids, and outputs to OpenAI's text completion objects."""

from collections.abc import Iterable, Sequence
from typing import Any

from apt_jax.output import Output, TokenLogprobs
from apt_jax.request import FinishReason
from apt_jax.serve.errors import BadRequest
from apt_jax.serve.openai.generation import Choice, Generation, ServedModel, check_length, finite
from apt_jax.serve.openai.requests import CompletionRequest
from apt_jax.serve.runtime.backend import EngineFacts
from apt_jax.serve.runtime.samples import Sample


class Completion(Generation[CompletionRequest]):
    """A request of /v1/completions."""

    ID_PREFIX = "cmpl"

    @classmethod
    def _prompts(cls, body: CompletionRequest, model: ServedModel) -> list[Sequence[int]]:
        return [_token_ids(item, model.engine) for item in body.prompt]

    def _object(self, choices: Iterable[dict[str, Any]], stream: bool = False) -> dict[str, Any]:
        return {
            "id": self.request_id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model_name,
            "choices": choices,
        }

    def _delta(self, sample: Sample, output: Output, first: bool) -> dict[str, Any]:
        return self._choice(sample, output.text, output.logprobs, output.finish_reason, bool(first and self.body.echo))

    def _whole(self, sample: Sample, choice: Choice) -> dict[str, Any]:
        entry = self._choice(sample, "".join(choice.text), choice.logprobs, choice.finish_reason, bool(self.body.echo))
        found = self._prompt_logprobs(choice)
        return {**entry, **({} if found is None else {"prompt_logprobs": found})}

    def _wanted(self, output: Output) -> Output:
        """Without the token that the engine had to generate where only the prompt was asked for."""
        return output.without_answer() if self.body.is_prompt_only else output

    def _choice(
        self,
        sample: Sample,
        text: str,
        logprobs: Sequence[TokenLogprobs],
        finish_reason: FinishReason | None,
        with_prompt: bool,
    ) -> dict[str, Any]:
        wanted = sample.params.logprobs is not None
        return {
            "index": sample.index,
            "text": self._prompt_text(sample) + text if with_prompt else text,
            "logprobs": self._logprobs(sample, logprobs, with_prompt) if wanted else None,
            "finish_reason": None if finish_reason is None else finish_reason.value,
        }

    def _logprobs(self, sample: Sample, entries: Sequence[TokenLogprobs], with_prompt: bool) -> dict[str, Any]:
        """OpenAI's four parallel lists; the token itself is always in `top_logprobs`."""
        choice, count = self.choices[sample.index], sample.params.logprobs
        rows: list[tuple[int, TokenLogprobs | None]] = [(entry.token_id, entry) for entry in entries]
        if with_prompt and choice.prompt_logprobs is not None:
            prompt = [(entry.token_id, entry) for entry in choice.prompt_logprobs]
            rows = [(sample.prompt_token_ids[0], None), *prompt, *rows]
        tokens, values, tops, offsets = [], [], [], []
        for token_id, entry in rows:
            tokens.append(self._token_text(token_id))
            offsets.append(choice.num_chars)
            if entry is not None or self._is_in_text(sample, token_id):
                choice.num_chars += _characters(self._token_bytes(token_id))
            values.append(None if entry is None else finite(entry.logprob))
            top = {} if entry is None else {self._token_text(i): finite(logprob) for i, logprob in entry.top[:count]}
            tops.append(None if entry is None else {tokens[-1]: finite(entry.logprob), **top})
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def _is_in_text(self, sample: Sample, first_token_id: int) -> bool:
        """Whether a prompt's first token is part of the prompt's text, where a tokenizer has put </s> in front."""
        return self._prompt_text(sample).startswith(self._token_text(first_token_id))

    def _prompt_text(self, sample: Sample) -> str:
        samples_per_prompt = len(self.samples) // len(self.body.prompt)
        item = self.body.prompt[sample.index // samples_per_prompt]
        if isinstance(item, str):
            return item
        return "" if self._tokenizer is None else self._tokenizer.decode(list(item), skip_special_tokens=False)


def _characters(data: bytes) -> int:
    """Characters that begin in these UTF-8 bytes, which may be part of one."""
    return sum(byte & 0xC0 != 0x80 for byte in data)


def _token_ids(item: str | tuple[int, ...], engine: EngineFacts) -> Sequence[int]:
    if not isinstance(item, str):
        return item
    if engine.tokenizer is None:
        raise BadRequest("this model has no tokenizer; give the prompt as token ids", "prompt")
    check_length(item, engine.tokenizer, engine.max_model_len, "prompt")
    return engine.tokenizer.encode(item)
