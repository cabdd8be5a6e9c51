"""Finding stop strings in text that arrives piece by piece, holding back what may begin one."""

from collections.abc import Sequence


class StopText:
    """Passes text through until a stop string appears.

    Text that could be the beginning of a stop string is held back until it is clear.
    """

    def __init__(self, stop: Sequence[str], include_stop: bool):
        self._stop = tuple(stop)
        self._include = include_stop
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Add text; returns what may be shown now, and the stop string that ends the output, if any.

        That is the one complete first, and the longest of those; so it does not matter how the text is cut in pieces.
        """
        if not self._stop:
            return text, None
        self._held += text
        found = [(at + len(stop), at, stop) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            end, at, stop = min(found)
            shown, self._held = self._held[: end if self._include else at], ""
            return shown, stop
        keep = self._may_begin_stop()
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return shown, None

    def flush(self) -> str:
        """The text held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _may_begin_stop(self) -> int:
        """Length of the longest end of the held text that is a beginning of a stop string."""
        longest = min(len(self._held), max(map(len, self._stop)) - 1)
        for length in range(longest, 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self._stop):
                return length
        return 0
