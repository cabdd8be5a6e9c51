"""Why requests ran or waited, the figures of the dashboard, and recordings of what the device does."""

import threading
from pathlib import Path

from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from apt_jax.serve.errors import BadRequest, error_body
from apt_jax.serve.http.service import Service
from apt_jax.serve.openai.requests import Strict, parse_body, parse_json

SHOWN_PLANS = 64
STATE_PLANS = 48  # on the dashboard


class ProfileRequest(Strict):
    """Body of POST /debug/profile."""

    seconds: float = Field(default=2.0, gt=0, le=60)


class DebugRoutes:
    """The routes under /debug."""

    def __init__(self, service: Service):
        self._service = service
        self._profiling = threading.Lock()

    def routes(self) -> list[Route]:
        """For the application."""
        return [
            Route("/debug/plans", self.plans, methods=["GET"]),
            Route("/debug/requests/{id}", self.request, methods=["GET"]),
            Route("/debug/state", self.state, methods=["GET"]),
            Route("/debug/profile", self.profile, methods=["POST"]),
        ]

    async def plans(self, http: Request) -> Response:
        """GET /debug/plans?last=N: the newest plans with their reasons, oldest first."""
        text = http.query_params.get("last", str(SHOWN_PLANS))
        if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= SHOWN_PLANS):
            raise BadRequest(f"last={text[:20]!r} must be between 1 and {SHOWN_PLANS}", "last")
        engine = self._service.backend.ready_engine()
        plans = await self._service.view.plans()
        return JSONResponse({"policy": engine.config.scheduling_policy, "plans": plans[-int(text) :]})

    async def request(self, http: Request) -> Response:
        """GET /debug/requests/ID: what became of a completion, or of one of its samples."""
        request_id = http.path_params["id"]
        found = await self._service.view.story(request_id)
        if not found:
            message = f"no request {request_id!r} is known; only the newest finished ones are kept"
            return JSONResponse(error_body(message, "invalid_request_error", "id", "request_not_found"), 404)
        return JSONResponse({"id": request_id, "samples": found})

    async def state(self, http: Request) -> Response:
        """GET /debug/state: everything that the dashboard shows."""
        return JSONResponse(await self._state())

    async def profile(self, http: Request) -> Response:
        """POST /debug/profile {"seconds"}: record with jax.profiler; answers when it is done, with the folder."""
        options = self._service.options
        if not options.enable_profiler:
            message = "profiling is off; start the server with --enable-profiler"
            return JSONResponse(error_body(message, "invalid_request_error", None, "profiler_off"), 403)
        data = await self._service.read_body(http)
        body = parse_body(parse_json(data) if data else {}, ProfileRequest)
        if not self._profiling.acquire(blocking=False):
            message = "a recording is under way; wait for it"
            return JSONResponse(error_body(message, "invalid_request_error", None, "profiler_busy"), 409)
        try:
            folder = await self._service.view.record(Path(options.profile_dir), body.seconds)
        finally:
            self._profiling.release()
        return JSONResponse({"folder": str(folder), "seconds": body.seconds})

    async def _state(self) -> dict[str, object]:
        service = self._service
        status = "stopping" if service.is_stopping else service.backend.status.value
        shown: dict[str, object] = {"model": service.model_name, "status": status}
        shown |= await run_in_threadpool(service.recent.figures)
        engine = service.backend.engine
        if engine is None:
            return shown
        plans = (await service.view.plans())[-STATE_PLANS:]
        return {
            **shown,
            "policy": engine.config.scheduling_policy,
            "cache_mode": engine.config.cache_mode,
            "max_model_len": engine.max_model_len,
            "slo": {"ttft_ms": engine.config.ttft_slo_ms, "tbt_ms": engine.config.tbt_slo_ms},
            **await service.view.levels(),
            "can_chat": bool(service.chat_template or getattr(engine.tokenizer, "chat_template", None)),
            "plans": plans,
        }
