"""`AsyncLLM`: generate from Python on an asyncio loop, and serve the HTTP API inside one's own application."""

import asyncio
import itertools
from collections.abc import AsyncGenerator
from typing import Any, Self, Unpack

from starlette.applications import Starlette

from apt_jax.engine.interface import ServingEngine
from apt_jax.request import SamplingParams, Slo
from apt_jax.serve.errors import EngineFailure
from apt_jax.serve.http.app import create_app
from apt_jax.serve.http.service import Service
from apt_jax.serve.options import DEMO_NAME, ServerOptions
from apt_jax.serve.python.options import LLMOptions, engine_options
from apt_jax.serve.python.outputs import RequestOutput
from apt_jax.serve.python.prompts import Prompt, Prompted
from apt_jax.serve.runtime.engine_thread import EngineThread
from apt_jax.serve.runtime.group import Group
from apt_jax.tokenization.tokenizer import Tokenizer

STOP_TIMEOUT_S = 5.0


class AsyncLLM:
    """A model and its engine, in a thread of its own. Use it as `async with AsyncLLM(...) as llm`.

    Args:
        model: as of `LLM`.
        options: as of `LLM`.

    Raises:
        ValueError: an unknown option, or a bad value.
    """

    def __init__(self, model: str | None = None, **options: Unpack[LLMOptions]):
        loading, config = engine_options(options)

        def make() -> ServingEngine:
            from apt_jax.serve.runtime.build import build_engine  # imports jax, which takes seconds

            return build_engine(model, engine_config=config, **loading)

        self._name = model or DEMO_NAME
        self._thread = EngineThread(make, self._ready, self._failed)
        self._started: asyncio.Future[None] | None = None
        self._numbers = itertools.count()
        self._groups: dict[str, Group] = {}

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.shutdown()

    async def start(self) -> None:
        """Load the model, compile, and return when requests are taken. Once, on the loop that is to be used.

        Raises:
            ValueError: the model cannot be loaded.
            EngineFailure: the engine failed for another reason.
        """
        if self._started is None:
            self._started = asyncio.get_running_loop().create_future()
            self._thread.start()
        await asyncio.shield(self._started)

    async def shutdown(self) -> None:
        """End every request, with finish reason abort, and the engine."""
        self._thread.abort_all()
        await asyncio.to_thread(self._thread.stop, STOP_TIMEOUT_S)

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        slo: Slo | None = None,
    ) -> AsyncGenerator[RequestOutput]:
        """The result so far, whenever it has grown; the last one is `finished`. Leaving the loop ends the request.

        `prompt` and `sampling_params` are as of `LLM.generate`; `slo` is the request's, default: the engine's.

        Raises:
            ValueError: it cannot be served.
            QueueFull: the maximum number of requests is waiting.
            NotReady, EngineFailure: the engine is not started, has stopped, or has failed.
        """
        engine = self._thread.ready_engine()
        params = self.get_default_sampling_params() if sampling_params is None else sampling_params
        for given, kind, cure in (
            (params, SamplingParams, "give a SamplingParams, or leave it out"),
            (request_id, str | None, "give a text, or leave it out"),
            (priority, int, "give a whole number"),
            (slo, Slo | None, "give a Slo, or leave it out"),
        ):
            if not isinstance(given, kind):
                raise ValueError(f"{given!r:.80} is no {getattr(kind, '__name__', kind)}; {cure}")
        if request_id == "":
            raise ValueError("request_id is empty; give at least one character, or leave it out")
        name = f"async-{next(self._numbers)}" if request_id is None else request_id
        self._check_free(name)
        prompted = await asyncio.to_thread(
            Prompted.prepare, prompt, params, engine, request_id=name, priority=priority, slo=slo
        )
        self._check_free(name)
        group = self._groups[name] = self._thread.submit(prompted.samples)
        try:
            await group.accepted()
            async for outputs in group:
                for sample, output in outputs:
                    prompted.take(sample, output)
                yield prompted.result
        finally:
            self._groups.pop(name, None)
            group.close()

    def _check_free(self, name: str) -> None:
        if name in self._groups:
            raise ValueError(f"request_id={name!r} is that of a request under way; give each its own")

    async def abort(self, request_id: str) -> None:
        """End a request, whose generator brings what it has with finish reason abort; unknown ids change nothing."""
        if (group := self._groups.get(request_id)) is not None:
            self._thread.end(group)

    def get_tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer; None if it has none.

        Raises:
            NotReady: it is not started.
        """
        return self._thread.ready_engine().tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """The model's own defaults over vLLM's.

        Raises:
            NotReady: it is not started.
        """
        return SamplingParams(**self._thread.ready_engine().sampling_defaults)  # type: ignore[arg-type]

    def app(self, **options: Any) -> Starlette:
        """The HTTP API over this engine, to mount in an application that starts it and shuts it down.

        Args:
            options: fields of `ServerOptions`, such as `api_key=("secret",)`; its address and snapshots are of no use
                here.
        """
        chosen = ServerOptions(**{"snapshot_file": None, "allowed_hosts": ("*",), **options})
        name, *others = chosen.served_names(self._name)
        service = Service.of_engine(self._thread, name, chosen)
        service.other_names = tuple(others)
        return create_app(service)

    def _ready(self, seconds: float) -> None:
        assert self._started is not None
        if not self._started.done():
            self._started.set_result(None)

    def _failed(self, error: Exception) -> None:
        assert self._started is not None
        if not self._started.done():
            known = isinstance(error, ValueError | OSError)
            self._started.set_exception(error if known else EngineFailure(f"the engine failed: {error}"))
