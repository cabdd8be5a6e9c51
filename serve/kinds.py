"""The two kinds of completion: how a body of each is read, and what makes its response. Routes, batches, snapshots."""

from collections.abc import Callable
from typing import Any, NamedTuple

from serve.chat_completions import ChatCompletion
from serve.chat_protocol import parse_chat
from serve.completions import Completion
from serve.generation import Generation
from serve.protocol import GenerationRequest, parse_completion


class Kind(NamedTuple):
    """`parse` raises BadRequest for a body that is none."""

    parse: Callable[[object], GenerationRequest]
    generation: type[Generation[Any]]


KINDS_BY_PATH = {
    "/v1/completions": Kind(parse_completion, Completion),
    "/v1/chat/completions": Kind(parse_chat, ChatCompletion),
}
KINDS_BY_PREFIX = {kind.generation.ID_PREFIX: kind for kind in KINDS_BY_PATH.values()}
