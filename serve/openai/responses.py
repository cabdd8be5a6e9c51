"""OpenAI's responses: text or messages to one prompt, and outputs to a response object or its stream of events.

Nothing is kept: `store` is refused, and earlier messages come in `input`.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

from pydantic_core import to_json

from apt_jax.output import Output, TokenLogprobs
from apt_jax.request import FinishReason
from apt_jax.serve.errors import BadRequest, error_reply
from apt_jax.serve.openai.bodies.chat_requests import Message
from apt_jax.serve.openai.bodies.responses import ResponseRequest
from apt_jax.serve.openai.chat_completions import token_logprobs
from apt_jax.serve.openai.generation import Choice, Generation, ServedModel
from apt_jax.serve.openai.prompts import prompt_ids
from apt_jax.serve.openai.slo_report import slo_report
from apt_jax.serve.openai.templates.chat_template import render
from apt_jax.serve.runtime.samples import Sample

STATUSES = {FinishReason.STOP: "completed", FinishReason.LENGTH: "incomplete"}  # of others: cancelled
PLACE = {"output_index": 0, "content_index": 0}


class ModelResponse(Generation[ResponseRequest]):
    """A request of /v1/responses: one prompt, one sample, one message."""

    ID_PREFIX: ClassVar[str] = "resp"
    END: ClassVar[bytes] = b""
    _number = 0  # of the next event

    @classmethod
    def prepare(cls, body: ResponseRequest, model: ServedModel, **settings: Any) -> Self:
        """See `Generation.prepare`; limits are told by the names that this endpoint has for them."""
        try:
            return super().prepare(body, model, **settings)
        except BadRequest as error:
            if error.param == "max_tokens":
                error.param = "max_output_tokens"
                error.args = (str(error).replace("max_tokens", "max_output_tokens"),)
            elif error.param == "messages":
                error.param = "input"
            raise

    @classmethod
    def _prompts(cls, body: ResponseRequest, model: ServedModel) -> list[Sequence[int]]:
        """A chat where there is a template for it; else a text is a prompt as it is, after the instructions."""
        tokenizer = model.engine.tokenizer
        if tokenizer is None:
            raise BadRequest("this model has no tokenizer; use /v1/completions with token ids", "input")
        if isinstance(body.input, str) and not (model.chat_template or tokenizer.chat_template):
            text = body.input if not body.instructions else f"{body.instructions}\n\n{body.input}"
            return [prompt_ids(text, body, model.engine, "input", special=True)]
        first = [Message(role="system", content=body.instructions)] if body.instructions else []
        said = (
            [Message(role="user", content=body.input)]
            if isinstance(body.input, str)
            else [item.as_message() for item in body.input]
        )
        text = render([*first, *said], tokenizer, model.chat_template, generate=True)
        return [prompt_ids(text, body, model.engine, "input", special=False)]  # the template writes the special ones

    def response(self) -> dict[str, Any]:
        """The whole object, once the sample has ended."""
        (choice,) = self.choices
        return self._whole_object(choice)

    def response_pieces(self) -> Iterable[bytes]:  # type: ignore[override]
        """`response` as JSON; its logprobs are the only part that may be long."""
        return iter([to_json(self.response())])

    def opening(self) -> bytes:
        """The events before the first token."""
        begun = self._bare("in_progress", [])
        return b"".join(
            self._event(kind, **fields)
            for kind, fields in (
                ("response.created", {"response": begun}),
                ("response.in_progress", {"response": begun}),
                ("response.output_item.added", {"output_index": 0, "item": self._message("in_progress", [])}),
                ("response.content_part.added", {"item_id": self._message_id, **PLACE, "part": self._part("", [])}),
            )
        )

    def streamed(self, sample: Sample, output: Output) -> bytes:
        """Take in an output and render it as events; the last brings the whole response.

        Raises:
            EngineFailure: the engine ended the sample with an error.
            SloAbandoned: it was abandoned before it had a token.
        """
        (choice,) = self.choices
        self._add(choice, output)
        at = {"item_id": self._message_id, **PLACE}
        events = []
        if output.text or output.logprobs:
            logprobs = [self._of_delta(entry) for entry in self._logprobs(choice, output.logprobs)]
            events.append(self._event("response.output_text.delta", **at, delta=output.text, logprobs=logprobs))
        if output.finish_reason is not None:
            whole = self._whole_object(choice)
            message = whole["output"][0]
            part = message["content"][0]
            logprobs = [self._of_delta(entry) for entry in part["logprobs"]]
            kind = "completed" if whole["status"] == "completed" else "incomplete"
            events += [
                self._event("response.output_text.done", **at, text=part["text"], logprobs=logprobs),
                self._event("response.content_part.done", **at, part=part),
                self._event("response.output_item.done", output_index=0, item=message),
                self._event(f"response.{kind}", response=whole),
            ]
        return b"".join(events)

    def closing(self) -> bytes:
        """Nothing: the last event was the response."""
        return b""

    def failing(self, error: Exception) -> bytes:
        """The event of a response that fails after it has begun."""
        reply = error_reply(error)[1]["error"]
        failed = {**self._bare("failed", []), "error": {"code": "server_error", "message": reply["message"]}}
        return self._event("response.failed", response=failed)

    @property
    def _message_id(self) -> str:
        return f"msg-{self.request_id.partition('-')[2]}"

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = to_json({"type": kind, "sequence_number": self._number, **fields})
        self._number += 1
        return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"

    def _logprobs(self, choice: Choice, entries: Sequence[TokenLogprobs]) -> list[dict[str, Any]]:
        return token_logprobs(self, self.samples[0], entries) if self.body.wants_logprobs else []

    @staticmethod
    def _of_delta(entry: Mapping[str, Any]) -> dict[str, Any]:
        """A token of an event, which has no bytes."""
        top = [{"token": likely["token"], "logprob": likely["logprob"]} for likely in entry["top_logprobs"]]
        return {"token": entry["token"], "logprob": entry["logprob"], "top_logprobs": top}

    @staticmethod
    def _part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _message(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._message_id, "type": "message", "status": status, "role": "assistant", "content": content
        }  # fmt: skip

    def _whole_object(self, choice: Choice) -> dict[str, Any]:
        assert choice.finish_reason is not None
        status = STATUSES.get(choice.finish_reason, "cancelled")
        choice.token_texts = None  # from the first token on
        part = self._part("".join(choice.text), self._logprobs(choice, choice.logprobs))
        whole = self._bare(status, [self._message("completed" if status == "completed" else "incomplete", [part])])
        if status == "incomplete":
            whole["incomplete_details"] = {"reason": "max_output_tokens"}
        whole |= {"completed_at": int(time.time()), "usage": self._usage()}
        if choice.request is not None and self.reports_slo:
            whole["slo"] = slo_report([choice.request])
        return whole

    def _usage(self) -> dict[str, Any]:
        """As this endpoint names it."""
        known = self.usage()
        cached = known.get("prompt_tokens_details", {}).get("cached_tokens", 0)
        return {
            "input_tokens": known["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": known["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": known["total_tokens"],
        }

    def _bare(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        """A response without what only its end brings."""
        body, params = self.body, self.samples[0].params
        format_ = None if body.text is None else body.text.format
        shown = {"type": "text"} if format_ is None else format_.model_dump(by_alias=True, exclude_none=True)
        return {
            "id": self.request_id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": False,
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self.model_name,
            "output": output,
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": params.temperature,
            "text": {"format": shown},
            "tool_choice": "auto",
            "tools": [],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
        }
