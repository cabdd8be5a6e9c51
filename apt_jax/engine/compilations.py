"""Counts XLA compilations per thread, so that one that should not happen while serving is noticed."""

import threading
from collections import Counter

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"
_counts: Counter[int] = Counter()  # by thread
_listening = threading.Lock()


def _listen(event: str, duration_secs: float, **_: str | int) -> None:
    if event == _EVENT:
        _counts[threading.get_ident()] += 1


class Compilations:
    """Compilations of the calling thread since `reset`."""

    def __init__(self) -> None:
        if _listening.acquire(blocking=False):  # once in a process, for good
            jax.monitoring.register_event_duration_secs_listener(_listen)
        self.reset()

    @property
    def count(self) -> int:
        """How many there were."""
        return _counts[threading.get_ident()] - self._before

    def reset(self) -> None:
        """Count from now on, in the calling thread."""
        self._before = _counts[threading.get_ident()]
