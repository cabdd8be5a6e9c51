"""The shapes of what routes answer, for /openapi.json; `tests/serve/test_serve_openapi.py` holds the routes to them."""

from collections.abc import Iterable
from typing import Literal, NotRequired, TypedDict

from apt_jax.request import Request
from apt_jax.serve.openai.slo_report import SloReport

FinishReasonName = Literal["stop", "length", "abort", "abandoned"]


class PromptTokensDetails(TypedDict):
    """Of the tokens of the prompts, those that came from the prefix cache."""

    cached_tokens: int


def prompt_tokens_details(requests: Iterable[Request | None]) -> dict[str, PromptTokensDetails]:
    """The field of `Usage` from one sample of each prompt, as far as it has ended; nothing without a prefix cache."""
    known = [(r.num_cached_tokens, r.num_prompt_tokens) for r in requests if r is not None]
    cached = [min(tokens, prompt) for tokens, prompt in known if tokens is not None]
    return {"prompt_tokens_details": {"cached_tokens": sum(cached)}} if cached else {}


class Usage(TypedDict):
    """Tokens: each prompt counts once, every sample's tokens count. Details come with the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: NotRequired[PromptTokensDetails]


class TextLogprobs(TypedDict):
    """Four parallel lists; null for the first token of an echoed prompt."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptTokenLogprob(TypedDict):
    """How likely a token was at its place in the prompt; `rank` 1 is the most likely."""

    logprob: float
    rank: int
    decoded_token: str | None


type PromptLogprobs = list[dict[str, PromptTokenLogprob] | None]  # by token id; null for the first token


class TextChoice(TypedDict):
    """One sample of one prompt."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReasonName | None
    prompt_logprobs: NotRequired[PromptLogprobs]
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]
    slo: NotRequired[SloReport]


class TextCompletion(TypedDict):
    """Answer of /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    slo: SloReport


class TextCompletionChunk(TypedDict):
    """One event of a streamed answer of /v1/completions; the last ones have no text, or no choice but usage."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: NotRequired[Usage | None]
    slo: NotRequired[SloReport]


class TokenLogprob(TypedDict):
    """A token, its log-probability and its bytes."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TokenLogprob):
    """The token that was chosen, with its likely rivals."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(TypedDict):
    """One entry per token."""

    content: list[ChatTokenLogprob]
    refusal: None


class AssistantMessage(TypedDict):
    """What the model said."""

    role: Literal["assistant"]
    content: str


class ChatChoice(TypedDict):
    """One sample."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReasonName
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]
    slo: NotRequired[SloReport]


class ChatCompletionReply(TypedDict):
    """Answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    prompt_logprobs: NotRequired[PromptLogprobs]
    usage: Usage
    slo: SloReport


class ChatDelta(TypedDict):
    """What is new of a message."""

    role: NotRequired[Literal["assistant"]]
    content: str


class ChatChunkChoice(TypedDict):
    """What is new of one sample."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReasonName | None
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]


class ChatCompletionChunk(TypedDict):
    """One event of a streamed answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage | None]
    slo: NotRequired[SloReport]


class Model(TypedDict):
    """The model served; `max_model_len` and `quantization` (of the weights) are null while it loads."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None
    quantization: Literal["none", "int8", "int8-dynamic"] | None


class ModelList(TypedDict):
    """Answer of /v1/models."""

    object: Literal["list"]
    data: list[Model]


class Tokens(TypedDict):
    """Answer of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class EmbeddedText(TypedDict):
    """The vector of one input: numbers, or little-endian float32 in base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class PromptUsage(TypedDict):
    """Tokens of all inputs."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(TypedDict):
    """Answer of /v1/embeddings."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[EmbeddedText]
    usage: PromptUsage


class Aborted(TypedDict):
    """How many requests were under way and end now."""

    aborted: int


class Detokenized(TypedDict):
    """Answer of /detokenize."""

    prompt: str


class Status(TypedDict):
    """Answer of /health and /ready."""

    status: str


class Version(TypedDict):
    """Answer of /version."""

    version: str


class Load(TypedDict):
    """Answer of /load."""

    server_load: int
    waiting: int
    running: int


class ErrorDetail(TypedDict):
    """What is wrong, in one sentence; `param` names the field."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(TypedDict):
    """Every error, in OpenAI's shape."""

    error: ErrorDetail


class FileObject(TypedDict):
    """A file that is kept."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"]


class FileList(TypedDict):
    """Files, the newest first."""

    object: Literal["list"]
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(TypedDict):
    """A file that was deleted."""

    id: str
    object: Literal["file"]
    deleted: bool


class BatchError(TypedDict):
    """What keeps a file from being a batch."""

    code: str
    message: str
    param: NotRequired[str | None]
    line: NotRequired[int | None]


class BatchErrors(TypedDict):
    """All of them, up to 100."""

    object: Literal["list"]
    data: list[BatchError]


class PairScore(TypedDict):
    """The log-likelihood of one text after another, and of how many tokens it is the sum."""

    index: int
    object: Literal["score"]
    score: float
    tokens: int


class ScoreList(TypedDict):
    """Answer of /score, in vLLM's shape."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[PairScore]
    usage: PromptUsage


class RequestCounts(TypedDict):
    """Of the requests of a batch."""

    total: int
    completed: int
    failed: int


class BatchObject(TypedDict):
    """A batch; times are seconds since 1970, null until they come."""

    id: str
    object: Literal["batch"]
    endpoint: str
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: Literal[
        "validating", "in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled"
    ]
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None


class BatchList(TypedDict):
    """Batches, the newest first."""

    object: Literal["list"]
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool
