"""Choosing the implementation of attention at start-up: Pallas kernels, or XLA."""

import logging
from typing import Literal

import jax
from jax.typing import DTypeLike

from apt_jax.config import ModelConfig
from pallas_kernels import dispatch
from pallas_kernels.dispatch import Kernels

logger = logging.getLogger(__name__)


def select_kernels(
    backend: Literal["auto", "xla", "pallas"],
    model_config: ModelConfig,
    *,
    block_size: int,
    dtype: DTypeLike,
    device: jax.Device,
) -> Kernels | None:
    """The kernels to attend with, or None for XLA.

    auto takes the kernels on TPU and GPU if they pass a check against their references on this device, else XLA.
    pallas on a CPU takes the TPU kernels in interpret mode. Whatever is left to XLA, a warning says why.

    Raises:
        ValueError: pallas was asked for, and the kernels do not work here.
    """
    if backend == "xla" or (backend == "auto" and device.platform == "cpu"):
        return None
    if device.platform == "cpu":
        logger.warning("attention_backend='pallas' on a CPU interprets the TPU kernels: for checks, many times slower")
        return dispatch.kernels_for(device)
    reason = None
    try:
        kernels = dispatch.kernels_for(device)
    except (ImportError, NotImplementedError) as error:
        reason = str(error)
    else:
        with jax.default_device(device):
            reason = dispatch.self_check(
                kernels,
                heads=model_config.num_attention_heads,
                head_dim=model_config.head_dim,
                block_size=block_size,
                dtype=dtype,
            )
        if reason is None:
            logger.info("attention: Pallas kernels for %s", kernels.name)
            if kernels.hidden_decode is None:
                logger.warning(
                    "attention: XLA for hidden rows, because the %r kernels have none for them", kernels.name
                )
            with jax.default_device(device):
                return _with_usable_chunk(kernels, model_config, dtype)
    if backend == "pallas":
        raise ValueError(f"attention_backend='pallas' cannot be used here ({reason}); use auto or xla")
    logger.warning("attention: XLA, because the Pallas kernels cannot be used here (%s)", reason)
    return None


def _with_usable_chunk(kernels: Kernels, model_config: ModelConfig, dtype: DTypeLike) -> Kernels:
    """The kernels without that for a chunk's own tokens, which is not ours, if it does not work here."""
    if kernels.chunk is None:
        return kernels
    heads, head_dim = model_config.num_attention_heads, model_config.head_dim
    reason = dispatch.check_chunk(kernels, heads=heads, head_dim=head_dim, dtype=dtype)
    if reason is None:
        return kernels
    logger.warning(
        "attention: XLA among a prefill chunk's own tokens, because their kernel cannot be used (%s)", reason
    )
    return kernels._replace(name=f"{kernels.name}, chunks by xla", chunk=None)
