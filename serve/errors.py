"""Errors as a client sees them: OpenAI's shape, and the one table from exception to HTTP status."""

import math
from dataclasses import dataclass
from typing import Any

from apt_jax.output import ContextExceeded, QueueFull

RETRY_AFTER_S = 1
CLIENT_CLOSED_REQUEST = 499  # never sent: the client has gone


class BadRequest(ValueError):
    """The client's request cannot be served as it is; `param` names the field at fault."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


class ModelNotFound(BadRequest):
    """The request names a model that is not served here."""


class ContextTooLong(BadRequest):
    """Prompt and answer have more tokens than the context holds. Clients that shorten prompts look for its code."""

    def __init__(self, error: ContextExceeded, param: str | None):
        super().__init__(str(error), param)


class NotFound(BadRequest):
    """There is no file or batch of this id, or it is another client's; or the server keeps none."""


class BodyTooLarge(BadRequest):
    """The request's body is longer than the server reads."""


class NotJson(BadRequest):
    """The request's body is of another content type than JSON."""


class NotReady(RuntimeError):
    """The model is still loading or being compiled, or the server is stopping."""


class EngineFailure(RuntimeError):
    """The engine failed while it worked on the request."""


class RequestTimeout(RuntimeError):
    """The request took longer than the server lets one take."""


class PredictedLate(RuntimeError):
    """The request would miss its SLO; it was refused at once. `late_s` is by how much."""

    def __init__(self, message: str, late_s: float):
        super().__init__(message)
        self.late_s = late_s

    def __reduce__(self) -> tuple[object, ...]:
        """For pickle, which would leave `late_s` out."""
        return type(self), (str(self), self.late_s)


class SloAbandoned(RuntimeError):
    """The request was ended before its first token, since its SLO could no longer be kept (--abandon-after)."""


@dataclass(frozen=True)
class ErrorReply:
    """Status and `error` object of an HTTP error reply."""

    status: int
    type: str
    code: str | None
    retry_after_s: int | None = None

    @property
    def reason(self) -> str | None:
        """Why a request was refused, for metrics; None where it was not refused but failed, or ended."""
        if self.status == 500 or self.code == "slo_abandoned":
            return None
        return "bad_request" if self.status == 400 or self.code is None else self.code


ERROR_REPLIES: tuple[tuple[type[Exception], ErrorReply], ...] = (
    (ModelNotFound, ErrorReply(404, "invalid_request_error", "model_not_found")),
    (NotFound, ErrorReply(404, "invalid_request_error", None)),
    (BodyTooLarge, ErrorReply(413, "invalid_request_error", "body_too_large")),
    (NotJson, ErrorReply(415, "invalid_request_error", "unsupported_media_type")),
    (ContextTooLong, ErrorReply(400, "invalid_request_error", "context_length_exceeded")),
    (BadRequest, ErrorReply(400, "invalid_request_error", None)),
    (QueueFull, ErrorReply(503, "server_error", "queue_full", RETRY_AFTER_S)),
    (PredictedLate, ErrorReply(503, "server_error", "predicted_late", RETRY_AFTER_S)),
    (SloAbandoned, ErrorReply(503, "server_error", "slo_abandoned", RETRY_AFTER_S)),
    (RequestTimeout, ErrorReply(504, "server_error", "timeout")),
    (NotReady, ErrorReply(503, "server_error", "not_ready", RETRY_AFTER_S)),
    (EngineFailure, ErrorReply(500, "server_error", "engine_failure")),
)
UNFORESEEN = ErrorReply(500, "server_error", "internal_error")


def error_reply(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, JSON body in OpenAI's shape, and headers for an exception; unforeseen ones keep their text to the log."""
    reply = _reply_of(error)
    message = "the server failed on this request; its log has the details" if reply is UNFORESEEN else str(error)
    retry_s = reply.retry_after_s
    if isinstance(error, PredictedLate):
        retry_s = max(RETRY_AFTER_S, math.ceil(error.late_s))
    headers = {} if retry_s is None else {"retry-after": str(retry_s)}
    return reply.status, error_body(message, reply.type, getattr(error, "param", None), reply.code), headers


def reason_of(error: Exception) -> str | None:
    """Why a request was refused, for metrics; None for a failure."""
    return _reply_of(error).reason


def _reply_of(error: Exception) -> ErrorReply:
    return next((reply for kind, reply in ERROR_REPLIES if isinstance(error, kind)), UNFORESEEN)


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """`{"error": {message, type, param, code}}`."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
