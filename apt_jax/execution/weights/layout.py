"""The layout of a model's weights on its devices: each is laid out once, when it is loaded, as the programs take it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from apt_jax.execution.weights.tpu_layouts import tpu_format
from apt_jax.models.interface import Model
from apt_jax.models.kernels import Kernel
from apt_jax.models.sharding import Parallel
from apt_jax.pallas_kernels.dispatch import Kernels

type InModule = Callable[[jax.Array], Kernel] | None
"""What an array is in a module's parameter; None is the array itself."""
type Path = tuple[str, ...]


@dataclass(frozen=True)
class Placed:
    """A parameter as it lies in memory: one array, or one for each layer."""

    arrays: list[jax.Array]
    in_module: InModule = None


@dataclass(frozen=True)
class ModuleArrays:
    """The arrays of a module, in the order of its state's leaves."""

    arrays: list[jax.Array]
    in_module: list[InModule]
    graphdef: nnx.GraphDef[nnx.Module]
    tree: jax.tree_util.PyTreeDef

    @classmethod
    def of(cls, module: nnx.Module, placed: Sequence[tuple[jax.Array, InModule]]) -> "ModuleArrays":
        """The arrays `placed` in the structure of `module`, whose own arrays are not used."""
        graphdef, state = nnx.split(module)
        return cls([array for array, _ in placed], [put for _, put in placed], graphdef, jax.tree.structure(state))

    @property
    def nbytes(self) -> int:
        """Bytes on each device."""
        return sum(array.addressable_shards[0].data.nbytes for array in self.arrays)

    def module(self, arrays: Sequence[jax.Array]) -> Any:
        """The module with `arrays` in place of its own, inside a compiled function."""
        leaves = [a if put is None else put(a) for a, put in zip(arrays, self.in_module, strict=True)]
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.tree, leaves))


@dataclass(frozen=True)
class Weights:
    """All weights of a model.

    Attributes:
        outer: all arrays; where the layers have arrays of their own, empty arrays stand for theirs.
        layers: the arrays of each layer, all of the same structure; None if they are stacked.
        kernels: what the programs attend with; None is XLA. The weights are laid out for them.
        parallel: the devices that they are split over.
    """

    outer: ModuleArrays
    layers: list[ModuleArrays] | None
    dtype: np.dtype
    kernels: Kernels | None = None
    parallel: Parallel | None = None

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


class WeightLayout(ABC):
    """Where and how a loader puts a model's parameters."""

    @abstractmethod
    def sharding(self, path: Path, shape: tuple[int, ...]) -> jax.sharding.Sharding:
        """Where the parameter at NNX `path` goes first; an axis that is not divisible is padded with zeros."""

    @abstractmethod
    def place(self, path: Path, array: jax.Array) -> Placed:
        """The parameter in its final layout; `array` lies as `sharding` says and must not be used afterwards."""

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

    device: jax.Device
    parallel: Parallel | None = None
    custom_layouts: bool = False
    kernels: Kernels | None = None

    def sharding(self, path: Path, shape: tuple[int, ...]) -> jax.sharding.Sharding:
        """See `WeightLayout`."""
        if self.parallel is None:
            return jax.sharding.SingleDeviceSharding(self.device)
        return self.parallel.weight_sharding(path, shape)

    def place(self, path: Path, array: jax.Array) -> Placed:
        """See `WeightLayout`."""
        if self.parallel is None and self.custom_layouts:
            array = jax.block_until_ready(jax.device_put(array, tpu_format(path, array)))
        return Placed([array])

    def weights(self, model: nnx.Module, placed: Mapping[Path, Placed]) -> Weights:
        """See `WeightLayout`."""
        found = [placed[path] for path in paths_of(model)]
        outer = ModuleArrays.of(model, [(one.arrays[0], one.in_module) for one in found])
        return Weights(outer, None, np.dtype(outer.arrays[0].dtype), self.kernels, self.parallel)


def path_of(path: Sequence[object]) -> Path:
    """An NNX path as the names of modules and parameter."""
    return tuple(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


def paths_of(module: nnx.Module) -> list[Path]:
    """Paths of a module's parameters, in the order of its state's leaves."""
    return [path_of(path) for path, _ in nnx.to_flat_state(nnx.state(module))]
