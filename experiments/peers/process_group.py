"""A process, and all that it starts, which is stopped (SIGSTOP) except while it is measured.

Threads that poll while they wait would take time from the engine that is measured.
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator


def end_what_was_started() -> None:
    """From now on SIGTERM raises KeyboardInterrupt, as Ctrl-C does: what is stopped does not end by itself."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


class ProcessGroup:
    """The group of a process that was started with `start_new_session`; it runs until it is first put to sleep."""

    def __init__(self, process: "subprocess.Popen[bytes]"):
        self._id = process.pid

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """The process runs only inside this context."""
        self.signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.sleep()

    def sleep(self) -> None:
        """Stop it until it is awake."""
        self.signal(signal.SIGSTOP)

    def signal(self, number: int) -> None:
        """Send a signal to all of it; nothing if it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._id, number)
