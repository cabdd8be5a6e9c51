"""What the engine's thread tells about its work: to metrics, logs, histories and traces, which never steer it."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from apt_jax.output import Output
from serve.samples import Sample

if TYPE_CHECKING:
    from apt_jax.engine import Engine


@dataclass(frozen=True)
class Stepped:
    """One step: what it brought, ids of those requests that their client had given up, and when it began."""

    outputs: Sequence[Output]
    abandoned: Collection[str]
    began_s: float


class Observer:
    """Called in the engine's thread, which waits: be quick, and raise nothing. Methods do nothing by default."""

    def ready(self, engine: "Engine") -> None:
        """The engine is compiled."""

    def stepped(self, engine: "Engine", step: Stepped) -> None:
        """A step is done; `engine.last_plan` is its plan."""

    def failed(self, engine: "Engine", samples: Sequence[Sample]) -> None:
        """A step raised, and these end with an error."""

    def idle(self, engine: "Engine", lost_blocks: int) -> None:
        """Nothing is left to do; `lost_blocks` should be 0."""
