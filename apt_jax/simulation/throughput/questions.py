"""What a search asks of a simulated point: is this share of the requests kept, read so?"""

from dataclasses import dataclass
from typing import Literal

from apt_jax.simulation.simulator import Standing

Reading = Literal["strict", "paper"]
READINGS: tuple[Reading, ...] = ("strict", "paper")


@dataclass(frozen=True)
class Question:
    """Whether attainment in a reading is at least `target`, a share of all requests sent."""

    reading: Reading
    target: float

    def is_kept(self, standing: Standing) -> bool:
        """The answer at the end of a simulation, or once it is decided."""
        return self._missed(standing) <= self._allowed(standing)

    def is_decided(self, standing: Standing) -> bool:
        """Whether nothing that is still to happen changes the answer."""
        return self.is_lost(standing) or self._missed(standing) + standing.unfinished <= self._allowed(standing)

    def is_lost(self, standing: Standing) -> bool:
        """Whether more requests have missed than may."""
        return self._missed(standing) > self._allowed(standing)

    def _missed(self, standing: Standing) -> int:
        return standing.missed_strictly if self.reading == "strict" else standing.missed

    def _allowed(self, standing: Standing) -> int:
        return int((1 - self.target) * standing.total + 1e-9)


def are_decided(questions: tuple[Question, ...], standing: Standing) -> bool:
    """Whether a simulation may end: all are lost, or decided with every request arrived, so that backlog is known."""
    if all(question.is_lost(standing) for question in questions):
        return True
    return not standing.to_come and all(question.is_decided(standing) for question in questions)
