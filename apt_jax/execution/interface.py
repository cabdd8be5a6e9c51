"""The interface between engine and devices: `StepRunner`, implemented by one process, or by several together."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from apt_jax.batching.arrays import Batch
from apt_jax.cache import Projection
from apt_jax.execution.sampling import Sampled, Scored


class StepResults(NamedTuple):
    """Results of one iteration, on the device until `StepRunner.read`."""

    sampled: Sampled | None  # None if no row samples
    scores: tuple[Scored, ...]  # of the batch's chunks
    outside: Any = None  # uint32: see `Pool.outside`
    pooled: Any = None  # float32 [max_rows, E]: hidden states after each row's last token, if any is wanted
    running: "RunningIterations | None" = None  # the call that computes all this, while it may run further iterations
    number: int = 0  # of this iteration in that call

    @property
    def spare_s(self) -> float:
        """Seconds until the next iteration has to be started, or the call that runs this one ends."""
        return 0.0 if self.running is None else self.running.spare_s(self.number)

    @property
    def is_read(self) -> bool:
        """Whether there is anything to read."""
        return self.sampled is not None or bool(self.scores) or self.running is not None


class RunningIterations(Protocol):
    """A call that runs an iteration, and the next ones if they come before it has ended."""

    def read(self, number: int) -> tuple[Sampled, Any]:
        """Wait for an iteration, counted from 0: what it sampled, and `StepResults.outside`, as numpy arrays."""

    def spare_s(self, number: int) -> float:
        """Seconds until what follows an iteration has to be given, by how long others took; 0 if that is not known."""


class StepRunner(Protocol):
    """Runs iterations, one after the other, on a cache pool that it owns."""

    @property
    def num_programs(self) -> int:
        """Number of compiled programs."""

    @property
    def num_outside(self) -> int:
        """Numbers of hidden vectors that were outside their channel's range, in an int8 cache, as last read."""

    def compile_all(self, progress: bool = False) -> None:
        """Compile every shape; afterwards nothing compiles."""

    def dispatch(self, batch: Batch) -> StepResults:
        """Start one iteration; returns at once with arrays still being computed.

        If `StepResults.running` is set, another one that comes before this has ended costs less.
        """

    def read(self, results: StepResults) -> StepResults:
        """Wait for an iteration and bring its results to the host as numpy arrays."""

    def project(self, projections: Sequence[Projection]) -> None:
        """Compute keys and values of cached hidden vectors, in this order."""

    def save(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks to slots of host memory, pairs (block, slot), after all that was started before."""

    def restore(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy slots of host memory to blocks, pairs (slot, block), before all that is started later."""

    def fetch(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Begin to copy slots of host memory for blocks, pairs (slot, block), beside the iteration started next."""

    def land(self) -> None:
        """Have what was fetched in its blocks, after all that was started before and before all that is started later.

        If `fetch` raised, there is nothing.
        """

    def reset(self) -> None:
        """Fresh pool and history, after a step failed; waits for the device, so that a lost one raises here."""
