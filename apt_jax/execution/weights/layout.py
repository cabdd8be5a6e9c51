"""The layout of a model's weights on its devices: each is laid out once, when it is loaded, as the programs take it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from apt_jax.execution.weights.int8 import Int8Choice
from apt_jax.execution.weights.tpu_layouts import tpu_format
from apt_jax.model_config import Quantization
from apt_jax.models.interface import Model
from apt_jax.models.kernels import Kernel
from apt_jax.models.quantization import Int8Weight
from apt_jax.models.sharding import Parallel, put
from apt_jax.pallas_kernels.dispatch import Kernels

type Leaf = tuple[jax.Array, ...]
"""What a parameter consists of: one array, or several where it is quantised."""
type InModule = Callable[..., Kernel] | None
"""What the arrays of a leaf are in a module's parameter; None is the one array itself."""
type Path = tuple[str, ...]


@dataclass(frozen=True)
class Placed:
    """A parameter as it lies in memory: one leaf, or one for each layer."""

    leaves: Sequence[Leaf]
    in_module: InModule = None

    @property
    def array(self) -> jax.Array:
        """The parameter, where it is one array."""
        ((array,),) = self.leaves
        return array


@dataclass(frozen=True)
class ModuleArrays:
    """The arrays of a module, in the order of its state's leaves, each of which has one or, quantised, several.

    Attributes:
        counts: arrays of each leaf.
    """

    arrays: list[jax.Array]
    counts: list[int]
    in_module: list[InModule]
    graphdef: nnx.GraphDef[nnx.Module]
    tree: jax.tree_util.PyTreeDef

    @classmethod
    def of(cls, module: nnx.Module, placed: Sequence[tuple[Leaf, InModule]]) -> "ModuleArrays":
        """The leaves `placed` in the structure of `module`, whose own arrays are not used."""
        graphdef, state = nnx.split(module)
        arrays = [array for leaf, _ in placed for array in leaf]
        counts, in_module = [len(leaf) for leaf, _ in placed], [wrap for _, wrap in placed]
        return cls(arrays, counts, in_module, graphdef, jax.tree.structure(state))

    @property
    def nbytes(self) -> int:
        """Bytes on each device."""
        return sum(array.addressable_shards[0].data.nbytes for array in self.arrays)

    def module(self, arrays: Sequence[jax.Array]) -> Any:
        """The module with `arrays` in place of its own, inside a compiled function."""
        assert len(arrays) == sum(self.counts)
        rest = iter(arrays)
        parts = [[next(rest) for _ in range(count)] for count in self.counts]
        leaves = [part[0] if wrap is None else wrap(*part) for part, wrap in zip(parts, self.in_module, strict=True)]
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.tree, leaves))


@dataclass(frozen=True)
class Weights:
    """All weights of a model.

    Attributes:
        outer: all arrays; where the layers have arrays of their own, empty arrays stand for theirs.
        layers: the arrays of each layer, all of the same structure; None if they are stacked.
        kernels: what the programs attend with; None is XLA. The weights are laid out for them.
        parallel: the devices that they are split over.
        quantization: how weights are stored and multiplied; see docs/quantization.md.
    """

    outer: ModuleArrays
    layers: list[ModuleArrays] | None
    dtype: np.dtype
    kernels: Kernels | None = None
    parallel: Parallel | None = None
    quantization: Quantization = "none"

    @property
    def nbytes(self) -> int:
        """Bytes on each device."""
        return self.outer.nbytes + sum(layer.nbytes for layer in self.layers or ())

    @property
    def device(self) -> jax.Device:
        """The device that holds the weights, or the first of this process that do."""
        return self.outer.arrays[0].addressable_shards[0].device

    def model(self, arrays: Sequence[jax.Array]) -> Model:
        """The model with `arrays` in place of the outer ones, inside a compiled function."""
        model: Model = self.outer.module(arrays)
        return model


