"""The shapes of what /v1/responses answers, for /openapi.json."""

from typing import Any, Literal, NotRequired, TypedDict

from apt_jax.serve.openai.replies import ChatTokenLogprob
from apt_jax.serve.openai.slo_report import SloReport

Status = Literal["in_progress", "completed", "incomplete", "cancelled", "failed"]


class InputTokensDetails(TypedDict):
    """Of the tokens of the prompt, those that came from the prefix cache."""

    cached_tokens: int
    cache_write_tokens: Literal[0]


class OutputTokensDetails(TypedDict):
    """No model served here thinks in secret."""

    reasoning_tokens: Literal[0]


class ResponseUsage(TypedDict):
    """Tokens."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class OutputText(TypedDict):
    """What the model said."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[ChatTokenLogprob]


class OutputMessage(TypedDict):
    """The only item of an answer."""

    id: str
    type: Literal["message"]
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"]
    content: list[OutputText]


class IncompleteDetails(TypedDict):
    """Why an answer is incomplete."""

    reason: Literal["max_output_tokens"]


class ResponseError(TypedDict):
    """Why an answer failed after it had begun."""

    code: Literal["server_error"]
    message: str


class ResponseObject(TypedDict):
    """Answer of /v1/responses."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Status
    background: bool
    completed_at: int | None
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage]
    parallel_tool_calls: bool
    previous_response_id: None
    store: Literal[False]
    temperature: float
    text: dict[str, Any]
    tool_choice: Literal["auto"]
    tools: list[Any]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: str | None
    slo: NotRequired[SloReport]


class ResponseEvent(TypedDict):
    """One event of a streamed answer; its type says which of the other fields it has."""

    type: str
    sequence_number: int
    response: NotRequired[ResponseObject]
    item: NotRequired[OutputMessage]
    item_id: NotRequired[str]
    output_index: NotRequired[int]
    content_index: NotRequired[int]
    part: NotRequired[OutputText]
    delta: NotRequired[str]
    text: NotRequired[str]
    logprobs: NotRequired[list[dict[str, Any]]]
