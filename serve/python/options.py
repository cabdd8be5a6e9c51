"""The keywords of `LLM` and `AsyncLLM`, for editors and type checkers: the fields of `LoadOptions` and `EngineConfig`.

`tests/unit/test_python_options.py` compares them with those.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, Literal, TypedDict

from apt_jax.cache import CacheMode
from apt_jax.engine_config import AttentionBackend, EngineConfig
from apt_jax.serve.options import LoadOptions


class LLMOptions(TypedDict, total=False):
    """How a model is loaded and served; what each means is in `LoadOptions` and `EngineConfig`."""

    tokenizer: str | None
    revision: str | None
    load_format: Literal["auto", "safetensors", "pt", "flax", "orbax", "dummy"]
    generation_config: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    max_model_len: int | None
    max_num_seqs: int | None
    max_num_batched_tokens: int | None
    block_size: int
    num_blocks: int | None
    cache_memory_bytes: int | None
    device_memory_utilization: float
    cache_mode: CacheMode
    enable_prefix_caching: bool
    host_cache_bytes: int
    host_cache_dtype: str
    cache_dtype: str
    quantization: str | None
    scheduling_policy: str
    ttft_slo_ms: float
    tbt_slo_ms: float
    stall_slo_ms: float | None
    abandon_after: float | None
    max_num_queued_reqs: int
    tensor_parallel_size: int
    calibrate: bool
    attention_backend: AttentionBackend
    async_scheduling: bool | None
    compilation_cache_dir: str | None
    seed: int


def engine_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], EngineConfig]:
    """Keywords of loading, and the engine's configuration.

    Raises:
        ValueError: an unknown keyword (the nearest known one is named), or a bad value.
    """
    _check_known(options)
    names = [field.name for field in dataclasses.fields(LoadOptions)]
    loading = {name: options[name] for name in names if name in options}
    return loading, EngineConfig(**{name: value for name, value in options.items() if name not in names})


def _check_known(options: Mapping[str, Any]) -> None:
    """Raise ValueError for a keyword that is neither an engine's nor a model's option."""
    known = [f.name for kind in (EngineConfig, LoadOptions) for f in dataclasses.fields(kind)]
    for name, value in options.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
            raise ValueError(f"unknown option {name}={value!r}{hint}")