@dataclass(frozen=True)
class WeightLayout(ABC):
    """Where and how a loader puts a model's parameters.

    Attributes:
        int8: which parameters are quantised; None is none.
    """

    device: jax.Device
    int8: Int8Choice | None = field(default=None, kw_only=True)

    def sharding(self, path: Path, shape: tuple[int, ...]) -> jax.sharding.Sharding:
        """Where the parameter at NNX `path` goes first; an axis that is not divisible is padded with zeros.

        What is to be quantised goes to the host.
        """
        if self.is_int8(path) and (host := host_device()) is not None:
            return jax.sharding.SingleDeviceSharding(host)
        return self.final_sharding(path, shape)

    def place(self, path: Path, array: jax.Array) -> Placed:
        """The parameter in its final layout; `array` lies as `sharding` says and must not be used afterwards.

        Raises:
            ValueError: it has to be quantised and is not finite.
        """
        if self.int8 is None or not self.is_int8(path):
            return self.place_wide(path, array)
        return self.place_int8(path, self.int8.quantise(path, np.asarray(array)))

    def is_int8(self, path: Path) -> bool:
        """Whether the parameter at `path` is quantised."""
        return self.int8 is not None and path in self.int8.paths

    @property
    def quantization(self) -> Quantization:
        """How weights are stored and multiplied."""
        return "none" if self.int8 is None else self.int8.quantization

    @abstractmethod
    def final_sharding(self, path: Path, shape: tuple[int, ...]) -> jax.sharding.Sharding:
        """Where the parameter at `path` stays; the values of one that is quantised lie like it."""

    @abstractmethod
    def place_wide(self, path: Path, array: jax.Array) -> Placed:
        """`place` of a parameter that is not quantised."""

    @abstractmethod
    def place_int8(self, path: Path, weight: Int8Weight) -> Placed:
        """The quantised parameter in its final layout; its arrays are on the host, or as `int8_shardings` says."""

    def int8_shardings(self, path: Path, shape: tuple[int, ...]) -> list[jax.sharding.Sharding]:
        """Where values, scale and factor of a quantised parameter stay; `shape` is that of the values."""
        assert self.int8 is not None
        values = self.final_sharding(path, shape)
        if not isinstance(values, NamedSharding):
            return [values] * 3
        spec = (*values.spec, *[None] * (len(shape) - len(values.spec)))
        stack, inputs, outputs = self.int8.axes(path, len(shape))
        parts = [[spec[axis] for axis in (*stack, *axes)] for axes in (outputs, inputs)]
        return [values, *(NamedSharding(values.mesh, PartitionSpec(*part)) for part in parts)]

    @abstractmethod
    def weights(self, model: nnx.Module, placed: Mapping[Path, Placed]) -> Weights:
        """All weights of `model`, from its placed parameters.

        Args:
            model: gives the structure; its parameters may be shapes.
        """

    def lay_out(self, model: nnx.Module) -> Weights:
        """A copy of the weights of a model in memory, or the same arrays where they lie right already."""
        flat = nnx.to_flat_state(nnx.state(model))
        return self.weights(model, {path_of(path): self.place(path_of(path), leaf.get_value()) for path, leaf in flat})


@dataclass(frozen=True)
class StackedLayout(WeightLayout):
    """Every parameter of the layers is one stack: on one device, or split over several.

    Attributes:
        custom_layouts: they lie in memory as `execution/weights/tpu_layouts.py` says.
        kernels: see `Weights`.
    """

    parallel: Parallel | None = None
    custom_layouts: bool = False
    kernels: Kernels | None = None

    def final_sharding(self, path: Path, shape: tuple[int, ...]) -> jax.sharding.Sharding:
        """See `WeightLayout`."""
        if self.parallel is None:
            return jax.sharding.SingleDeviceSharding(self.device)
        return self.parallel.weight_sharding(path, shape)

    def place_wide(self, path: Path, array: jax.Array) -> Placed:
        """See `WeightLayout`."""
        return Placed([(self._in_layout(path, array),)])

    def place_int8(self, path: Path, weight: Int8Weight) -> Placed:
        """See `WeightLayout`."""
        assert self.int8 is not None
        parts = [part for part in weight if part is not None]
        shardings = self.int8_shardings(path, weight.values.shape)
        values, *others = (put(part, sharding) for part, sharding in zip(parts, shardings, strict=False))
        return Placed([(self._in_layout(path, values), *others)], self.int8.in_module(path))

    def weights(self, model: nnx.Module, placed: Mapping[Path, Placed]) -> Weights:
        """See `WeightLayout`."""
        found = [placed[path] for path in paths_of(model)]
        outer = ModuleArrays.of(model, [(one.leaves[0], one.in_module) for one in found])
        return Weights(outer, None, dtype_of(model), self.kernels, self.parallel, self.quantization)

    def _in_layout(self, path: Path, array: jax.Array) -> jax.Array:
        if self.parallel is None and self.custom_layouts:
            return jax.block_until_ready(jax.device_put(array, tpu_format(path, array)))
        return array


def host_device() -> jax.Device | None:
    """The host as a device, as jax has it unless JAX_PLATFORMS leaves it out."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def dtype_of(model: nnx.Module) -> np.dtype:
    """Number type of a model, whose parameters may be shapes."""
    return np.dtype(jax.tree.leaves(nnx.state(model))[0].dtype)


def path_of(path: Sequence[object]) -> Path:
    """An NNX path as the names of modules and parameter."""
    return tuple(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


def paths_of(module: nnx.Module) -> list[Path]:
    """Paths of a module's parameters, in the order of its state's leaves."""
    return [path_of(path) for path, _ in nnx.to_flat_state(nnx.state(module))]
