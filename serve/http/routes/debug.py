"""Why requests ran or waited, the figures of the dashboard, and recordings of what the device does."""

import time
from pathlib import Path

from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from apt_jax.serve.errors import BadRequest, error_body
from apt_jax.serve.http.routes.probes import VERSION
from apt_jax.serve.http.service import Service
from apt_jax.serve.json_text import parse_json
from apt_jax.serve.observability.timeline import WIDTHS_S
from apt_jax.serve.openai.bodies.strict import Strict, parse_body

SHOWN_PLANS = 64
STATE_PLANS = 48  # on the dashboard


class ProfileRequest(Strict):
    """Body of POST /debug/profile."""

    seconds: float = Field(default=2.0, gt=0, le=60)


async def plans(service: Service, http: Request) -> Response:
    """GET /debug/plans?last=N: the newest plans with their reasons, oldest first."""
    text = http.query_params.get("last", str(SHOWN_PLANS))
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= SHOWN_PLANS):
        raise BadRequest(f"last={text[:20]!r} must be between 1 and {SHOWN_PLANS}", "last")
    engine = service.backend.ready_engine()
    newest = (await service.view.plans())[-int(text) :]
    return JSONResponse({"policy": engine.config.scheduling_policy, "now_s": time.monotonic(), "plans": newest})


async def requests(service: Service, http: Request) -> Response:
    """GET /debug/requests: the newest requests in short, those under way first."""
    return JSONResponse({"requests": await service.view.requests()})


async def timeline(service: Service, http: Request) -> Response:
    """GET /debug/history?range=10m|1h|1d: lines over time, sums, and each SLO's share kept."""
    name = http.query_params.get("range", next(iter(WIDTHS_S)))
    if name not in WIDTHS_S:
        raise BadRequest(f"range={name[:20]!r} must be one of {', '.join(WIDTHS_S)}", "range")
    return JSONResponse(await run_in_threadpool(service.timeline.figures, name))


async def story(service: Service, http: Request) -> Response:
    """GET /debug/requests/ID: the history of a completion, or of one of its samples."""
    request_id = http.path_params["id"]
    found = await service.view.story(request_id)
    if not found:
        message = f"no request {request_id!r} is known; only the newest finished ones are kept"
        return JSONResponse(error_body(message, "invalid_request_error", "id", "request_not_found"), 404)
    return JSONResponse({"id": request_id, "samples": found})


async def state(service: Service, http: Request) -> Response:
    """GET /debug/state: everything that the dashboard shows."""
    shown: dict[str, object] = {
        "model": service.model_name,
        "status": service.status,
        "version": VERSION,
        "uptime_s": round(time.monotonic() - service.timeline.began_s, 1),
    }
    if (trouble := service.backend.trouble) is not None:
        shown["trouble"] = trouble
    shown |= await run_in_threadpool(service.recent.figures)
    engine = service.backend.engine
    if engine is None:
        return JSONResponse(shown)
    newest = [
        {key: plan[key] for key in ("number", "now_s", "summary", "replica") if key in plan}
        for plan in (await service.view.plans())[-STATE_PLANS:]
    ]
    slo = engine.config.slo
    shown |= {
        "policy": engine.config.scheduling_policy,
        "cache_mode": engine.config.cache_mode,
        "max_model_len": engine.max_model_len,
        "slo": {"ttft_ms": slo.ttft_s * 1e3, "tbt_ms": slo.tbt_s * 1e3, "stall_ms": slo.stall_limit_s * 1e3},
        **await service.view.levels(),
        "can_chat": bool(service.chat_template or getattr(engine.tokenizer, "chat_template", None)),
        "plans": newest,
    }
    return JSONResponse(shown)


async def reset_prefix_cache(service: Service, http: Request) -> Response:
    """POST /reset_prefix_cache: empty the prefix cache; 200 without a body, as vLLM."""
    service.backend.ready_engine()
    await service.view.reset_prefix_cache()
    return Response(status_code=200)


async def profile(service: Service, http: Request) -> Response:
    """POST /debug/profile {"seconds"}: record with jax.profiler; answers when it is done, with the folder."""
    options = service.options
    if not options.enable_profiler:
        message = "profiling is off; start the server with --enable-profiler"
        return JSONResponse(error_body(message, "invalid_request_error", None, "profiler_off"), 403)
    data = await service.read_body(http)
    body = parse_body(parse_json(data) if data else {}, ProfileRequest)
    if not service.profiling.acquire(blocking=False):
        message = "a recording is under way; wait for it"
        return JSONResponse(error_body(message, "invalid_request_error", None, "profiler_busy"), 409)
    try:
        folder = await service.view.record(Path(options.profile_dir), body.seconds)
    finally:
        service.profiling.release()
    return JSONResponse({"folder": str(folder), "seconds": body.seconds})
