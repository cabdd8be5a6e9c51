"""Choosing the implementation of attention at start-up: the custom kernels (Pallas, C++), or XLA."""

import logging
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import jax
from jax.typing import DTypeLike

from apt_jax.cache import CacheDtype
from apt_jax.cpu_kernels import library
from apt_jax.cpu_kernels.calls import KERNELS as CPU_KERNELS
from apt_jax.engine_config import AttentionBackend
from apt_jax.model_config import ModelConfig
from apt_jax.pallas_kernels import dispatch
from apt_jax.pallas_kernels.dispatch import Kernels

logger = logging.getLogger(__name__)


def select_kernels(
    backend: AttentionBackend,
    model_config: ModelConfig,
    *,
    block_size: int,
    dtype: DTypeLike,
    device: jax.Device,
    cpp_kernels: bool,
    num_devices: int = 1,
    cache_dtype: CacheDtype = "auto",
) -> Kernels | None:
    """The kernels to attend with, or None for XLA.

    auto takes the Pallas kernels on TPU and GPU, and on a CPU those in C++ (for a model on one device), if they pass a
    check against their references on this device, else XLA. pallas on a CPU takes the TPU kernels in interpret mode.
    Whatever is left to XLA, a warning says why. Of kernels that do not read an int8 cache those for a chunk's own
    tokens are taken with it.

    Args:
        model_config: of the part of the model that a device has.
        cpp_kernels: the device's kernels are those in C++, as on a CPU.
        num_devices: that the model is split over.

    Raises:
        ValueError: the option asks for pallas or native, and those kernels do not work here or with this cache.
    """
    is_coded = cache_dtype != "auto"
    if backend == "xla" or (backend == "auto" and cpp_kernels and num_devices > 1):
        return None
    if backend == "pallas" and cpp_kernels:
        logger.warning("attention_backend='pallas' on a CPU interprets the TPU kernels: for checks, many times slower")
        return _reading(dispatch.kernels_for(device), cache_dtype)

    heads, head_dim = model_config.num_attention_heads, model_config.head_dim

    def check(kernels: Kernels) -> str | None:
        shape: dict[str, Any] = {"heads": heads, "head_dim": head_dim, "dtype": dtype}
        with jax.default_device(device):
            codes = is_coded and kernels.reads_int8
            reason = dispatch.self_check(kernels, **shape, block_size=block_size, is_coded=codes)
            if reason is None and cpp_kernels:
                reason = dispatch.check_chunk(kernels, **shape)
            return reason

    shape = f"{heads}x{head_dim}-{block_size}-{dtype}" + ("" if cache_dtype == "auto" else f"-{cache_dtype}")
    found: Kernels | str
    if backend == "native" and (not cpp_kernels or num_devices > 1):
        found = "it is for a model on one CPU"
    elif cpp_kernels:
        found = _cpu_kernels(check, shape)
    else:
        found = _pallas_kernels(check, device)
        if is_coded and isinstance(found, str) and backend == "auto":
            logger.warning(
                "attention: XLA over the %s cache, because the kernels cannot be used (%s)", cache_dtype, found
            )
            rest = _pallas_kernels(lambda kernels: None, device)
            found = (dispatch.without_pool(rest) if isinstance(rest, Kernels) else None) or found
    if isinstance(found, Kernels):
        logger.info("attention: kernels for %s", found.name)
        if found.hidden_decode is None and found.kv_decode is not None:
            logger.warning("attention: XLA for hidden rows, because the %r kernels have none for them", found.name)
        if cpp_kernels:
            usable = found
        else:
            with jax.default_device(device):
                codes = is_coded and found.reads_int8
                usable = _usable(
                    found, heads=heads, head_dim=head_dim, block_size=block_size, dtype=dtype, is_coded=codes
                )
        if not is_coded or usable.reads_int8:
            return usable
        if backend == "pallas":
            return _reading(usable, cache_dtype)
        logger.info("attention: XLA over the %s cache, which no kernel here reads", cache_dtype)
        return dispatch.without_pool(usable)
    if backend != "auto":
        raise ValueError(f"attention_backend={backend!r} cannot be used here ({found}); use auto or xla")
    logger.warning("attention: XLA, because the kernels cannot be used here (%s)", found)
    return None


def _reading(kernels: Kernels, cache_dtype: CacheDtype) -> Kernels:
    """The kernels, which were asked for; ValueError if they do not read the cache."""
    if cache_dtype != "auto" and not kernels.reads_int8:
        raise ValueError(f"attention_backend='pallas' has no kernels here for {cache_dtype=}; use auto or xla")
    return kernels


def compile_kernels(backend: AttentionBackend, *, cpp_kernels: bool, num_devices: int = 1) -> None:
    """Compile the C++ kernels now if `select_kernels` will use them, which reports a failure."""
    if cpp_kernels and num_devices == 1 and backend in ("auto", "native"):
        with suppress(library.Unavailable):
            library.register()


def _pallas_kernels(check: Callable[[Kernels], str | None], device: jax.Device) -> Kernels | str:
    """The Pallas kernels, or the reason why they cannot be used."""
    try:
        kernels = dispatch.kernels_for(device)
    except (ImportError, NotImplementedError) as error:
        return str(error)
    return check(kernels) or kernels


def _cpu_kernels(check: Callable[[Kernels], str | None], shape: str) -> Kernels | str:
    """The C++ kernels, or the reason why they cannot be used; checks that a library passed are recorded next to it."""
    try:
        path = library.register()
    except library.Unavailable as error:
        return str(error)
    passed = path.with_name(f"{path.stem}-{shape}.passed")
    if not passed.exists():
        if reason := check(CPU_KERNELS):
            return reason
        try:
            passed.touch()
        except OSError as error:
            logger.warning("%s cannot be written (%s); the next start checks again", passed, error)
    return CPU_KERNELS


def _usable(kernels: Kernels, *, block_size: int, is_coded: bool, **shape: Any) -> Kernels:
    """The kernels for decode attention, and of the others those that work here."""
    prefix = partial(dispatch.check_prefix, block_size=block_size, is_coded=is_coded)
    writer = partial(dispatch.check_cache_writer, block_size=block_size, is_coded=is_coded)
    others: list[tuple[tuple[str, ...], str, str, Callable[..., str | None]]] = [
        (("kv_prefix", "hidden_prefix"), "prefixes", "over cached prefixes", prefix),
        (("chunk",), "chunks", "among a prefill chunk's own tokens", dispatch.check_chunk),
        (("cache_writer", "scale_writer", "scale_reader"), "writes", "for writing to the cache", writer),
    ]
    without: list[str] = []
    for names, short, place, check in others:
        if getattr(kernels, names[0]) is None:
            continue
        reason = check(kernels, **shape)
        if reason is not None:
            left_out: dict[str, Any] = dict.fromkeys(names)
            kernels = kernels._replace(**left_out)
            logger.warning("attention: XLA %s, because the kernels cannot be used (%s)", place, reason)
            without.append(short)
    return kernels._replace(name=f"{kernels.name}, {', '.join(without)} by xla") if without else kernels
