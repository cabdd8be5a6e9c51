"""Compiling for TPUs that are not present: libtpu contains the whole compiler, and reports what a real chip would.

Compiling in a process that has no TPU needs no device, only its description (a topology).
"""

import functools
import importlib.util
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

MISSING = None if importlib.util.find_spec("libtpu") else "libtpu is not installed, so nothing compiles for TPU here"
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}

# libtpu asks the cloud's metadata server what it runs on, unless these are set
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
# and lets one process load it, which matters only where there are TPUs
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")


@functools.cache
def device(chip: str) -> Any:
    """The description of one device of a chip of `TOPOLOGIES`."""
    return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices[0]


def abstract_mesh(chip: str) -> AbstractContextManager[Any]:
    """What kernels are to be traced under, to be those of the chip."""
    target = device(chip)
    abstract = AbstractDevice(device_kind=target.device_kind, num_cores=target.num_cores, platform="tpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=abstract))


def compile_for(chip: str, function: Callable, *args: Any, donate: tuple[int, ...] = ()) -> Any:
    """`jax.jit(function)` compiled for a chip; args are arrays or trees of shapes, with a layout where that matters."""
    target = device(chip)
    sharding = SingleDeviceSharding(target)
    shapes = jax.tree.map(
        lambda a: a if a.sharding else jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), args
    )
    with abstract_mesh(chip):
        return jax.jit(function, donate_argnums=donate).lower(*shapes).compile()
