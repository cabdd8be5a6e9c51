"""Serve OPT language models in JAX under latency SLOs, with a hybrid cache of KV pairs and hidden vectors.

`LLM` and `SamplingParams` are imported when they are first used, so that the rest of the package stays light.
"""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apt_jax.request import SamplingParams
    from apt_jax.serve.llm import LLM

__all__ = ["LLM", "SamplingParams"]

_HOMES = {"LLM": "apt_jax.serve.llm", "SamplingParams": "apt_jax.request"}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("apt-jax")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
