"""A start: its time by phase, from the start of the process to the first accepted request, and its last act."""

import gc
import time


def process_age_s() -> float:
    """Seconds since this process began."""
    import psutil

    return max(time.time() - psutil.Process().create_time(), 0.0)


def spare_collector() -> None:
    """Keep Python's garbage collector from the million objects that were loaded: to look at them takes 0.2 s each time.

    It holds Python's lock meanwhile, and a large request or answer makes it look several times.
    """
    gc.collect()
    gc.freeze()


class StartUp:
    """Seconds of each phase, in order. The first phase, "Python", has lasted since the process began."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {"Python": process_age_s()}
        self._last = time.monotonic()

    @property
    def total_s(self) -> float:
        """Seconds since the process began, up to the end of the last phase."""
        return sum(self.phases.values())

    def ended(self, phase: str, compiling_s: float = 0.0) -> None:
        """A phase has ended now; `compiling_s` of it is reported as a phase of its own, "programs"."""
        now = time.monotonic()
        if compiling_s:
            self.phases["programs"] = compiling_s
        self.phases[phase] = max(now - self._last - compiling_s, 0.0)
        self._last = now

    def text(self) -> str:
        """For the log."""
        return ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self.phases.items())
