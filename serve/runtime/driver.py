"""Runs samples through an engine in the calling thread; for offline use, where nothing else steps the engine."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from apt_jax.engine.interface import ServingEngine
from apt_jax.output import Output, QueueFull
from apt_jax.request import OFFLINE_SLO
from apt_jax.serve.runtime.samples import Sample


class Driver:
    """Steps `engine` and keeps its queue filled; `on_step` is called after every step.

    A sample without an SLO gets `OFFLINE_SLO`: the engine's own is for clients that wait for tokens, and keeping
    it costs throughput.
    """

    def __init__(self, engine: ServingEngine, on_step: Callable[[], None] | None = None):
        self.engine = engine
        self._on_step = on_step
        self._active: dict[str, Sample] = {}
        self._held: Sample | None = None  # it is added before the next one
        self._waiting_target = min(engine.max_num_seqs, engine.config.max_num_queued_reqs)

    @property
    def is_busy(self) -> bool:
        """Whether a sample is unfinished."""
        return bool(self._active)

    def run(self, samples: Iterable[Sample | None]) -> Iterator[tuple[Sample, Output | ValueError]]:
        """Yield every output of every sample as it comes, or the ValueError with which the engine refused the sample.

        `samples` is read lazily: about as many wait in the engine as it runs at once, so that its scheduler always has
        a choice and memory stays bounded. None among them means that the next one is to be asked for after a step; it
        may only come while a sample is unfinished. Leaving the loop early aborts what is unfinished.

        Raises:
            QueueFull: an idle engine takes no sample.
        """
        source = iter(samples)
        try:
            while True:
                sample, error = self._fill(source)
                if sample is not None and error is not None:
                    yield sample, error
                    continue
                if not self._active:
                    return
                if (idle_s := self.engine.idle_s) > 0:
                    time.sleep(idle_s)
                outputs = self.engine.step()
                if self._on_step is not None:
                    self._on_step()
                for output in outputs:
                    known = self._active.get(output.request.request_id)
                    if known is None:  # aborted meanwhile
                        continue
                    if output.finish_reason is not None:
                        del self._active[known.request_id]
                    yield known, output
        finally:
            self._held = None
            for request_id in list(self._active):
                self.abort(request_id)

    def abort(self, request_id: str) -> None:
        """Cancel a sample; nothing more is yielded for it."""
        if self._active.pop(request_id, None) is not None:
            self.engine.abort(request_id)

    def _fill(self, source: Iterator[Sample | None]) -> tuple[Sample | None, ValueError | None]:
        """Add samples until enough wait or none is left; stops at the first that is refused and returns it."""
        while self.engine.num_waiting < self._waiting_target:
            sample, self._held = self._held or next(source, None), None
            if sample is None:
                break
            try:
                replace(sample, slo=sample.slo or OFFLINE_SLO).add_to(self.engine)
            except ValueError as error:
                return sample, error
            except QueueFull:  # of grammars: others must end first
                if not self._active:
                    raise
                self._held = sample
                break
            self._active[sample.request_id] = sample
        return None, None
