"""The two kinds of completion: how a body of each is read, and what makes its response. Routes, batches, snapshots."""

from collections.abc import Callable
from typing import Any, NamedTuple

from apt_jax.serve.openai.chat_completions import ChatCompletion
from apt_jax.serve.openai.chat_requests import parse_chat
from apt_jax.serve.openai.completions import Completion
from apt_jax.serve.openai.generation import Generation
from apt_jax.serve.openai.requests import GenerationRequest, parse_completion


class Kind(NamedTuple):
    """`parse` raises BadRequest for a body that is none."""

    parse: Callable[[object], GenerationRequest]
    generation: type[Generation[Any]]


KINDS_BY_PATH = {
    "/v1/completions": Kind(parse_completion, Completion),
    "/v1/chat/completions": Kind(parse_chat, ChatCompletion),
}
KINDS_BY_PREFIX = {kind.generation.ID_PREFIX: kind for kind in KINDS_BY_PATH.values()}
