"""Answers the batches of a `BatchStore` beside the server's other requests, one after the other.

Its requests come last: their SLO is a day and their priority the lowest, and no more than half of the seats are asked
for. A batch is answered line by line into its results file, which says what is done, so that a server that was killed
goes on there; then that is split into the two files that the client gets, under ids that follow from the batch's.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

from apt_jax.output import QueueFull
from apt_jax.request import OFFLINE_SLO
from apt_jax.serve.batch.batch_file import Line, ResultFile, read_lines
from apt_jax.serve.batch.batch_jobs import MAX_ATTEMPTS, BatchLine, LineError, check_unique, parse_line, prepare
from apt_jax.serve.batch.store import ENDED, BatchStore
from apt_jax.serve.errors import BadRequest, EngineFailure, NotReady, PredictedLate, error_reply
from apt_jax.serve.openai.endpoints import ENDPOINTS
from apt_jax.serve.openai.generation import Generation, ServedModel, as_bad_request
from apt_jax.serve.runtime.group import Group
from apt_jax.serve.runtime.samples import Sample

PRIORITY = 10  # the lowest that `apt` tells apart
MOST_LINES = 50_000  # OpenAI's limit
MOST_ERRORS = 100  # of lines that are no requests, told of a batch that fails for them
RETRY_S = 0.2
SHARE_OF_SEATS = 2

logger = logging.getLogger("apt_jax.serve")


class Cancelled(Exception):
    """The batch is to end with what it has."""


class BatchWorker:
    """Runs on the event loop.

    Args:
        store: what there is to do.
        submit: gives samples to the engine.
        served_model: what bodies are checked against; raises NotReady until there is one.
        off_loop: runs what takes long in a thread.
        num_engines: how many share the requests now.
    """

    def __init__(
        self,
        store: BatchStore,
        submit: Callable[[list[Sample]], Group],
        served_model: Callable[[], ServedModel],
        off_loop: Callable[..., Any],
        num_engines: Callable[[], int] = lambda: 1,
    ):
        self.store = store
        self._submit, self._served_model, self._off_loop = submit, served_model, off_loop
        self._num_engines = num_engines
        self._wake = asyncio.Event()
        self._ending = asyncio.Event()  # the batch that is worked on is to end
        self._current: str | None = None  # batch that is worked on
        self._counts: dict[str, dict[str, int]] = {}  # of it

    def wake(self) -> None:
        """There is a new batch."""
        self._wake.set()

    async def cancel(self, owner: str, batch_id: str) -> dict[str, Any]:
        """A batch is to end with what it has; one that was not begun ends at once.

        Raises:
            BadRequest: it has ended, or its answers are being put together.
        """
        batch = await self._update(
            owner, batch_id, (*ENDED, "finalizing", "cancelling"), status="cancelling", cancelling_at=int(time.time())
        )
        if batch["status"] != "cancelling":
            raise BadRequest(f"{batch_id} is {batch['status']}; only a batch that is under way can be cancelled")
        if batch_id == self._current:
            self._ending.set()
        elif not self.store.results_of(batch_id).exists():
            return await self._end(owner, batch_id, "cancelled")
        return self.shown(batch)

    def shown(self, batch: dict[str, Any]) -> dict[str, Any]:
        """`batch` with the counts of now."""
        counts = self._counts.get(batch["id"])
        return batch if counts is None else {**batch, "request_counts": counts}

    async def run(self) -> None:
        """Work until it is cancelled."""
        while True:
            self._wake.clear()
            waiting = await self._off_loop(self.store.unfinished)
            if not waiting or not await self._is_ready():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), None if not waiting else RETRY_S)
                continue
            owner, batch = waiting[0]
            self._current = batch["id"]
            self._ending.clear()
            try:
                await self._answer(owner, await self._off_loop(self.store.batch, owner, batch["id"]))  # as it is now
            except (NotReady, asyncio.CancelledError):
                raise_if_cancelled()
                await asyncio.sleep(RETRY_S)
            except Exception as error:
                logger.exception("batch %s fails", batch["id"])
                await self._end(owner, batch["id"], "failed", errors=[{"code": "server_error", "message": str(error)}])
            finally:
                self._current = None
                self._counts.pop(batch["id"], None)

    async def _is_ready(self) -> bool:
        try:
            self._served_model()
        except NotReady:
            return False
        return True

    async def _answer(self, owner: str, batch: dict[str, Any]) -> None:
        if batch["status"] == "validating":
            source = self.store.path_of(batch["input_file_id"])
            errors, total = await self._off_loop(_faults, source, batch["endpoint"])
            if errors:
                await self._end(owner, batch["id"], "failed", errors=errors)
                return
            counts = {"total": total, "completed": 0, "failed": 0}
            batch = await self._update(
                owner, batch["id"], (*ENDED, "cancelling"), status="in_progress", in_progress_at=int(time.time()),
                request_counts=counts,
            )  # fmt: skip
        if batch["status"] in ENDED:
            return
        async with contextlib.AsyncExitStack() as stack:
            path = self.store.results_of(batch["id"])
            results = await self._off_loop(ResultFile, path)
            stack.push_async_callback(self._off_loop, results.__exit__, None, None, None)
            counts = {**batch["request_counts"], **await self._off_loop(_counted, path)}
            self._counts[batch["id"]] = counts
            status = "completed"
            if batch["status"] != "finalizing":
                try:
                    await self._answer_lines(batch, results, counts)
                except Cancelled:
                    status = "cancelled"
                except TimeoutError:
                    status = "expired"
        await self._finish(owner, batch, status, counts)

    async def _answer_lines(self, batch: dict[str, Any], results: ResultFile, counts: dict[str, int]) -> None:
        """Answer what is left of the input.

        Raises:
            Cancelled, TimeoutError: the batch is cancelled, or its time is over.
            NotReady: the server stops.
        """
        if batch["status"] == "cancelling":
            raise Cancelled
        seats_of_one = self._served_model().engine.config.max_num_seqs or 1
        lines: Iterator[Line] = read_lines(self.store.path_of(batch["input_file_id"]))
        running: set[asyncio.Task[None]] = set()
        watching = asyncio.create_task(self._watch(batch))
        try:
            while True:
                seats = max(1, seats_of_one * self._num_engines() // SHARE_OF_SEATS)
                while len(running) < seats and (line := await self._off_loop(next, lines, None)) is not None:
                    if not results.is_done(line):
                        running.add(asyncio.create_task(self._answer_line(batch, line, results, counts)))
                if not running:
                    return
                done, running = await asyncio.wait({*running, watching}, return_when=asyncio.FIRST_COMPLETED)
                running.discard(watching)
                for task in done:
                    task.result()
        finally:
            for task in (*running, watching):
                task.cancel()
            await asyncio.gather(*running, watching, return_exceptions=True)

    async def _watch(self, batch: dict[str, Any]) -> None:
        """Raises Cancelled or TimeoutError once the batch is to end."""
        await asyncio.wait_for(self._ending.wait(), max(batch["expires_at"] - time.time(), 0))
        raise Cancelled

    async def _answer_line(
        self, batch: dict[str, Any], line: Line, results: ResultFile, counts: dict[str, int]
    ) -> None:
        request = parse_line(line)
        request_id = f"{ENDPOINTS[request.url].generation.ID_PREFIX}-{batch['id']}-{line.number}"
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                body = await self._generate(request, f"{request_id}-{attempt}")
                reply = {"status_code": 200, "request_id": request_id, "body": body}
                break
            except BadRequest as error:
                reply = _reply(request_id, error)
                break
            except NotReady:
                raise
            except Exception as error:
                logger.error("batch %s, line %d, attempt %d: %s", batch["id"], line.number, attempt, error)
                reply = _reply(request_id, error)
        results.write(line, request.custom_id, reply, None)
        counts["completed" if reply["status_code"] == 200 else "failed"] += 1

    async def _generate(self, request: BatchLine, request_id: str) -> dict[str, Any]:
        """The answer to one line.

        Raises:
            BadRequest: its body is not valid.
            NotReady, EngineFailure: there is none.
        """
        while (generation := await self._prepared(request, request_id)) is None:
            await asyncio.sleep(RETRY_S)
        samples = [dataclasses.replace(sample, slo=OFFLINE_SLO, priority=PRIORITY) for sample in generation.samples]
        while True:
            with contextlib.closing(self._submit(samples)) as group:
                try:
                    await group.accepted()
                except (QueueFull, PredictedLate):
                    await asyncio.sleep(RETRY_S)
                    continue
                except ValueError as error:
                    raise as_bad_request(error, generation.body) from error
                async for outputs in group:
                    for sample, output in outputs:
                        generation.collect(sample, output)
            if not generation.is_whole:
                raise NotReady("the server is stopping")
            answer: dict[str, Any] = await self._off_loop(generation.response)
            return answer

    async def _prepared(self, request: BatchLine, request_id: str) -> Generation[Any] | None:
        """None while too many grammars are being compiled."""
        try:
            return await self._off_loop(prepare, request, self._served_model(), request_id)
        except QueueFull:
            return None

    async def _finish(self, owner: str, batch: dict[str, Any], status: str, counts: dict[str, int]) -> None:
        """Make the files that the client gets."""
        now = int(time.time())
        if status == "completed":
            await self._update(owner, batch["id"], status="finalizing", finalizing_at=now, request_counts=counts)

        def files() -> dict[str, str | None]:
            made: dict[str, str | None] = {}
            unanswered = list(self._unanswered(batch, status))
            for field, good in (("output_file_id", True), ("error_file_id", False)):
                lines = [*_lines(self.store.results_of(batch["id"]), good), *([] if good else unanswered)]
                file_id = f"file-{hashlib.sha256(f'{batch["id"]} {field}'.encode()).hexdigest()[:24]}"
                name = f"{batch['id']}_{'output' if good else 'error'}.jsonl"
                made[field] = None
                if lines:
                    made[field] = self.store.add_file(owner, name, "batch_output", lines, file_id)["id"]
            return made

        await self._end(owner, batch["id"], status, request_counts=counts, **await self._off_loop(files))
        with contextlib.suppress(OSError):
            self.store.results_of(batch["id"]).unlink()

    def _unanswered(self, batch: dict[str, Any], status: str) -> Iterator[bytes]:
        """Lines of the error file for what was not answered, of a batch whose time is over."""
        if status != "expired":
            return
        done = {json.loads(line)["id"] for line in _lines(self.store.results_of(batch["id"]), None)}
        error = {"code": "batch_expired", "message": "the batch was not done within its time"}
        for line in read_lines(self.store.path_of(batch["input_file_id"])):
            if line.result_id not in done:
                known = {"id": line.result_id, "custom_id": parse_line(line).custom_id, "response": None}
                yield json.dumps({**known, "error": error}).encode() + b"\n"

    async def _update(
        self, owner: str, batch_id: str, unless: Collection[str] = ENDED, **changes: Any
    ) -> dict[str, Any]:
        """`BatchStore.update` off the loop: it waits for the disk."""
        changed: dict[str, Any] = await self._off_loop(lambda: self.store.update(owner, batch_id, unless, **changes))
        return changed

    async def _end(self, owner: str, batch_id: str, status: str, errors: Any = None, **changes: Any) -> dict[str, Any]:
        assert status in ENDED
        if errors:
            changes["errors"] = {"object": "list", "data": errors}
        changes[f"{status}_at"] = int(time.time())
        logger.info("batch %s: %s", batch_id, status)
        return await self._update(owner, batch_id, status=status, **changes)


def raise_if_cancelled() -> None:
    """Raises CancelledError in a task that is being cancelled."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def _reply(request_id: str, error: Exception) -> dict[str, Any]:
    status, body, _ = error_reply(error if isinstance(error, BadRequest | EngineFailure) else EngineFailure(str(error)))
    return {"status_code": status, "request_id": request_id, "body": body}


