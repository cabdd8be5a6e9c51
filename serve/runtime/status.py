"""State of an engine between start and stop."""

import enum


class EngineStatus(enum.Enum):
    """The value is what /health reports."""

    LOADING = "loading"
    WARMING = "warming up"
    READY = "ready"
    FAILED = "failed"
    STOPPED = "stopped"
