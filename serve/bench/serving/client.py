"""One streamed request to an OpenAI server at little cost: bodies are made beforehand, events parsed in one pass."""

import asyncio
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

import aiohttp
from pydantic_core import from_json

from apt_jax.serve.bench.serving.records import Record
from apt_jax.serve.bench.work import Content, Work

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
ENDED = ("abort", "abandoned", "error")  # finish reasons of answers that are not whole
TURNED_AWAY = (429, 503, 504)  # statuses of servers that refuse for lack of room or time
REFUSALS = ("queue_full", "predicted_late", "slo_abandoned", "timeout", "not_ready")  # the same, as codes in a stream
SHOWN_CHARS = 160
IDLE_CONNECTION_S = 2.0  # shorter than servers keep them: none is used just when the server closes it


class Refused(ValueError):
    """The server does not answer a question that the benchmark depends on."""


@dataclass(frozen=True)
class Endpoint:
    """Where and how to ask. `headers` go with every request, `fields` into every body."""

    base_url: str
    endpoint: str  # of `PATHS`
    model: str
    headers: dict[str, str]
    fields: dict[str, Any]
    timeout_s: float
    count: Callable[[str], int] | None = None  # tokens of a text, where a tokenizer is at hand

    @property
    def url(self) -> str:
        """Address of the route."""
        return self.base_url + PATHS[self.endpoint]

    def body(self, work: Work) -> bytes:
        """The request of `work`."""
        asked: dict[str, Any] = {"prompt": _joined([content for _, content in work.said])}
        if self.endpoint == "chat":
            asked = {"messages": [{"role": role, "content": content} for role, content in work.said]}
        elif work.then is not None and not isinstance(work.prompt, str):
            asked["return_token_ids"] = True  # of which the next turn's prompt is made
        return json.dumps(
            {
                "model": self.model, **asked, "max_tokens": work.output_tokens, "stream": True,
                "stream_options": {"include_usage": True}, **self.fields,
            }
        ).encode()  # fmt: skip


def _joined(contents: Sequence[Content]) -> Content:
    """Texts, or token ids, one after the other."""
    if isinstance(contents[0], str):
        return "".join(cast(Sequence[str], contents))
    return [token for content in contents for token in cast(list[int], content)]


def plain_base(base_url: str) -> str:
    """The address without a trailing slash and /v1.

    Raises:
        ValueError: it is no http address.
    """
    if not base_url.startswith(("http://", "https://")):
        raise ValueError(f"base_url={base_url!r} must begin with http:// or https://")
    try:
        parts = urlsplit(base_url)
        is_address = bool(parts.hostname) and (parts.port or 1) > 0 and not re.search(r"\s", base_url)
    except ValueError:  # a port that is none, a bracket that is left open
        is_address = False
    if not is_address:
        raise ValueError(f"base_url={base_url!r} is no address such as http://127.0.0.1:8000")
    return base_url.rstrip("/").removesuffix("/v1")


def open_session() -> aiohttp.ClientSession:
    """A session with any number of connections; call it in a running loop."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_CONNECTION_S)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))


async def first_model(session: aiohttp.ClientSession, base_url: str, headers: dict[str, str]) -> dict[str, Any]:
    """The first entry of /v1/models.

    Raises:
        Refused: the server cannot be reached or names no model; one sentence.
    """
    try:
        async with session.get(f"{base_url}/v1/models", headers=headers) as reply:
            text = await reply.read()
            if reply.status != 200:
                raise Refused(f"{base_url}/v1/models: {_refusal(reply.status, text)}; give --model or --api-key")
            return dict(from_json(text)["data"][0])
    except (aiohttp.ClientError, OSError) as error:
        raise Refused(f"{_failure(error)} at {base_url}; is the server running?") from error
    except (ValueError, LookupError, TypeError) as error:
        if isinstance(error, Refused):
            raise
        raise Refused(f"{base_url}/v1/models names no model; give --model") from error


class Events:
    """Splits a stream of server-sent events into their data, however the bytes are cut."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Data of the events that `data` completes; comments, other fields and empty data are skipped."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [found for line in lines if line.startswith(b"data:") and (found := line[5:].strip())]

    def end(self) -> list[bytes]:
        """Data of a last line that the stream ended without a line end."""
        return self.feed(b"\n")


@dataclass(frozen=True)
class Piece:
    """What one event brought: when, how much text, and how many tokens if the server says it."""

    at_s: float
    chars: int
    tokens: int | None
    is_role: bool  # of a chat, or its end: no token need have come with it
    text: str = ""


