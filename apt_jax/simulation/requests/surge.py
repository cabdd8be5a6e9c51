"""A stretch of overload within a run: a while at several times the base rate, and what became of whom."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RECOVERY_S = 60.0  # after a surge, before service is expected to be as before it


@dataclass(frozen=True)
class Surge:
    """`factor` times the base rate from `start_s` on, for `seconds`.

    Raises:
        ValueError: a value is out of range.
    """

    start_s: float
    seconds: float
    factor: float

    def __post_init__(self) -> None:
        if not (0 <= self.start_s < math.inf and 0 < self.seconds < math.inf and 1 <= self.factor <= 1000):
            raise ValueError(
                f"surge={self.start_s:g}:{self.seconds:g}:{self.factor:g} must be a start of at least 0 s, a duration "
                "greater than 0 s and a factor from 1 to 1000"
            )

    @classmethod
    def parse(cls, text: str) -> "Surge":
        """From START_S:SECONDS:FACTOR.

        Raises:
            ValueError: the text is something else.
        """
        parts = text.split(":")
        try:
            start_s, seconds, factor = map(float, parts)
        except ValueError as error:
            raise ValueError(f"surge={text!r} must be START_S:SECONDS:FACTOR, e.g. 300:300:3") from error
        return cls(start_s, seconds, factor)

    def mean_factor(self, duration_s: float) -> float:
        """Requests of `duration_s` seconds, against those at the base rate."""
        inside_s = min(max(duration_s - self.start_s, 0.0), self.seconds)
        return 1 + (self.factor - 1) * inside_s / duration_s if duration_s > 0 else 1.0

    def times(self, arrival_s: NDArray[np.float64]) -> NDArray[np.float64]:
        """`[n]` arrivals at the base rate, moved together where it is higher: their order and pattern stay."""
        end_s, packed_s = self.start_s + self.seconds, self.seconds * self.factor
        inside = np.clip(arrival_s - self.start_s, 0.0, packed_s) / self.factor
        after = np.maximum(arrival_s - self.start_s - packed_s, 0.0)
        return np.where(arrival_s <= self.start_s, arrival_s, np.minimum(self.start_s + inside, end_s) + after)

    def by_phase(
        self, arrival_s: Sequence[float], strictly: Sequence[bool], kept: Sequence[bool]
    ) -> list[dict[str, Any]]:
        """Attainment, in both readings, of the requests that arrived in each phase; phases without any are left out."""
        edges = np.array([self.start_s, self.start_s + self.seconds, self.start_s + self.seconds + RECOVERY_S])
        phase_of = np.searchsorted(edges, arrival_s, side="right")
        found = []
        for number, name in enumerate(("before", "surge", "minute after", "later")):
            mine = np.flatnonzero(phase_of == number)
            if len(mine):
                shares = {
                    "strict_attainment": float(np.mean([strictly[i] for i in mine.tolist()])),
                    "attainment": float(np.mean([kept[i] for i in mine.tolist()])),
                }
                found.append({"name": name, "requests": len(mine), **shares})
        return found
