"""What can be asked about the server and its model: models, tokens, health, load, version."""

import asyncio
import importlib.metadata

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from apt_jax.serve.errors import BadRequest, ModelNotFound
from apt_jax.serve.http.service import Service
from apt_jax.serve.openai.chat_template import render
from apt_jax.serve.openai.generation import check_model
from apt_jax.serve.openai.requests import parse_body, parse_json
from apt_jax.serve.openai.token_requests import DetokenizeRequest, TokenizeRequest, parse_tokenize
from apt_jax.serve.runtime.status import EngineStatus
from apt_jax.tokenization.tokenizer import Tokenizer

VERSION = importlib.metadata.version("apt-jax")


class ModelRoutes:
    """The routes that leave the engine alone."""

    def __init__(self, service: Service):
        self._service = service

    def routes(self) -> list[Route]:
        """For the application."""
        return [
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{name:path}", self.model, methods=["GET"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/health", self.health, methods=["GET"]),
            Route("/ready", self.ready, methods=["GET"]),
            Route("/version", self.version, methods=["GET"]),
            Route("/load", self.load, methods=["GET"]),
            Route("/metrics", self.metrics, methods=["GET"]),
        ]

    async def models(self, http: Request) -> Response:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, http: Request) -> Response:
        """GET /v1/models/NAME."""
        name, served = http.path_params["name"], self._service.model_name
        if name != served:
            raise ModelNotFound(f"the model {name!r} is not served here; use {served!r}", "model")
        return JSONResponse(self._model())

    async def tokenize(self, http: Request) -> Response:
        """POST /tokenize: token ids of a text or a chat."""
        body = parse_tokenize(parse_json(await self._service.read_body(http)))
        check_model(body.model, self._service.model_name)
        tokenizer = self._tokenizer("prompt")
        token_ids = await run_in_threadpool(self._encode, body, tokenizer)
        strings = [tokenizer.token_text(i) for i in token_ids] if body.return_token_strs else None
        max_model_len = self._service.backend.ready_engine().max_model_len
        return JSONResponse(
            {"count": len(token_ids), "max_model_len": max_model_len, "tokens": token_ids, "token_strs": strings}
        )

    async def detokenize(self, http: Request) -> Response:
        """POST /detokenize: text of token ids, special ones too."""
        body = parse_body(parse_json(await self._service.read_body(http)), DetokenizeRequest)
        check_model(body.model, self._service.model_name)
        tokenizer = self._tokenizer("tokens")
        text = await run_in_threadpool(tokenizer.decode, body.tokens, skip_special_tokens=False)
        return JSONResponse({"prompt": text})

    async def health(self, http: Request) -> Response:
        """GET /health: 200 while the process can still come to serve or serves."""
        status = self._service.backend.status
        return JSONResponse({"status": status.value}, 503 if status is EngineStatus.FAILED else 200)

    async def ready(self, http: Request) -> Response:
        """GET /ready: 200 once every program is compiled and requests are taken."""
        status = self._service.backend.status
        if status is EngineStatus.READY and not self._service.is_stopping:
            return JSONResponse({"status": status.value})
        shown = "stopping" if self._service.is_stopping else status.value
        return JSONResponse({"status": shown}, 503, {"retry-after": "1"})

    async def version(self, http: Request) -> Response:
        """GET /version."""
        return JSONResponse({"version": VERSION})

    async def load(self, http: Request) -> Response:
        """GET /load: what load balancers ask. `server_load` counts the HTTP requests for completions under way."""
        waiting, running = self._service.backend.num_waiting_running
        return JSONResponse({"server_load": self._service.num_generating, "waiting": waiting, "running": running})

    async def metrics(self, http: Request) -> Response:
        """GET /metrics, for Prometheus."""
        self._service.metrics.tasks.set(len(asyncio.all_tasks()))
        return Response(await self._service.view.metrics_text(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    def _encode(self, body: TokenizeRequest, tokenizer: Tokenizer) -> list[int]:
        if body.messages is None:
            assert body.prompt is not None
            return tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
        generate = body.add_generation_prompt is not False
        text = render(body.messages, tokenizer, self._service.chat_template, generate=generate)
        return tokenizer.encode(text, add_special_tokens=body.add_special_tokens is True)

    def _tokenizer(self, param: str) -> Tokenizer:
        tokenizer = self._service.backend.ready_engine().tokenizer
        if tokenizer is None:
            raise BadRequest("this model has no tokenizer; give its folder with --tokenizer", param)
        return tokenizer

    def _model(self) -> dict[str, object]:
        engine = self._service.backend.engine
        return {
            "id": self._service.model_name,
            "object": "model",
            "created": self._service.created,
            "owned_by": "apt-jax",
            "max_model_len": None if engine is None else engine.max_model_len,
        }
