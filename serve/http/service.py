"""State shared by the routes: engine or engines, the model's public name, options; and the reading of bodies."""

import asyncio
import contextlib
import re
import threading
import time
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Mapping
from typing import Any

from anyio import CapacityLimiter, to_thread
from starlette.requests import Request

from apt_jax.serve.batch.worker import BatchWorker
from apt_jax.serve.errors import BadRequest, BodyTooLarge, EngineFailure, NotJson, NotReady
from apt_jax.serve.http.snapshot import record_of
from apt_jax.serve.json_text import shown
from apt_jax.serve.observability.engine_view import EngineView, View
from apt_jax.serve.observability.recent import Recent
from apt_jax.serve.observability.request_log import RequestLog
from apt_jax.serve.observability.request_metrics import MISSES
from apt_jax.serve.observability.timeline import Timeline
from apt_jax.serve.observability.tracing import Tracing
from apt_jax.serve.openai.bodies.requests import GenerationRequest
from apt_jax.serve.openai.bodies.strict import check_grammar
from apt_jax.serve.openai.generation import Generation, ServedModel
from apt_jax.serve.options import ServerOptions
from apt_jax.serve.runtime.backend import Backend
from apt_jax.serve.runtime.engine_thread import EngineThread
from apt_jax.serve.runtime.group import Group
from apt_jax.serve.runtime.status import EngineStatus, WatchLimits

JSON_TYPE = re.compile(r"application/([\w.-]+\+)?json")
LOOK_EVERY_S = 1.0
NUM_WAITING = 64  # threads that wait for grammars to be compiled, by other processes
NUM_BATCH_WORKERS = 2
NUM_WORKERS = 4  # threads for long work: each that runs makes the event loop wait for Python's lock a little longer


