"""Notifications of the engine's thread to metrics, logs, histories and traces, which never influence it.

`brought` is about requests as their clients see them and is called on the event loop, when tokens are ready to be sent;
the others are called where an engine is, in its thread. `lost` is called in either.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from apt_jax.engine.interface import EngineFigures
from apt_jax.output import Output
from apt_jax.request import FinishReason
from apt_jax.serve.runtime.samples import Sample


@dataclass(frozen=True)
class Stepped:
    """One step: its outputs, ids of requests that were cancelled before a limit was broken, and when it began."""

    outputs: Sequence[Output]
    cancelled: Collection[str]
    began_s: float

    def counts(self, output: Output) -> bool:
        """Whether a request ends with this output and so attained or missed its SLO.

        One that its client cancelled says nothing, unless it left after a limit was broken.
        """
        if output.finish_reason is FinishReason.ABORT:
            return output.request.request_id not in self.cancelled
        return output.finish_reason is not None


class Observer:
    """Its caller waits: methods must be quick and raise nothing. Methods do nothing by default."""

    def ready(self, figures: EngineFigures) -> None:
        """The engine is compiled."""

    def brought(self, step: Stepped) -> None:
        """The outputs of a step, wherever it ran, as they are handed out."""

    def lost(self, samples: Sequence[Sample]) -> None:
        """These end with an error, without an output."""

    def stepped(self, figures: EngineFigures, step: Stepped) -> None:
        """The engine's view of a step, after `brought`; `figures.plan` is its plan."""

    def failed(self, figures: EngineFigures) -> None:
        """A step raised; its requests were `lost` before, unless it is tried again."""

    def idle(self, figures: EngineFigures, lost_blocks: int) -> None:
        """Nothing is left to do; `lost_blocks` should be 0."""
