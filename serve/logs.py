"""Logs for people or for programs, on standard error. Content of requests is in them only with --log-requests."""

import json
import logging
import re
import sys
from datetime import datetime
from typing import Any, Literal

from apt_jax.progress import turn_off

WORD = re.compile(r"[!#-<>-~]+")  # printable ASCII without space, quote and =
BREAKS = re.compile("[\\x00-\\x09\\x0b-\\x1f\\x7f-\\x9f\\u2028\\u2029]")  # some readers end a line at one of these
CONTINUED = "\n    "  # a line that does not begin with a time is no record of its own

LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]


def time_of(record: logging.LogRecord) -> str:
    """Local time with its offset from UTC, as ISO 8601 has it."""
    return datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds")


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, message, and the record's `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        """Render a record."""
        shown: dict[str, Any] = {
            "time": time_of(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            shown["traceback"] = self.formatException(record.exc_info)
        return BREAKS.sub(_escaped, json.dumps(shown, ensure_ascii=False, default=str))


class TextFormatter(logging.Formatter):
    """Time, level, logger, message, then the record's `fields` as name=value."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        """With the time zone."""
        return time_of(record)

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Render what comes before a traceback."""
        fields = "".join(f" {name}={_plain(value)}" for name, value in getattr(record, "fields", {}).items())
        return BREAKS.sub(_escaped, super().formatMessage(record).replace("\n", CONTINUED)) + fields

    def formatException(self, ei: Any) -> str:
        """The traceback, whose last line may hold a client's text."""
        return BREAKS.sub(_escaped, "    " + super().formatException(ei).replace("\n", CONTINUED))


def set_up_logs(log_format: LogFormat = "text", level: LogLevel = "info") -> None:
    """Send all logs of `level` and above to standard error; of other libraries warnings and errors."""
    if log_format == "json":
        turn_off()
        logging.captureWarnings(True)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    own = logging.getLevelNamesMapping()[level.upper()]
    logging.basicConfig(level=max(logging.WARNING, own), handlers=[handler])  # of other libraries
    logging.getLogger("apt_jax").setLevel(own)


def tell(error: object, level: str = "error") -> None:
    """Write to standard error what the user can cure: a sentence, or a record where the logs are JSON.

    A "warning" is of what goes on all the same.
    """
    if isinstance(error, OSError) and error.strerror:  # without its number
        error = error.strerror if error.filename is None else f"{error.strerror}: {error.filename!r}"
    formats = {type(handler.formatter) for handler in logging.getLogger().handlers}
    if JsonFormatter in formats:
        logging.getLogger("apt_jax.serve").log(logging.getLevelNamesMapping()[level.upper()], "%s", error)
    else:
        print(f"{level}: {error}", file=sys.stderr)


def _plain(value: object) -> str:
    """A text that is not one word in quotes: a client's must look neither like another field nor another line."""
    return json.dumps(value) if isinstance(value, str) and not WORD.fullmatch(value) else str(value)


def _escaped(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"
