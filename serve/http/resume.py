"""Finish the requests that an earlier run of the server left unfinished: `--resume-from FILE`."""

import asyncio
import contextlib
import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

from apt_jax.output import QueueFull
from apt_jax.request import OFFLINE_SLO
from apt_jax.serve.errors import PredictedLate, error_reply
from apt_jax.serve.http.service import Service
from apt_jax.serve.http.snapshot import is_of, restore
from apt_jax.serve.http.snapshot_cache import SnapshotCache
from apt_jax.serve.http.snapshot_file import read_snapshot, set_damaged_aside, write_snapshot
from apt_jax.serve.line_file import FileInUse, LineFile, line_of
from apt_jax.serve.openai.generation import Generation
from apt_jax.serve.runtime.engine_thread import EngineThread
from apt_jax.serve.runtime.status import EngineStatus

RETRY_S = 0.2  # until the queue has room again, or another server lets go of the file

logger = logging.getLogger("apt_jax.serve")


class Resumption:
    """Runs the requests of a snapshot file beside new ones; results go to FILE.results.jsonl as they come.

    The snapshot stays until all are done, and results say which are, so that it may be interrupted at any time. One
    server resumes a file; another one that is told to waits until that has ended.

    Raises:
        ValueError: one of the two files holds something else.
        OSError: a file cannot be read or written.
    """

    def __init__(self, path: Path):
        self._path = path.expanduser().absolute()
        self._caches = SnapshotCache(self._path)
        self._num_restored = 0  # tokens whose pages were kept beside it
        with contextlib.suppress(OSError):  # then it is refused
            set_damaged_aside(self._path)
        self.results_path = self._path.with_name(f"{path.name}.results.jsonl")
        self._done: set[str] = set()
        self._records: list[dict[str, Any]] = []
        self.progress: list[dict[str, Any]] = []  # records of what the server's end has interrupted
        self._results: LineFile | None = None
        self._is_claimed = self._claim()

    @property
    def path(self) -> Path:
        """The snapshot, absolute."""
        return self._path

    async def run(self, service: Service) -> None:
        """Wait for the engine, then finish every request."""
        while service.backend.status in (EngineStatus.LOADING, EngineStatus.WARMING) and not service.is_stopping:
            await asyncio.sleep(0.05)
        if not self._is_claimed:
            logger.info("another server resumes %s; this one waits until it has ended", self._path)
        while not self._is_claimed and not service.is_stopping:
            await asyncio.sleep(RETRY_S)
            try:
                self._is_claimed = self._claim()
            except (ValueError, OSError) as error:
                logger.error("%s cannot be resumed: %s", self._path, error)
                return
        if self._results is None:
            return
        try:
            if service.backend.status is EngineStatus.READY:
                await self._finish_all(service)
        finally:
            self._settle()

    def _claim(self) -> bool:
        """Read what is left to do, and keep other servers from doing it; False while another one does."""
        if not read_snapshot(self._path, report=False):
            return True
        try:
            results = LineFile(
                *(self.results_path, b'{"id": "resumed-', self._take),
                what="result of a resumed request",
                cure="move it away",
            )
        except FileInUse:
            return False
        # the snapshot as it is now that nobody else can take it
        self._records = [record for record in read_snapshot(self._path) if record["id"] not in self._done]
        self._results = results
        return True

    async def _finish_all(self, service: Service) -> None:
        model = service.served_model()
        mine = [record for record in self._records if is_of(record, model)]
        if others := [record for record in self._records if not is_of(record, model)]:
            names = ", ".join(sorted({f"{record['model']} ({record['fingerprint']})" for record in others}))
            logger.error(
                "%d requests of %s are of another model than the one that is served, %s (%s): %s; they stay in the "
                "file, start a server of that model to finish them",
                *(len(others), self._path, model.name, model.engine.fingerprint, names),
            )
        if mine:
            logger.info("resuming %d requests of %s", len(mine), self._path)
            await asyncio.gather(*(self._finish(service, record) for record in mine))
            if self._num_restored:
                logger.info("%d tokens of them came from %s", self._num_restored, self._caches.folder)

    def _settle(self) -> None:
        """Take out of the snapshot what has a result, and let go of it."""
        assert self._results is not None
        try:
            self._results.sync()
            left = write_snapshot(self._path, self.progress, done=self._done)
        except (ValueError, OSError) as error:  # results say what is done
            logger.error("%s cannot be brought up to date (%s); it stays as it was", self._path, error)
        else:
            state = f"{left} lines of it are left" if left else "every request is done"
            logger.info("%s: %s; results are in %s", self._path, state, self.results_path)
        finally:
            self._results.close()
            self._results = None

    async def _finish(self, service: Service, record: dict[str, Any]) -> None:
        try:
            generation, samples = restore(record, service.served_model())
            if samples:
                await self._generate(service, generation, samples)
            if service.is_stopping and not generation.is_whole:
                return  # it stays in the snapshot
            self._write(generation.request_id, 200, generation.response())
            if record["id"] in self._done:
                self._caches.drop(entry["request_id"] for entry in record["samples"])
        except Exception as error:
            if service.is_stopping:
                return
            logger.error("request %s cannot be resumed: %s", record["id"], error)
            status, body, _ = error_reply(error)
            self._write(record["id"], status, body)

    async def _generate(self, service: Service, generation: Generation[Any], samples: list[Any]) -> None:
        if isinstance(service.backend, EngineThread):
            restoring = service.backend.call(lambda engine: self._caches.restore(engine, samples))
            try:
                found = await asyncio.wrap_future(restoring)
                self._num_restored += found  # others add to it while this one waits
            except Exception:
                logger.exception("the cached pages of %s cannot be used", generation.request_id)
        while True:
            service.check_accepts()
            if service.served_model().engine.config.abandon_after is not None:  # nobody waits for these
                samples = [dataclasses.replace(sample, slo=OFFLINE_SLO) for sample in samples]
            group = service.backend.submit(samples)
            try:
                await group.accepted()
                break
            except (QueueFull, PredictedLate):
                await asyncio.sleep(RETRY_S)
        with service.generating(generation, group, self.progress.append):
            async for outputs in group:
                for sample, output in outputs:
                    generation.collect(sample, output)

    def _write(self, request_id: str, status: int, body: dict[str, Any]) -> None:
        response = {"status_code": status, "request_id": request_id, "body": body}
        assert self._results is not None
        try:
            self._results.append(
                line_of({"id": f"resumed-{request_id}", "custom_id": request_id, "response": response, "error": None})
            )
        except OSError as error:
            logger.error("the result of %s cannot be written (%s); it stays in %s", request_id, error, self._path)
        else:
            self._done.add(request_id)

    def _take(self, line: bytes) -> bool:
        """Note which request a result is of."""
        try:
            request_id = json.loads(line)["custom_id"]
        except (ValueError, TypeError, KeyError, RecursionError):
            return False
        if isinstance(request_id, str):
            self._done.add(request_id)
        return isinstance(request_id, str)
