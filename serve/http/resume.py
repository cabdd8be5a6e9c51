"""Finish the requests that an earlier run of the server left unfinished: `--resume-from FILE`."""

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

from apt_jax.output import QueueFull
from apt_jax.serve.errors import error_reply
from apt_jax.serve.http.service import Service
from apt_jax.serve.http.snapshot import read_snapshot, restore
from apt_jax.serve.openai.generation import Generation
from apt_jax.serve.runtime.status import EngineStatus

RETRY_S = 0.2  # until the queue has room again

logger = logging.getLogger("apt_jax.serve")


class Resumption:
    """Runs the requests of a snapshot file beside new ones; results go to FILE.results.jsonl as they come.

    The snapshot stays until all are done, and results say which are, so that it may be interrupted at any time.

    Raises:
        ValueError: the file is no snapshot.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path):
        self._path = path
        self.results_path = path.with_name(f"{path.name}.results.jsonl")
        done = self._done()
        self._records = [record for record in read_snapshot(path) if record["id"] not in done]
        self._left = len(self._records)

    async def run(self, service: Service) -> None:
        """Wait for the engine, then finish every request."""
        while service.backend.status in (EngineStatus.LOADING, EngineStatus.WARMING) and not service.is_stopping:
            await asyncio.sleep(0.05)
        if not self._records or service.backend.status is not EngineStatus.READY:
            return
        logger.info("resuming %d requests of %s", len(self._records), self._path)
        await asyncio.gather(*(self._finish(service, record) for record in self._records))
        if self._left == 0:
            self._path.unlink(missing_ok=True)
            logger.info("every request of %s is done; results in %s", self._path, self.results_path)

    async def _finish(self, service: Service, record: dict[str, Any]) -> None:
        try:
            generation, samples = restore(record, service.served_model())
            if samples:
                await self._generate(service, generation, samples)
            if service.is_stopping and not generation.is_whole:
                return  # it goes into the next snapshot
            self._write(generation.request_id, 200, generation.response())
        except Exception as error:
            if service.is_stopping:
                service.unfinished_records.append(record)
                return
            logger.error("request %s cannot be resumed: %s", record["id"], error)
            status, body, _ = error_reply(error)
            self._write(record["id"], status, body)

    async def _generate(self, service: Service, generation: Generation[Any], samples: list[Any]) -> None:
        while True:
            service.check_accepts()
            group = service.backend.submit(samples)
            try:
                await group.accepted()
                break
            except QueueFull:
                await asyncio.sleep(RETRY_S)
        with service.generating(generation, group):
            async for outputs in group:
                for sample, output in outputs:
                    generation.collect(sample, output)

    def _write(self, request_id: str, status: int, body: dict[str, Any]) -> None:
        response = {"status_code": status, "request_id": request_id, "body": body}
        line = {"id": f"resumed-{request_id}", "custom_id": request_id, "response": response, "error": None}
        with self.results_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._left -= 1

    def _done(self) -> set[str]:
        if not self.results_path.exists():
            return set()
        done = set()
        for line in self.results_path.read_text(encoding="utf-8").splitlines():
            try:
                done.add(json.loads(line)["custom_id"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.results_path} holds a line that is no result; move it away") from error
        return done
