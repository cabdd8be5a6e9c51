"""The body of POST /v1/batches, as OpenAI has it."""

from typing import Literal

from pydantic import Field

from apt_jax.serve.openai.bodies.fields import Metadata
from apt_jax.serve.openai.bodies.strict import Strict
from apt_jax.serve.openai.endpoints import ENDPOINTS

WINDOW_S = 86_400


class BatchRequest(Strict):
    """A file of requests to be answered within a day."""

    input_file_id: str = Field(min_length=1, max_length=64)
    endpoint: Literal["/v1/completions", "/v1/chat/completions", "/v1/responses"]
    completion_window: Literal["24h"] = "24h"
    metadata: Metadata | None = None


assert set(BatchRequest.model_fields["endpoint"].annotation.__args__) == set(ENDPOINTS)  # type: ignore[union-attr]
