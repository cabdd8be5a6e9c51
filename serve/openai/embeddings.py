"""Embeddings: the model's last hidden state after the last token of each input, as vLLM pools a model for text."""

import base64
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np

from apt_jax.output import Output
from apt_jax.sampling.params import PoolingParams
from apt_jax.serve.errors import BadRequest
from apt_jax.serve.openai.bodies.embeddings import EmbeddingRequest
from apt_jax.serve.openai.bodies.slo import slo_of
from apt_jax.serve.openai.generation import ServedModel, failed
from apt_jax.serve.openai.prompts import check_model, prompt_ids
from apt_jax.serve.runtime.samples import Sample, fan_out


def unit(vector: np.ndarray) -> np.ndarray:
    """A vector of length 1 in the same direction, float32 `[E]`; zeros stay zeros."""
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


class Embedding:
    """One unfinished request of /v1/embeddings: its samples for the engine, and its response as outputs come in."""

    ID_PREFIX: ClassVar[str] = "embd"
    WANTED: ClassVar[str] = "vectors"

    def __init__(self, body: EmbeddingRequest, request_id: str, model_name: str, samples: list[Sample]):
        self.body, self.request_id, self.model_name, self.samples = body, request_id, model_name, samples
        self._found: dict[int, np.ndarray] = {}

    @classmethod
    def prepare(
        cls,
        body: EmbeddingRequest,
        model: ServedModel,
        *,
        request_id: str,
        headers: Mapping[str, str],
        arrival_s: float,
        max_samples: int,
    ) -> Self:
        """Check a body against the model that is served. Tokenises; touches no state.

        Raises:
            ModelNotFound: the body names another model.
            BadRequest: text without a tokenizer, a bad SLO, more than `max_samples` inputs, or too long ones.
        """
        check_model(body.model, model.names)
        if len(body.input) > max_samples:
            raise BadRequest(
                f"{len(body.input)} inputs are more than the queue holds ({max_samples}); send fewer at once or raise "
                "--max-num-queued-reqs",
                "input",
            )
        samples = fan_out(
            request_id,
            [prompt_ids(item, body, model.engine, "input", special=True) for item in body.input],
            PoolingParams(),
            slo=slo_of(body.slo, headers, model.engine.config.slo),
            priority=body.priority or 0,
            arrival_s=arrival_s,
            cache_salt=body.cache_salt,
        )
        return cls(body, request_id, model.name, samples)

    def collect(self, sample: Sample, output: Output) -> None:
        """Take in an output.

        Raises:
            EngineFailure: the engine ended the sample with an error.
        """
        if (error := failed(output)) is not None:
            raise error
        if output.hidden is not None:
            self._found[sample.index] = output.hidden

    @property
    def is_whole(self) -> bool:
        """Whether every input has its vector."""
        return len(self._found) == len(self.samples)

    def response(self) -> dict[str, Any]:
        """The whole object, once every sample has ended."""
        tokens = sum(len(sample.prompt_token_ids) for sample in self.samples)
        data = [
            {"object": "embedding", "index": index, "embedding": self._shown(self._found[index])}
            for index in range(len(self.samples))
        ]
        return {
            "id": self.request_id,
            "object": "list",
            "created": int(time.time()),
            "model": self.model_name,
            "data": data,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    def _shown(self, vector: np.ndarray) -> Sequence[float] | str:
        vector = vector if self.body.normalize is False else unit(vector)
        if self.body.encoding_format == "base64":
            return base64.b64encode(vector.astype("<f4").tobytes()).decode()
        return vector.tolist()
