"""What the routes share: the engine thread, the model's public name, the options, and how a body is read."""

import time

from starlette.requests import Request

from serve.engine_thread import EngineThread
from serve.errors import BodyTooLarge
from serve.generation import ServedModel
from serve.metrics import Metrics
from serve.options import ServerOptions
from serve.request_log import RequestLog


class Service:
    """One engine as it is seen over HTTP. `chat_template` goes before the tokenizer's own."""

    def __init__(self, engine_thread: EngineThread, model_name: str, options: ServerOptions):
        self.engine_thread = engine_thread
        self.model_name = model_name
        self.options = options
        self.chat_template: str | None = None
        self.created = int(time.time())
        self.metrics = Metrics(model_name)
        engine_thread.observers += [self.metrics, RequestLog()]
        self.num_generating = 0  # HTTP requests for completions that are under way

    def served_model(self) -> ServedModel:
        """What bodies are checked against.

        Raises:
            NotReady: the engine is not ready.
        """
        return ServedModel(self.engine_thread.ready_engine(), self.model_name, self.chat_template)

    async def read_body(self, http: Request) -> bytes:
        """The body, read no further than the limit.

        Raises:
            BodyTooLarge: it is longer.
        """
        limit = self.options.max_body_bytes
        too_large = BodyTooLarge(f"the body is longer than {limit} bytes; send less or raise --max-body-bytes")
        length = http.headers.get("content-length", "")
        if length.isdigit() and int(length) > limit:
            raise too_large
        chunks, size = [], 0
        async for chunk in http.stream():
            size += len(chunk)
            if size > limit:
                raise too_large
            chunks.append(chunk)
        return b"".join(chunks)