class Service:
    """The backend as seen over HTTP. `chat_template` overrides the tokenizer's own."""

    def __init__(self, backend: Backend, view: View, model_name: str, options: ServerOptions):
        self.backend = backend
        self.model_name = model_name
        self.options = options
        self.chat_template: str | None = None
        self.other_names: tuple[str, ...] = ()  # that bodies may call the model by
        self.created = int(time.time())
        self.view = view
        self.metrics, self.recent, self.timeline = view.metrics, Recent(), Timeline()
        backend.observers.extend([self.recent, self.timeline, RequestLog()])
        self.tracing: Tracing | None = None
        if options.otlp_traces_endpoint is not None:
            self.tracing = Tracing(options.otlp_traces_endpoint, model_name)
            backend.observers.append(self.tracing)
        if options.reject_predicted_late:
            backend.refuse_late()
        backend.watch(WatchLimits(options.max_failed_steps, options.max_step_seconds))
        self._workers = CapacityLimiter(NUM_WORKERS)
        self._waiting, self._batch_workers = CapacityLimiter(NUM_WAITING), CapacityLimiter(NUM_BATCH_WORKERS)
        self.num_generating = 0  # requests for completions that are under way
        self._under_way: list[tuple[Collection[str | None], Group]] = []  # these, with all their ids
        self.is_stopping = False
        self.profiling = threading.Lock()  # held while the device is recorded
        self.batches: BatchWorker | None = None  # of the Batch API
        self.unfinished_records: list[dict[str, Any]] = []  # for the snapshot

    @classmethod
    def of_engine(cls, thread: EngineThread, model_name: str, options: ServerOptions) -> "Service":
        """Over one engine in a thread of this process."""
        return cls(thread, EngineView(thread, model_name), model_name, options)

    @property
    def status(self) -> str:
        """For people: the engine's, unless the server is stopping or the engine in trouble."""
        status = self.backend.status
        if self.is_stopping or status is not EngineStatus.READY or self.backend.trouble is None:
            return "stopping" if self.is_stopping else status.value
        return "unhealthy"

    @property
    def names(self) -> tuple[str, ...]:
        """All names of the model."""
        return (self.model_name, *self.other_names)

    def served_model(self) -> ServedModel:
        """What bodies are checked against.

        Raises:
            NotReady: the engine is not ready.
        """
        return ServedModel(self.backend.ready_engine(), self.model_name, self.chat_template, self.other_names)

    def refused(self, reason: str) -> None:
        """Count a request that was refused."""
        self.metrics.reject(reason)
        self.timeline.refused(reason)
        if reason in MISSES:
            self.recent.refused()

    async def look(self) -> None:
        """Take the levels for the dashboard's lines every second, until it is cancelled."""
        while True:
            if levels := await self.view.levels():
                self.timeline.looked(levels)
            await asyncio.sleep(LOOK_EVERY_S)

    def check_accepts(self) -> None:
        """Raises NotReady once the server is stopping."""
        if self.is_stopping:
            raise NotReady("the server is stopping; try another one, or this one again soon")

    def check_free(self, request_id: str | None) -> None:
        """Raises BadRequest if a request with this `request_id` in its body is under way."""
        if request_id is not None and any(request_id == list(ids)[-1] for ids, _ in self._under_way):
            raise BadRequest(
                f"request_id={shown(request_id)} is that of a request under way; give each its own", "request_id"
            )

    @contextlib.contextmanager
    def under_way(self, ids: Collection[str | None], group: Group) -> Iterator[None]:
        """While a request is under way, which `end` knows by `ids`."""
        entry = ids, group
        self.num_generating += 1
        self._under_way.append(entry)
        try:
            yield
        finally:
            self.num_generating -= 1
            self._under_way.remove(entry)

    @contextlib.contextmanager
    def generating(
        self,
        generation: Generation[Any],
        group: Group,
        keep: Callable[[dict[str, Any]], None] | None = None,
        ids: Collection[str | None] = (),
    ) -> Iterator[None]:
        """While a request is under way. If the server stops meanwhile, `keep` gets the record of what is unfinished.

        Default: it goes into the snapshot. So does an answer that is finished but whose sending is cut off.
        """
        is_cut = True
        try:
            with self.under_way(ids, group):
                yield
            is_cut = False
        finally:
            if self.is_stopping and group.is_wanted:
                with contextlib.suppress(EngineFailure):
                    for sample, output in group.take_pending():
                        generation.collect(sample, output)
                if is_cut or not generation.is_whole:
                    (keep or self.keep)(self.record_of(generation))

    def end(self, request_id: str | None) -> int:
        """End the requests under way with this id, of the answer, the body or the header; None ends all.

        Their clients get what there is, with finish reason abort. Returns how many there were.
        """
        named = [group for ids, group in self._under_way if request_id is None or request_id in ids]
        for group in named:
            self.backend.end(group)
        return len(named)

    def keep(self, record: dict[str, Any]) -> None:
        """Put a record into the snapshot, once."""
        if all(record["id"] != kept["id"] for kept in self.unfinished_records):
            self.unfinished_records.append(record)

    def keep_unsent(self, generation: Generation[Any], group: Group) -> None:
        """The server ends before the client has read the answer: it goes into the snapshot."""
        if group.is_wanted:
            self.keep(self.record_of(generation))

    def record_of(self, generation: Generation[Any]) -> dict[str, Any]:
        """What the snapshot keeps of a request."""
        engine = self.backend.engine
        return record_of(generation, "" if engine is None else engine.fingerprint)

    async def off_loop[T](self, work: Callable[..., T], *args: Any) -> T:
        """What `work` returns, run in one of a few threads: for what takes longer than other clients should wait."""
        return await to_thread.run_sync(work, *args, limiter=self._workers)

    async def for_batches[T](self, work: Callable[..., T], *args: Any) -> T:
        """`off_loop` of the batch worker, for whose lines no client of completions waits."""
        return await to_thread.run_sync(work, *args, limiter=self._batch_workers)

    async def check_grammar(self, body: GenerationRequest, model: ServedModel) -> None:
        """Have what a body's answer must follow compiled, for the engine to find.

        Raises:
            BadRequest: that is impossible, or a sampling field is bad.
            QueueFull: too much is being compiled.
        """

        def check() -> None:
            params = body.sampling_params(model.engine.sampling_defaults)
            if params.structured_outputs is not None:
                check_grammar(params.structured_outputs, model.engine.tokenizer)

        await to_thread.run_sync(check, limiter=self._waiting)

    def stop(self) -> None:
        """Take no more requests, and refuse those whose grammar is still to be compiled."""
        self.is_stopping = True
        engine = self.backend.engine
        if engine is not None and engine.tokenizer is not None:
            engine.tokenizer.grammars.end_compiling()

    async def pieces(self, made: Iterator[bytes]) -> AsyncGenerator[bytes]:
        """Pieces of a large answer, each made off the event loop."""
        while (piece := await self.off_loop(next, made, None)) is not None:
            yield piece

    async def read_body(self, http: Request) -> bytes:
        """The body, read no further than the limit.

        Raises:
            NotJson: it is of another content type, such as a form's, which any web page may send here.
            BodyTooLarge: it is longer.
        """
        check_content_type(http.headers)
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


def check_content_type(headers: Mapping[str, str]) -> None:
    """Raises NotJson for another content type than JSON, or none at all from a browser.

    A browser asks first whether it may send JSON to another site (CORS), but sends texts and forms without asking.
    """
    given = headers.get("content-type")
    if given is None and not {"origin", "sec-fetch-site"} & {*headers}:
        return
    media_type = (given or "").partition(";")[0].strip().lower()
    if not JSON_TYPE.fullmatch(media_type):
        raise NotJson(
            f"content-type {shown(given)} is not taken; send JSON with the header Content-Type: application/json",
            "content-type",
        )
