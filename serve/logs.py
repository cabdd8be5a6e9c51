"""Logs for people or for programs, on standard error. Content of requests is in them only with --log-requests."""

import json
import logging
import sys
from typing import Any, Literal

LogFormat = Literal["text", "json"]


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, message, and the record's `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        """Render a record."""
        shown: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            shown["traceback"] = self.formatException(record.exc_info)
        return json.dumps(shown, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """Time, level, logger, message, then the record's `fields` as name=value."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Render what comes before a traceback."""
        fields = "".join(f" {name}={_plain(value)}" for name, value in getattr(record, "fields", {}).items())
        return super().formatMessage(record) + fields


def set_up_logs(log_format: LogFormat = "text") -> None:
    """Send all logs to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for name in ("httpx", "jax"):  # the hub client's requests, the platforms that are not there
        logging.getLogger(name).setLevel(logging.WARNING)


def _plain(value: object) -> str:
    """On one line whatever a client put into it."""
    return json.dumps(value, default=str) if isinstance(value, str) and not value.isprintable() else str(value)
