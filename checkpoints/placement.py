"""Serving dtype, and the devices that parameters go to."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from apt_jax.checkpoints.errors import CheckpointError
from apt_jax.checkpoints.formats.stored_tensor import FLOATING
from apt_jax.engine.memory import device_memory
from apt_jax.execution.platform import Platform
from apt_jax.execution.weights.int8 import Int8Choice
from apt_jax.execution.weights.layout import StackedLayout
from apt_jax.model_config import ModelConfig
from apt_jax.models.sharding import Parallel

type Shardings = jax.sharding.Sharding | Callable[[tuple[str, ...], tuple[int, ...]], jax.sharding.Sharding] | None
"""One sharding for all parameters, a function of (NNX path, shape), or None for the default device."""

_DTYPES = {"float32": "float32", "float": "float32", "float16": "float16", "half": "float16", "bfloat16": "bfloat16"}


def sharding_of(shardings: Shardings, path: tuple[str, ...], shape: tuple[int, ...]) -> jax.sharding.Sharding:
    """The sharding of the parameter at `path` with `shape`."""
    if shardings is None:
        device = jax.config.jax_default_device  # may be a platform's name
        return jax.sharding.SingleDeviceSharding(device if isinstance(device, jax.Device) else jax.local_devices()[0])
    return shardings if isinstance(shardings, jax.sharding.Sharding) else shardings(path, shape)


@dataclasses.dataclass(frozen=True)
class PlainLayout(StackedLayout):
    """Stacks on whatever devices `shardings` names."""

    shardings: Shardings = None

    @classmethod
    def of(
        cls, shardings: Shardings, parallel: Parallel | None = None, int8: Int8Choice | None = None
    ) -> "PlainLayout":
        """For a model of any family; `parallel` takes the place of `shardings`."""
        chosen = shardings if parallel is None else parallel.weight_sharding
        return cls(device_of(shardings), parallel, shardings=chosen, int8=int8)

    def final_sharding(self, path: tuple[str, ...], shape: tuple[int, ...]) -> jax.sharding.Sharding:
        """See `WeightLayout`."""
        return sharding_of(self.shardings, path, shape)


def device_of(shardings: Shardings) -> jax.Device:
    """One of the devices that the parameters go to."""
    return next(iter(sharding_of(shardings, ("embed_positions", "embedding"), (1, 1)).device_set))


def platform_of(shardings: Shardings) -> Platform:
    """Platform of the devices that the parameters go to."""
    return Platform.of(device_of(shardings))


def check_room(weight_bytes: int, shardings: Shardings, parallel: Parallel | None) -> None:
    """Refuse weights that the devices' memory cannot hold, before any of them is read.

    Args:
        weight_bytes: of all parameters together; `parallel` splits them over its devices.

    Raises:
        CheckpointError: with the bytes that are needed and free on a device, and what to do.
    """
    devices: set[jax.Device] = sharding_of(shardings, ("embed_positions", "embedding"), (1, 1)).addressable_devices
    device: jax.Device = min(devices, key=lambda device: device.id)
    parts, sharers = (1, 1) if parallel is None else (parallel.num_devices, len(devices))
    total, free = device_memory(device, 0, sharers)
    needed = weight_bytes // parts
    if needed > free:
        raise CheckpointError(
            f"the weights need {needed / 2**20:,.1f} MiB on each of {parts} device(s), but {free / 2**20:,.1f} MiB of "
            f"{total / 2**20:,.1f} MiB are free on {device.device_kind}; free memory, take a smaller model, a 16-bit "
            "--dtype or --quantization int8, or split the model with --tensor-parallel-size"
        )


def serving_dtype(requested: str, config: ModelConfig, platform: Platform) -> np.dtype:
    """Numbers that the weights are held in: what is asked for, or for "auto" what suits the platform.

    "auto" is the checkpoint's own dtype, but float32 on a CPU, whose 16-bit arithmetic is slow, and bfloat16
    for float16 on a TPU, which has no float16.

    Raises:
        CheckpointError: `requested` is not a known name.
    """
    if requested == "auto":
        return FLOATING[platform.weight_dtype(config.checkpoint_dtype)]
    return stored_dtype(requested, config)


def stored_dtype(requested: str | None, config: ModelConfig) -> np.dtype:
    """Numbers that a conversion writes: what is asked for, or for None the checkpoint's own.

    Raises:
        CheckpointError: `requested` is not a known name.
    """
    if requested is None or requested == "auto":
        return FLOATING[config.checkpoint_dtype]
    if requested not in _DTYPES:
        raise CheckpointError(f"{requested=} is no dtype that weights can have; use one of auto, {', '.join(_DTYPES)}")
    return FLOATING[_DTYPES[requested]]
