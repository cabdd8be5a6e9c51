"""Serve OPT language models in JAX under latency SLOs, with a hybrid cache of KV pairs and hidden vectors.

`LLM`, `AsyncLLM` and `SamplingParams` are imported when they are first used, so that the rest stays light.
"""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apt_jax.sampling.params import SamplingParams
    from apt_jax.serve.llm import LLM
    from apt_jax.serve.python.async_llm import AsyncLLM

__all__ = ["LLM", "AsyncLLM", "SamplingParams"]

_HOMES = {
    "AsyncLLM": "apt_jax.serve.python.async_llm",
    "LLM": "apt_jax.serve.llm",
    "SamplingParams": "apt_jax.sampling.params",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("apt-jax")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
