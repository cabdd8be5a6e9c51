"""Routes for monitoring: /health, /ready, /version, /load, /metrics."""

import asyncio
import importlib.metadata

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from apt_jax.serve.http.service import Service
from apt_jax.serve.runtime.status import EngineStatus

VERSION = importlib.metadata.version("apt-jax")


async def health(service: Service, http: Request) -> Response:
    """GET /health: 200 while the process serves or may still come to serve; else 503 with a reason."""
    trouble = service.backend.trouble
    if trouble is None:
        return JSONResponse({"status": service.backend.status.value})
    return JSONResponse({"status": service.status, "reason": trouble}, 503)


async def ready(service: Service, http: Request) -> Response:
    """GET /ready: 200 once every program is compiled and requests are taken."""
    status = service.backend.status
    if status is EngineStatus.READY and not service.is_stopping:
        return JSONResponse({"status": status.value})
    shown = "stopping" if service.is_stopping else status.value
    return JSONResponse({"status": shown}, 503, {"retry-after": "1"})


async def version(service: Service, http: Request) -> Response:
    """GET /version."""
    return JSONResponse({"version": VERSION})


async def load(service: Service, http: Request) -> Response:
    """GET /load: for load balancers. `server_load` counts the unfinished HTTP requests for completions."""
    waiting, running = service.backend.num_waiting_running
    return JSONResponse({"server_load": service.num_generating, "waiting": waiting, "running": running})


async def metrics(service: Service, http: Request) -> Response:
    """GET /metrics, for Prometheus."""
    service.metrics.tasks.set(len(asyncio.all_tasks()))
    return Response(await service.view.metrics_text(), media_type=CONTENT_TYPE_PLAIN_0_0_4)
