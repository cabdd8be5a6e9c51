"""The one error that loading, converting and checking a checkpoint raise."""


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names the file or key at fault and what to do."""


def first_line(error: BaseException) -> str:
    """The first line of another library's message, to quote inside one of ours."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def some(names: list[str]) -> str:
    """The first three of `names`, and how many more there are."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
