"""Checks of the numbers in a dataclass of options: a value that is not a number must not pass as one."""

import dataclasses
import math
from collections.abc import Collection, Iterable
from typing import Any

MIN_CV, MAX_CV = 0.01, 100.0  # beyond, arrival gaps are regular, or all but one of them are 0
MAX_BLOCK_SIZE = 128


def check_cv(cv: float, what: str | None = None) -> None:
    """Raise ValueError if `cv` is no coefficient of variation of arrival gaps; 0 is. `what` is the flag as given."""
    if cv != 0 and not MIN_CV <= cv <= MAX_CV:
        given = f"cv={cv}" if what is None else f"{what} (cv={cv:.3g})"
        raise ValueError(f"{given} must be a coefficient of variation between {MIN_CV} and {MAX_CV:g}")


def check_finite(options: Any, may_be_infinite: Collection[str] = ()) -> None:
    """Raise ValueError if a field of the dataclass `options` is NaN, or infinite where that means nothing."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if not isinstance(value, float) or math.isfinite(value):
            continue
        if math.isnan(value) or field.name not in may_be_infinite:
            raise ValueError(f"{field.name}={value} must be a finite number")


def check_at_least(options: Any, low: float, names: Iterable[str]) -> None:
    """Raise ValueError if a field is less than `low`; None passes."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not value >= low:
            raise ValueError(f"{name}={value} must be at least {low:g}")


def check_at_most(options: Any, high: float, names: Iterable[str]) -> None:
    """Raise ValueError if a field is more than `high`; None passes."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not value <= high:
            raise ValueError(f"{name}={value} must be at most {high:g}")


def check_block_size(block_size: int) -> None:
    """Raise ValueError if a cache block cannot have so many tokens."""
    if not 0 < block_size <= MAX_BLOCK_SIZE or block_size & (block_size - 1):
        raise ValueError(f"block_size={block_size} must be a power of two, at most {MAX_BLOCK_SIZE}")


def check_greater(options: Any, low: float, names: Iterable[str]) -> None:
    """Raise ValueError if a field is not greater than `low`; None passes."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not value > low:
            raise ValueError(f"{name}={value} must be greater than {low:g}")


def check_share(options: Any, names: Iterable[str]) -> None:
    """Raise ValueError if a field is not greater than 0 and at most 1; None passes."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"{name}={value} must be greater than 0 and at most 1")


def check_host_dtype(host_cache_dtype: str, host_cache_bytes: int, cache_dtype: str) -> None:
    """Raises ValueError if pages in host memory are to have a number type that is unknown, or that changes nothing."""
    if host_cache_dtype not in ("auto", "int8"):
        raise ValueError(f"host_cache_dtype={host_cache_dtype!r} must be one of auto, int8")
    if host_cache_dtype == "int8" and cache_dtype == "int8":
        raise ValueError("host_cache_dtype='int8' changes nothing of an int8 cache; leave it out, or cache_dtype")
    if host_cache_dtype == "int8" and not host_cache_bytes:
        raise ValueError("host_cache_dtype='int8' is of pages in host memory; use --host-cache-bytes too")


def check_host_cache(host_cache_bytes: int, prefix_caching: bool) -> None:
    """Raises ValueError if host memory is asked for without the prefix cache, whose pages it keeps."""
    if host_cache_bytes and not prefix_caching:
        raise ValueError(
            f"host_cache_bytes={host_cache_bytes} keeps pages of the prefix cache, which is off; "
            "use --enable-prefix-caching too"
        )