class Answer:
    """Collects a stream's events into a record.

    `count` gives the tokens of a text, for servers that send no usage. With `keeps_text` the text is kept in any case.
    """

    def __init__(self, record: Record, count: Callable[[str], int] | None = None, *, keeps_text: bool = False):
        self._record = record
        self._count = count
        self._keeps_text = keeps_text or count is not None
        self._token_ids: list[int] = []
        self._usage: dict[str, Any] | None = None
        self._counted = 0  # tokens that running usage has reported
        self._pieces: list[Piece] = []
        self.is_whole = False  # the end of the stream was seen

    def take(self, event: bytes, now: float) -> None:
        """One event that arrived `now`, seconds of the run."""
        if event == b"[DONE]":
            self.is_whole = True
            return
        chunk = from_json(event)
        if chunk is None:
            return
        if (error := chunk.get("error")) is not None:
            self._record.error = f"error in the stream: {_message(chunk)}"
            self._record.was_turned_away = isinstance(error, dict) and error.get("code") in REFUSALS
        usage = chunk.get("usage")
        self._usage = usage or self._usage
        if not (choices := chunk.get("choices")):
            return
        choice = choices[0]
        delta = choice.get("delta") or {}
        text = choice.get("text")
        if text is None:
            text = delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning")
        bare = "role" in delta or choice.get("finish_reason") is not None
        tokens = self._tokens(choice, usage)
        self._pieces.append(Piece(now, len(text or ""), tokens, bare, text or "" if self._keeps_text else ""))
        if isinstance(ids := choice.get("token_ids"), list):
            self._token_ids += ids
        if (reason := choice.get("finish_reason")) in ENDED:
            self._record.error = f"the server ended it: {reason}"
            self._record.was_turned_away = reason != "error"

    def said(self, work: Work) -> Content | None:
        """The answer, as text or token ids as `work` was sent; None if the server sent no token ids."""
        if isinstance(work.prompt, str):
            return "".join(piece.text for piece in self._pieces)
        return self._token_ids or None

    def _tokens(self, choice: dict[str, Any], usage: dict[str, Any] | None) -> int | None:
        """Tokens that a chunk brought, by running usage, token ids or log-probabilities; None if it has none."""
        if usage and (total := usage.get("completion_tokens")) is not None:
            new, self._counted = total - self._counted, total
            return max(int(new), 0)
        if isinstance(ids := choice.get("token_ids"), list):
            return len(ids)
        logprobs = choice.get("logprobs") or {}
        listed = logprobs.get("content") or logprobs.get("tokens")
        return len(listed) if isinstance(listed, list) else None

    def finish(self) -> None:
        """The stream has ended: count tokens, and drop pieces that carried only a role or the end."""
        record = self._record
        told = (self._usage or {}).get("completion_tokens")
        usage = self._usage or {}
        record.prompt_tokens = usage.get("prompt_tokens") or record.prompt_tokens
        record.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        pieces = [piece for piece in self._pieces if piece.tokens != 0 or piece.chars]
        record.output_tokens = told or self._total(pieces)
        for end in (0, -1):
            while _is_bare(pieces, end, record.output_tokens):
                del pieces[end]
        record.piece_s = [piece.at_s for piece in pieces]
        record.first_tokens = _first_tokens(pieces, record.output_tokens)
        if record.error is None and not self.is_whole:
            record.error = "the stream broke off"
        if record.error is None and not record.piece_s:
            record.error = "the answer has no token"

    def _total(self, pieces: list[Piece]) -> int:
        """Tokens of an answer without usage: as counted piece by piece, else those of its text, else pieces."""
        if pieces and all(piece.tokens is not None for piece in pieces):
            return sum(piece.tokens or 0 for piece in pieces)
        with_text = sum(piece.chars > 0 for piece in pieces)
        if self._count is not None and with_text:
            return max(self._count("".join(piece.text for piece in pieces)), with_text)
        return len(pieces)


def _is_bare(pieces: list[Piece], end: int, tokens: int) -> bool:
    """Whether the first or last piece was no token.

    A piece without text is one where every token has its own piece; a role or an end is none where pieces are fewer.
    """
    if not pieces or pieces[end].chars or pieces[end].tokens:
        return False
    return len(pieces) > tokens or (1 < len(pieces) < tokens and pieces[end].is_role)


def _first_tokens(pieces: list[Piece], tokens: int) -> int:
    """Tokens of the first piece: as the server says, one where every piece is one, else by its share of the text."""
    if len(pieces) >= tokens or not pieces:
        return 1
    if pieces[0].tokens:
        return min(pieces[0].tokens, tokens)
    share = pieces[0].chars / max(sum(piece.chars for piece in pieces), 1)
    return min(max(round(tokens * share), 1), tokens - len(pieces) + 1)


async def ask(
    session: aiohttp.ClientSession, endpoint: Endpoint, body: bytes, record: Record, origin: float, *,
    keeps_text: bool = False,
) -> Answer:  # fmt: skip
    """Send `body` and fill in `record`, in seconds after `origin` of `time.perf_counter`. Raises nothing."""
    answer = Answer(record, endpoint.count, keeps_text=keeps_text)
    events = Events()
    try:
        async with (
            asyncio.timeout(endpoint.timeout_s),
            session.post(endpoint.url, data=body, headers=endpoint.headers) as reply,
        ):
            if reply.status != 200:
                record.error = _refusal(reply.status, await reply.read())
                record.was_turned_away = reply.status in TURNED_AWAY
                return answer
            async for data in reply.content.iter_any():
                now = time.perf_counter() - origin
                for event in events.feed(data):
                    answer.take(event, now)
            for event in events.end():
                answer.take(event, time.perf_counter() - origin)
            answer.finish()
    except TimeoutError:
        record.error = f"no whole answer within {endpoint.timeout_s:g} s"
    except (aiohttp.ClientError, OSError) as error:
        record.error = _failure(error)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        record.error = f"no OpenAI stream: {type(error).__name__}"
    finally:
        record.ended_s = time.perf_counter() - origin
    return answer


def _refusal(status: int, text: bytes) -> str:
    try:
        message = _message(from_json(text))
    except ValueError:
        message = text.decode("utf-8", "replace").strip()
    return f"HTTP {status}: {message[:SHOWN_CHARS]}".rstrip(": ")


def _message(value: Any) -> str:
    """The message of an OpenAI error object, or the start of the body."""
    error = value.get("error", value) if isinstance(value, dict) else value
    return str(error.get("message", error) if isinstance(error, dict) else error)


def _failure(error: Exception) -> str:
    """An error of the connection, without what differs between requests."""
    if isinstance(error, aiohttp.ClientConnectorError | ConnectionRefusedError):
        return "cannot connect"
    if isinstance(error, aiohttp.ServerDisconnectedError | aiohttp.ClientPayloadError | ConnectionResetError):
        return "the server closed the connection"
    return f"{type(error).__name__}: {error}"[:SHOWN_CHARS]
