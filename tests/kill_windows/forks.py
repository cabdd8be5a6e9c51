"""A function in a process of its own."""

import os
import sys
from collections.abc import Callable


def forked(action: Callable[[], None]) -> int:
    """Exit status of `action` in a fork of this process."""
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
