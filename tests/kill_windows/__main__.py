"""Runs a piece of work again and again, killed at its first change of a file, its second, ..., until it completes.

`LD_PRELOAD=kill.so python -m tests.kill_windows WORK FOLDER STEP`; each run is a fork of this process. Then the same
work is done to its end, and what it left is checked: nothing lost, nothing doubled.
"""

import ctypes
import os
import shutil
import signal
import sys
from pathlib import Path

from tests.kill_windows.forks import forked
from tests.kill_windows.work import WORKS, Work

BEFORE, WITHIN, AFTER = range(3)


def windows(work: Work, folder: Path, when: int, step: int = 1) -> int:
    """How many changes the work makes, rounded down to the last at which it was killed: each, or every `step`-th."""
    arm = ctypes.CDLL(None).arm
    count = 1 - step + when * step // 3  # other changes for each way
    while True:
        count += step
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        work.prepare(folder)

        def killed(at: int = count) -> None:
            arm(str(folder).encode(), at, when)
            work.do(folder)

        status = forked(killed)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0, "the work failed by itself"
            return count - step
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        work.check_killed(folder)
        assert forked(lambda: work.do(folder)) == 0, f"the next start failed after a kill at change {count}"
        work.check(folder)


if __name__ == "__main__":
    name, place, step = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    for moment in BEFORE, WITHIN, AFTER:
        print(windows(WORKS[name], place / "work", moment, step), flush=True)
