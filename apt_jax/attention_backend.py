"""Choosing the implementation of decode attention at start-up: Pallas kernels, or XLA."""

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
    """The Pallas kernels to decode with, or None for XLA.

    auto takes the kernels on TPU and GPU if they pass a check against their references on this device, else XLA.
    pallas on a CPU takes the TPU kernels in interpret mode.

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
            return kernels
    if backend == "pallas":
        raise ValueError(f"attention_backend='pallas' cannot be used here ({reason}); use auto or xla")
    logger.warning("attention: XLA, because the Pallas kernels cannot be used here (%s)", reason)
    return None
