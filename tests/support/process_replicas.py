"""A replica in a process of its own, without Ray: a real engine behind the actor, and pickled messages over a pipe."""

import asyncio
import itertools
import multiprocessing
import threading
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection
from typing import Any

from apt_jax.serve.replicas.actor import EngineActor
from apt_jax.serve.replicas.messages import Answer, Command, EngineSpec, Facts, Report


def serve_pipe(pipe: Connection, name: str, spec: EngineSpec) -> None:
    """The process: does what it is told until the pipe ends."""
    asyncio.run(_serve(pipe, EngineActor(name, spec)))


async def _serve(pipe: Connection, actor: EngineActor) -> None:
    loop, lock = asyncio.get_running_loop(), threading.Lock()

    def reply(number: int, value: Any) -> None:
        with lock:
            pipe.send((number, value))

    async def do(number: int, method: str, arguments: tuple[Any, ...]) -> None:
        try:
            if method == "reports":
                async for report in actor.reports():
                    reply(number, report)
            else:
                reply(number, await getattr(actor, method)(*arguments))
        except Exception as error:
            reply(number, error)

    tasks: set[asyncio.Task[None]] = set()
    while True:
        try:
            message = await loop.run_in_executor(None, pipe.recv)
        except EOFError:
            return
        tasks.add(asyncio.create_task(do(*message)))


class ProcessHandle:
    """See `Handle`."""

    def __init__(self, name: str, spec: EngineSpec):
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=serve_pipe, args=(other, name, spec), daemon=True)
        self._process.start()
        other.close()
        self._loop = asyncio.get_running_loop()
        self._answers: dict[int, asyncio.Queue[Any]] = {}
        self._numbers = itertools.count()
        threading.Thread(target=self._read, daemon=True).start()

    async def start(self) -> Facts:
        return await self._asked("start")

    async def reports(self) -> AsyncIterator[Report]:
        answers = self._send("reports")
        while True:
            yield _value(await answers.get())

    def command(self, number: int, commands: list[Command]) -> None:
        if self._process.is_alive():
            self._send("command", number, commands)

    async def ask(self, question: str, argument: Any = "") -> Answer:
        return await self._asked("ask", question, argument)

    def kill(self) -> None:
        self._process.kill()

    def join(self) -> None:
        self._process.kill()
        self._process.join()

    async def _asked(self, method: str, *arguments: Any) -> Any:
        return _value(await self._send(method, *arguments).get())

    def _send(self, method: str, *arguments: Any) -> asyncio.Queue[Any]:
        number = next(self._numbers)
        answers = self._answers[number] = asyncio.Queue()
        try:
            self._pipe.send((number, method, arguments))
        except OSError:
            answers.put_nowait(ConnectionError("the process is gone"))
        return answers

    def _read(self) -> None:
        while True:
            try:
                number, value = self._pipe.recv()
            except (EOFError, OSError):
                break
            self._tell(number, value)
        for number in list(self._answers):
            self._tell(number, ConnectionError("the process is gone"))

    def _tell(self, number: int, value: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._answers[number].put_nowait, value)


def _value(value: Any) -> Any:
    if isinstance(value, Exception):
        raise value
    return value
