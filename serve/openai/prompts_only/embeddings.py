"""Embeddings: the model's last hidden state after the last token of each input, as vLLM pools a model for text."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np

from apt_jax.output import Output
from apt_jax.sampling.params import PoolingParams
from apt_jax.serve.openai.bodies.embeddings import EmbeddingRequest
from apt_jax.serve.openai.bodies.slo import slo_of
from apt_jax.serve.openai.generation import ServedModel
from apt_jax.serve.openai.prompts import check_fits_queue, check_model, prompt_ids
from apt_jax.serve.openai.prompts_only.prompt_only import PromptOnly
from apt_jax.serve.runtime.samples import Sample, fan_out


def unit(vector: np.ndarray) -> np.ndarray:
    """A vector of length 1 in the same direction, float32 `[E]`; zeros stay zeros."""
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


class Embedding(PromptOnly[EmbeddingRequest, np.ndarray]):
    """Of /v1/embeddings."""

    ID_PREFIX: ClassVar[str] = "embd"
    WANTED: ClassVar[str] = "vectors"

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
        check_fits_queue(len(body.input), f"{len(body.input)} inputs are", max_samples, "input")
        samples = fan_out(
            request_id,
            [prompt_ids(item, body, model.engine, "input", special=True) for item in body.input],
            PoolingParams(),
            slo=slo_of(body.slo, headers, model.engine.config.slo),
            priority=body.priority or 0,
            arrival_s=arrival_s,
            cache_salt=body.cache_salt,
            user=body.user,
        )
        return cls(body, request_id, model.name, samples)

    def _found_in(self, sample: Sample, output: Output) -> np.ndarray | None:
        return output.hidden

    def _item(self, sample: Sample, found: np.ndarray) -> dict[str, Any]:
        return {"object": "embedding", "index": sample.index, "embedding": self._shown(found)}

    def _shown(self, vector: np.ndarray) -> Sequence[float] | str:
        vector = vector if self.body.normalize is False else unit(vector)
        if self.body.encoding_format == "base64":
            return base64.b64encode(vector.astype("<f4").tobytes()).decode()
        return vector.tolist()
