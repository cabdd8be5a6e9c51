"""OpenAI's Batch API: /v1/files and /v1/batches."""

import re
import time
from collections.abc import Iterator
from typing import Any

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.types import Message

from apt_jax.serve.batch.store import owner_of
from apt_jax.serve.batch.worker import BatchWorker
from apt_jax.serve.errors import BadRequest, BodyTooLarge, NotFound, NotJson
from apt_jax.serve.http.service import Service
from apt_jax.serve.json_text import parse_json, shown
from apt_jax.serve.openai.bodies.batches import WINDOW_S, BatchRequest
from apt_jax.serve.openai.bodies.strict import parse_body

FORM_BYTES = 64 * 1024  # of an upload besides its file
READ_BYTES = 1 << 20
LIMIT = re.compile("[0-9]{1,9}")  # Python reads no number of more than 4,300 digits
MOST_LISTED = {"files": 10_000, "batches": 100}  # OpenAI's limits


async def create_file(service: Service, http: Request) -> Response:
    """POST /v1/files."""
    worker, owner = _worker(service), _owner(service, http)
    limit = service.options.max_batch_file_bytes
    _check_form(http)
    too_large = BodyTooLarge(f"the file is longer than {limit} bytes; split it or raise --max-batch-file-bytes")
    length = http.headers.get("content-length", "")
    if length.isdigit() and int(length) > limit + FORM_BYTES:
        raise too_large
    size = 0

    async def receive() -> Message:
        nonlocal size
        message = await http.receive()
        size += len(message.get("body", b""))
        if size > limit + FORM_BYTES:
            raise too_large
        return message

    form_of = Request(http.scope, receive)
    try:
        async with form_of.form(max_files=1, max_fields=8, max_part_size=FORM_BYTES) as form:
            file, purpose = form.get("file"), form.get("purpose")
            if not isinstance(file, UploadFile):
                raise BadRequest("the form has no file; send one as the field file", "file")
            for field in form.keys() - {"file", "purpose"}:
                name = field.partition("[")[0]
                if name == "expires_after":
                    raise BadRequest("expires_after is not supported, files stay until they are deleted", name)
                raise BadRequest(f"unknown field {shown(name)} of the form; file and purpose are known", name[:80])
            if purpose != "batch":
                raise BadRequest(f"purpose is {shown(purpose)}, only batch is served", "purpose")
            if file.size is not None and file.size > limit:
                raise too_large
            source, name = file.file, (file.filename or "batch.jsonl")[:255]

            def pieces() -> Iterator[bytes]:
                while piece := source.read(READ_BYTES):
                    yield piece

            known = await service.off_loop(lambda: worker.store.add_file(owner, name, "batch", pieces()))
    except MultiPartException as error:
        raise BadRequest(f"the form cannot be read: {error.message}") from error
    return JSONResponse(known)


async def list_files(service: Service, http: Request) -> Response:
    """GET /v1/files."""
    purpose, order = http.query_params.get("purpose"), http.query_params.get("order", "desc")
    if order not in ("asc", "desc"):
        raise BadRequest(f"order={shown(order)} must be asc or desc, by the time that the files were made", "order")
    files = await service.off_loop(_worker(service).store.files, _owner(service, http))
    files = [file for file in files if purpose in (None, file["purpose"])]
    return JSONResponse(_page(files if order == "desc" else files[::-1], http, "files"))


async def get_file(service: Service, http: Request) -> Response:
    """GET /v1/files/{id}."""
    store = _worker(service).store
    return JSONResponse(await service.off_loop(store.file, _owner(service, http), http.path_params["id"]))


async def delete_file(service: Service, http: Request) -> Response:
    """DELETE /v1/files/{id}."""
    store, file_id = _worker(service).store, http.path_params["id"]
    await service.off_loop(store.delete_file, _owner(service, http), file_id)
    return JSONResponse({"id": file_id, "object": "file", "deleted": True})


async def file_content(service: Service, http: Request) -> Response:
    """GET /v1/files/{id}/content."""
    store, file_id = _worker(service).store, http.path_params["id"]
    await service.off_loop(store.file, _owner(service, http), file_id)
    return FileResponse(store.path_of(file_id), media_type="application/jsonl")


async def create_batch(service: Service, http: Request) -> Response:
    """POST /v1/batches."""
    worker, owner = _worker(service), _owner(service, http)
    body = parse_body(parse_json(await service.read_body(http)), BatchRequest)
    now = int(time.time())

    def keep() -> dict[str, Any]:
        worker.store.file(owner, body.input_file_id)
        return worker.store.add_batch(
            owner,
            {
                "endpoint": body.endpoint, "errors": None, "input_file_id": body.input_file_id,
                "completion_window": body.completion_window, "status": "validating", "output_file_id": None,
                "error_file_id": None, "created_at": now, "in_progress_at": None, "expires_at": now + WINDOW_S,
                "finalizing_at": None, "completed_at": None, "failed_at": None, "expired_at": None,
                "cancelling_at": None, "cancelled_at": None,
                "request_counts": {"total": 0, "completed": 0, "failed": 0}, "metadata": body.metadata,
            },
        )  # fmt: skip

    batch = await service.off_loop(keep)
    worker.wake()
    return JSONResponse(batch)


async def list_batches(service: Service, http: Request) -> Response:
    """GET /v1/batches."""
    worker = _worker(service)
    batches = await service.off_loop(worker.store.batches, _owner(service, http))
    return JSONResponse(_page([worker.shown(batch) for batch in batches], http, "batches"))


async def get_batch(service: Service, http: Request) -> Response:
    """GET /v1/batches/{id}."""
    worker = _worker(service)
    batch = await service.off_loop(worker.store.batch, _owner(service, http), http.path_params["id"])
    return JSONResponse(worker.shown(batch))


async def cancel_batch(service: Service, http: Request) -> Response:
    """POST /v1/batches/{id}/cancel."""
    worker, owner = _worker(service), _owner(service, http)
    return JSONResponse(await worker.cancel(owner, http.path_params["id"]))


def _worker(service: Service) -> BatchWorker:
    if service.batches is None:
        raise NotFound("this server keeps no files and batches; start it with --batch-dir DIR")
    return service.batches


def _owner(service: Service, http: Request) -> str:
    """Whose files and batches a request sees: those of its API key."""
    if not service.options.api_key:
        return owner_of(None)
    return owner_of(http.headers.get("authorization", "").partition(" ")[2].strip())


def _check_form(http: Request) -> None:
    """Raises NotJson for what is no form, and for one from a web page without a key: pages may send forms unasked."""
    if not http.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise NotJson("send the file as multipart/form-data", "content-type")
    if {"origin", "sec-fetch-site"} & {*http.headers} and "authorization" not in http.headers:
        raise NotJson("a web page needs an API key to send files", "authorization")


def _page(found: list[dict[str, Any]], http: Request, what: str) -> dict[str, Any]:
    """OpenAI's page of a list: `limit` of those after the id `after`."""
    limit = http.query_params.get("limit", "20" if what == "batches" else str(MOST_LISTED[what]))
    if not LIMIT.fullmatch(limit) or not 1 <= int(limit) <= MOST_LISTED[what]:
        raise BadRequest(f"limit={shown(limit)} must be between 1 and {MOST_LISTED[what]}", "limit")
    if (after := http.query_params.get("after")) is not None:
        ids = [each["id"] for each in found]
        if after not in ids:
            raise BadRequest(f"after={shown(after)} is no id of {what} here", "after")
        found = found[ids.index(after) + 1 :]
    page = found[: int(limit)]
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
    return {"object": "list", "data": page, **ends, "has_more": len(found) > len(page)}
