"""One unfinished request whose prompts alone are read, without an answer: embeddings and scores."""

import time
from typing import Any, ClassVar

from apt_jax.output import Output
from apt_jax.serve.openai.bodies.requests import PromptRequest
from apt_jax.serve.openai.generation import failed
from apt_jax.serve.runtime.samples import Sample


class PromptOnly[Body: PromptRequest, Found]:
    """Its samples for the engine, and its response as outputs come in.

    Attributes:
        ID_PREFIX: of ids.
        WANTED: what is found, in words.
    """

    ID_PREFIX: ClassVar[str]
    WANTED: ClassVar[str]

    def __init__(self, body: Body, request_id: str, model_name: str, samples: list[Sample]):
        self.body, self.request_id, self.model_name, self.samples = body, request_id, model_name, samples
        self._found: dict[int, Found] = {}  # by the sample's index

    def collect(self, sample: Sample, output: Output) -> None:
        """Take in an output.

        Raises:
            EngineFailure: the engine ended the sample with an error.
        """
        if (error := failed(output)) is not None:
            raise error
        if (found := self._found_in(sample, output)) is not None:
            self._found[sample.index] = found

    @property
    def is_whole(self) -> bool:
        """Whether every sample has what is wanted."""
        return len(self._found) == len(self.samples)

    def response(self) -> dict[str, Any]:
        """The whole object, once every sample has ended."""
        tokens = sum(len(sample.prompt_token_ids) for sample in self.samples)
        return {
            "id": self.request_id,
            "object": "list",
            "created": int(time.time()),
            "model": self.model_name,
            "data": [self._item(sample, self._found[sample.index]) for sample in self.samples],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    def _found_in(self, sample: Sample, output: Output) -> Found | None:
        """What an output has of it."""
        raise NotImplementedError

    def _item(self, sample: Sample, found: Found) -> dict[str, Any]:
        """One entry of the response's data."""
        raise NotImplementedError
