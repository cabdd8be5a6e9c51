"""Runs a piece of work again and again, killed at its first change of a file, its second, ..., until it completes.

`LD_PRELOAD=kill.so python -m tests.kill_windows WORK FOLDER`; each run is a fork of this process. After each, the same
work is done to its end, and what it left is checked: nothing lost, nothing doubled.
"""

import ctypes
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from tests.kill_windows.work import WORKS, Work

BEFORE, WITHIN, AFTER = range(3)


def forked(action: Callable[[], None]) -> int:
    """Exit status of `action` in a process of its own."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            action()
            status = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitpid(child, 0)[1]


def windows(work: Work, folder: Path, when: int) -> int:
    """How many changes the work makes; it was killed at each of them."""
    arm = ctypes.CDLL(None).arm
    count = 0
    while True:
        count += 1
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        work.prepare(folder)

        def killed(at: int = count) -> None:
            arm(str(folder).encode(), at, when)
            work.do(folder)

        status = forked(killed)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0, "the work failed by itself"
            return count - 1
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        work.check_killed(folder)
        assert forked(lambda: work.do(folder)) == 0, f"the next start failed after a kill at change {count}"
        work.check(folder)


if __name__ == "__main__":
    name, place = sys.argv[1], Path(sys.argv[2])
    for moment in BEFORE, WITHIN, AFTER:
        print(windows(WORKS[name], place / "work", moment), flush=True)
