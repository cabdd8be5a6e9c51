"""Text completions: prompts to token ids, and outputs to OpenAI's text completion objects."""

from collections.abc import Iterable, Sequence
from typing import Any

from apt_jax.output import Output, TokenLogprobs
from apt_jax.request import FinishReason
from apt_jax.serve.json_text import finite
from apt_jax.serve.openai.bodies.requests import CompletionRequest
from apt_jax.serve.openai.generation import Choice, Generation, ServedModel
from apt_jax.serve.openai.prompts import prompt_ids
from apt_jax.serve.runtime.samples import Sample
from apt_jax.tokenization.token_texts import TokenText, shown


class Completion(Generation[CompletionRequest]):
    """A request of /v1/completions."""

    ID_PREFIX = "cmpl"

    @classmethod
    def _prompts(cls, body: CompletionRequest, model: ServedModel) -> list[Sequence[int]]:
        return [prompt_ids(item, body, model.engine, "prompt", special=True) for item in body.prompt]

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
        choice, offset = self.choices[sample.index], 0
        rows: list[tuple[TokenText, int, TokenLogprobs | None]] = []
        if self.body.echo:
            if with_prompt and choice.prompt_logprobs is not None and self._tokenizer is not None:
                text, texts = self._tokenizer.prompt_texts(self._prompt(sample), sample.prompt_token_ids)
                entries_of_prompt = (None, *choice.prompt_logprobs)
                rows += zip(texts, sample.prompt_token_ids, entries_of_prompt, strict=True)
                offset = len(text)
            elif choice.token_texts is None:
                offset = len(self._prompt_text(sample))
        following = self.texts(sample, offset)
        rows += [(following.push(entry.token_id), entry.token_id, entry) for entry in entries]
        return {
            "tokens": [self.name_of(token_id, text.shown) for text, token_id, _ in rows],
            "token_logprobs": [None if entry is None else finite(entry.logprob) for _, _, entry in rows],
            "top_logprobs": [
                None
                if entry is None
                else self._top(self.name_of(token, text.shown), entry, sample.params.logprobs or 0)
                for text, token, entry in rows
            ],
            "text_offset": [text.offset for text, _, _ in rows],
        }

    def _top(self, own: str, entry: TokenLogprobs, count: int) -> dict[str, float]:
        """The token itself, as it is shown, and the most likely others; two that look the same are told apart."""
        found = {own: finite(entry.logprob)}
        for token_id, logprob in entry.top[:count]:
            if token_id != entry.token_id:
                name = self.name_of(token_id, shown(token_id, self.token_bytes(token_id)))
                found[f"token_id:{token_id}" if name in found else name] = finite(logprob)
        return found

    def _prompt(self, sample: Sample) -> str | None:
        """The sample's prompt if it was given as text, and not cut."""
        if self.body.truncate_prompt_tokens is not None:
            return None
        item = self.body.prompt[sample.index // (len(self.samples) // len(self.body.prompt))]
        return item if isinstance(item, str) else None

    def _prompt_text(self, sample: Sample) -> str:
        text = self._prompt(sample)
        if text is not None or self._tokenizer is None:
            return text or ""
        return self._tokenizer.prompt_texts(None, sample.prompt_token_ids)[0]
