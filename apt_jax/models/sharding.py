"""Tensor parallelism: the mesh of devices, and how weights, cache pool and step arrays lie on them.

q, fc1 and the vocabulary are split by outputs, out_proj and fc2 by inputs; the pool along its last axis, which splits
KV blocks by heads and hidden blocks by slices of D. Where hidden vectors are cached, each device has a slice of them
only, so k and v are split by inputs too; in a KV cache by heads. Layer norms, positions and all arrays of a step are
on every device. docs/log/2026-11-30-tensor-parallelism.md counts what that reads and exchanges.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from apt_jax.model_config import ModelConfig
from apt_jax.models.collectives import AXIS

POOL = PartitionSpec(None, None, AXIS)  # [L*P, S, D]
EVERYWHERE = PartitionSpec()
_BY_OUTPUT = {  # by the last two parts of a parameter's path
    ("embed_tokens", "embedding"): PartitionSpec(AXIS, None),  # [V, E]
    ("lm_head", "kernel"): PartitionSpec(None, AXIS),  # [E, V]
    ("q_proj", "kernel"): PartitionSpec(None, None, AXIS, None),  # [L, D, N, H]
    ("q_proj", "bias"): PartitionSpec(None, AXIS, None),  # [L, N, H]
    ("fc1", "kernel"): PartitionSpec(None, None, AXIS),  # [L, D, F]
    ("fc1", "bias"): PartitionSpec(None, AXIS),  # [L, F]
}
_BY_INPUT = {
    ("out_proj", "kernel"): PartitionSpec(None, AXIS, None, None),  # [L, N, H, D]
    ("fc2", "kernel"): PartitionSpec(None, AXIS, None),  # [L, F, D]
}
_SLICE_OF_D = PartitionSpec(None, AXIS, None, None)  # k and v over hidden blocks: [L, D, N, H]


@dataclass(frozen=True)
class Parallel:
    """The devices that one model is split over, and whether their cache holds hidden vectors.

    Attributes:
        mesh: one axis, `AXIS`.
        hidden: whether the cache holds hidden vectors: k and v are then split by inputs, else by heads.
    """

    mesh: Mesh
    hidden: bool

    @classmethod
    def over(cls, num_devices: int, *, hidden: bool) -> "Parallel":
        """The first `num_devices` devices, in an order in which neighbours are linked.

        Raises:
            ValueError: there are not as many, or they are not all of a multi-process run.
        """
        devices = jax.devices()
        if num_devices > len(devices):
            raise ValueError(
                f"tensor_parallel_size={num_devices} is more than the {len(devices)} {devices[0].platform} device(s) "
                "here; lower --tensor-parallel-size (XLA_FLAGS=--xla_force_host_platform_device_count=N makes "
                "N devices of a CPU, for tests)"
            )
        if jax.process_count() > 1 and num_devices != len(devices):
            raise ValueError(
                f"tensor_parallel_size={num_devices}, but the {jax.process_count()} processes have {len(devices)} "
                f"devices, and none may be idle; use --tensor-parallel-size {len(devices)}"
            )
        types = (jax.sharding.AxisType.Auto,)
        return cls(jax.make_mesh((num_devices,), (AXIS,), types, devices=devices[:num_devices]), hidden)

    @classmethod
    def of(cls, model: nnx.Module) -> "Parallel | None":
        """The split of `model` over its devices; None on one device."""
        mesh, hidden = None, False
        for path, leaf in nnx.to_flat_state(nnx.state(model)):
            sharding = leaf[...].sharding
            if isinstance(sharding, NamedSharding) and AXIS in sharding.mesh.axis_names:
                mesh = sharding.mesh
                hidden |= path[-2:] == ("k_proj", "kernel") and sharding.spec == _SLICE_OF_D
        if mesh is None:
            return None
        assert isinstance(mesh, Mesh)
        return cls(mesh, hidden)

    @property
    def num_devices(self) -> int:
        """Devices in the mesh."""
        return self.mesh.size

    def check(self, config: ModelConfig) -> None:
        """Refuse a model that cannot be split evenly.

        Raises:
            ValueError: heads or ffn_dim are not divisible; the message reports what is allowed.
        """
        config.check_split(self.num_devices)

    def weight_sharding(self, path: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding:
        """Where the parameter at NNX `path` lies; an axis that is not divisible has to be padded with zeros."""
        key = (path[-2], path[-1])
        if self.num_devices == 1:
            spec = EVERYWHERE
        elif path[-2] in ("k_proj", "v_proj"):
            of_heads = _BY_OUTPUT["q_proj", path[-1]]
            spec = _SLICE_OF_D if self.hidden and path[-1] == "kernel" else of_heads
        else:
            spec = _BY_OUTPUT.get(key) or _BY_INPUT.get(key) or EVERYWHERE
        return NamedSharding(self.mesh, spec)

    def place[Model: nnx.Module](self, model: Model) -> Model:
        """Split a model that lies on one device over the mesh; the vocabulary is padded.

        For models that are in memory already; `apt_jax.checkpoints.load` never has all of one on a device.
        """
        graphdef, state = nnx.split(model)
        flat = []
        for path, leaf in nnx.to_flat_state(state):
            sharding = self.weight_sharding(tuple(map(str, path)), leaf[...].shape)
            padded = padded_shape(leaf[...].shape, sharding)
            value = np.zeros(padded, leaf[...].dtype)
            value[tuple(map(slice, leaf[...].shape))] = leaf[...]
            flat.append((path, leaf.replace(jax.make_array_from_callback(padded, sharding, value.__getitem__))))
        placed: Model = nnx.merge(graphdef, nnx.from_flat_state(flat))
        return placed

    def split_program(
        self, program: Callable[..., Any], weights: list[jax.ShapeDtypeStruct], args: tuple[Any, ...], outs: Any
    ) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """`program(weights, *args)` as each device runs it on its own parts, and `args` with their shardings.

        Args:
            weights: shapes with shardings.
            args: trees of shapes; the one that has a sharding already is the pool, the others lie everywhere.
            outs: specs of what `program` returns, a tree prefix.
        """

        def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            sharding = leaf.sharding or NamedSharding(self.mesh, EVERYWHERE)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        args = jax.tree.map(placed, args)
        specs = jax.tree.map(lambda leaf: leaf.sharding.spec, (weights, *args))
        # what is the same everywhere is computed everywhere: nothing for the checker to prove
        return jax.shard_map(program, mesh=self.mesh, in_specs=specs, out_specs=outs, check_vma=False), args


def padded_shape(shape: tuple[int, ...], sharding: jax.sharding.Sharding) -> tuple[int, ...]:
    """`shape` with each axis brought to a multiple of the devices that it is split over."""
    if not isinstance(sharding, NamedSharding):
        return shape
    sizes = sharding.mesh.shape
    names = [axis if isinstance(axis, tuple) else () if axis is None else (axis,) for axis in sharding.spec]
    counts = [math.prod(sizes[name] for name in axes) for axes in names] + [1] * (len(shape) - len(names))
    return tuple(-(-size // count) * count for size, count in zip(shape, counts, strict=True))


def put(host: np.ndarray | jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
    """`host` on the devices, of each only its slice; zeros where an axis does not divide.

    What is on the devices already stays as it is.
    """
    if len(sharding.device_set) == 1 or isinstance(host, jax.Array):
        return jax.device_put(host, sharding)

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        found = host[index]
        wanted = [len(range(*s.indices(size))) for s, size in zip(index, shape, strict=True)]
        return np.pad(found, [(0, size - have) for size, have in zip(wanted, found.shape, strict=True)])

    shape = padded_shape(host.shape, sharding)
    return jax.make_array_from_callback(shape, sharding, part)


def zeros(shape: tuple[int, ...], dtype: DTypeLike, sharding: jax.sharding.Sharding) -> jax.Array:
    """Zeros of `shape`, made on the devices, so that nothing is copied from the host."""
    local = sharding.shard_shape(shape)
    parts = [jnp.zeros(local, dtype, device=device) for device in sharding.addressable_devices]
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def local_config(config: ModelConfig, num_devices: int) -> ModelConfig:
    """`config` with attention's sizes on one of the devices, for kernels that run there over its own heads."""
    return replace(
        config,
        hidden_size=config.hidden_size // num_devices,
        num_attention_heads=config.num_attention_heads // num_devices,
    )
