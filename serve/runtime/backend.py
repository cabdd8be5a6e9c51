"""What HTTP needs of what generates: one engine in a thread of this process, or several behind a router."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from apt_jax.engine_config import EngineConfig
from apt_jax.serve.runtime.group import Group
from apt_jax.serve.runtime.observer import Observer
from apt_jax.serve.runtime.samples import Sample
from apt_jax.serve.runtime.status import EngineStatus

if TYPE_CHECKING:
    from apt_jax.tokenization.tokenizer import Tokenizer


class EngineFacts(Protocol):
    """What requests are checked against. `Engine` has it, and so has what a replica tells about its engine."""

    @property
    def config(self) -> EngineConfig:
        """With every default filled in."""

    @property
    def tokenizer(self) -> "Tokenizer | None":
        """None takes token ids only."""

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer together."""


class Backend(Protocol):
    """Takes samples and brings their outputs. All but `stop` belong to the asyncio loop on which it was started."""

    @property
    def observers(self) -> list[Observer]:
        """Told about its work; add to it."""

    @property
    def status(self) -> EngineStatus:
        """How far it is."""

    @property
    def engine(self) -> EngineFacts | None:
        """None until it has been ready once."""

    @property
    def num_waiting_running(self) -> tuple[int, int]:
        """Requests that wait and that hold cache."""

    def refuse_late(self) -> None:
        """From now on refuse what would miss its SLO. Before `start`."""

    def start(self) -> None:
        """Begin."""

    def submit(self, samples: Sequence[Sample]) -> Group:
        """Take samples, all or none; await `Group.accepted` of what it returns.

        Raises:
            NotReady: it takes none now.
        """

    def ready_engine(self) -> EngineFacts:
        """The facts.

        Raises:
            NotReady: it takes no requests now.
        """

    def abort_all(self) -> None:
        """End every request, with finish reason abort."""

    def stop(self, timeout_s: float) -> bool:
        """End every request and the engine; False if it is still busy after `timeout_s`. From any thread."""
