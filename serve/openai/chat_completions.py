"""Chats: messages to a prompt by the chat template, and outputs to OpenAI's chat completion objects."""

from collections.abc import Iterable, Sequence
from typing import Any

from apt_jax.output import Output, TokenLogprobs
from apt_jax.serve.errors import BadRequest
from apt_jax.serve.json_text import finite
from apt_jax.serve.openai.bodies.chat_requests import ChatRequest
from apt_jax.serve.openai.generation import Choice, Generation, ServedModel
from apt_jax.serve.openai.prompts import prompt_ids
from apt_jax.serve.openai.templates.chat_template import render
from apt_jax.serve.runtime.samples import Sample
from apt_jax.tokenization.token_texts import shown


class ChatCompletion(Generation[ChatRequest]):
    """A request of /v1/chat/completions."""

    ID_PREFIX = "chatcmpl"

    @classmethod
    def _prompts(cls, body: ChatRequest, model: ServedModel) -> list[Sequence[int]]:
        tokenizer = model.engine.tokenizer
        if tokenizer is None:
            raise BadRequest("this model has no tokenizer, so it cannot chat; use /v1/completions", "messages")
        generate = body.add_generation_prompt is not False
        text = render(body.messages, tokenizer, model.chat_template, generate=generate)
        return [prompt_ids(text, body, model.engine, "messages", special=False)]  # the template writes the special ones

    def _response(self, choices: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """`prompt_logprobs` is a field next to the choices, which share their prompt, as in vLLM."""
        found = self._prompt_logprobs(self.choices[0])
        return {**super()._response(choices), **({} if found is None else {"prompt_logprobs": found})}

    def _object(self, choices: Iterable[dict[str, Any]], stream: bool = False) -> dict[str, Any]:
        return {
            "id": self.request_id,
            "object": "chat.completion.chunk" if stream else "chat.completion",
            "created": self.created,
            "model": self.model_name,
            "choices": choices,
        }

    def _delta(self, sample: Sample, output: Output, first: bool) -> dict[str, Any]:
        reason = None if output.finish_reason is None else output.finish_reason.value
        role = {"role": "assistant"} if first else {}
        return self._choice(sample, {"delta": {**role, "content": output.text}}, output.logprobs, reason)

    def _whole(self, sample: Sample, choice: Choice) -> dict[str, Any]:
        assert choice.finish_reason is not None
        message = {"role": "assistant", "content": "".join(choice.text)}
        return self._choice(sample, {"message": message}, choice.logprobs, choice.finish_reason.value)

    def _choice(
        self,
        sample: Sample,
        content: dict[str, Any],
        logprobs: Sequence[TokenLogprobs],
        finish_reason: str | None,
    ) -> dict[str, Any]:
        wanted = sample.params.logprobs is not None
        return {
            "index": sample.index,
            **content,
            "logprobs": self._logprobs(sample, logprobs) if wanted else None,
            "finish_reason": finish_reason,
        }

    def _logprobs(self, sample: Sample, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        return {"content": token_logprobs(self, sample, entries), "refusal": None}


def token_logprobs(
    generation: Generation[Any], sample: Sample, entries: Sequence[TokenLogprobs]
) -> list[dict[str, Any]]:
    """OpenAI's list of tokens, each with the most likely alternatives."""
    texts, content = generation.texts(sample), []
    name, bytes_of = generation.name_of, generation.token_bytes
    for entry in entries:
        own = texts.push(entry.token_id)
        top = [
            _token(name(token_id, own.shown), own.data, logprob)
            if token_id == entry.token_id
            else _token(name(token_id, shown(token_id, data := bytes_of(token_id))), data, logprob)
            for token_id, logprob in entry.top
        ]
        content.append({**_token(name(entry.token_id, own.shown), own.data, entry.logprob), "top_logprobs": top})
    return content


def _token(text: str, data: bytes, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": finite(logprob), "bytes": list(data)}