def _faults(source: Any, endpoint: str) -> tuple[list[dict[str, Any]], int]:
    """What keeps the lines of an input from being a batch, and their number."""
    found: list[dict[str, Any]] = []
    first: dict[str, int] = {}
    total = 0
    for line in read_lines(source):
        total += 1
        try:
            request = parse_line(line)
            if request.url != endpoint:
                raise LineError(f"url is {request.url}, the batch's endpoint {endpoint}", "mismatched_url")
            check_unique(first, line, request.custom_id)
        except LineError as error:
            if len(found) < MOST_ERRORS:
                found.append({"code": error.code, "message": str(error), "param": None, "line": line.number})
    if not total:
        found.append({"code": "empty_file", "message": "the file has no lines", "param": None, "line": None})
    if total > MOST_LINES:
        message = f"the file has {total} lines, at most {MOST_LINES} are taken; split it"
        found.insert(0, {"code": "too_many_lines", "message": message, "param": None, "line": None})
    return found, total


def _lines(results: Any, good: bool | None) -> Iterator[bytes]:
    """Lines of a results file, with those that were answered or those that were not; None: all."""
    if results.exists():
        with results.open("rb") as file:
            for line in file:
                if good is None or (json.loads(line)["response"]["status_code"] == 200) == good:
                    yield line


def _counted(results: Any) -> dict[str, int]:
    """How many lines are answered, and how many of them with an error."""
    good, every = (sum(1 for _ in _lines(results, each)) for each in (True, None))
    return {"completed": good, "failed": every - good}
