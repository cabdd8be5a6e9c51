"""Where progress bars are shown: on terminals and in notebooks, never in files, pipes and JSON logs."""

import sys

_is_off = False


def turn_off() -> None:
    """Show no bars in this process, as for logs that a program reads."""
    global _is_off
    _is_off = True


def is_hidden(wanted: bool = True) -> bool:
    """tqdm's `disable`: whether a bar would be in the way."""
    return not wanted or _is_off or not (sys.stderr.isatty() or "ipykernel" in sys.modules)
