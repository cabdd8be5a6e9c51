"""The model without its weights: graph definition and shapes, made without allocating anything."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from apt_jax.checkpoints.families import family_of
from apt_jax.model_config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Skeleton:
    """An abstract model of any family: its graph definition and its parameters as shapes."""

    graphdef: nnx.GraphDef
    state: nnx.State
    shapes: dict[tuple[str, ...], jax.ShapeDtypeStruct]

    @property
    def dtype(self) -> np.dtype:
        """Data type of all parameters."""
        return np.dtype(next(iter(self.shapes.values())).dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters."""
        return sum(int(np.prod(a.shape)) * a.dtype.itemsize for a in self.shapes.values())

    @classmethod
    @functools.lru_cache(maxsize=16)  # tracing takes a good part of a second
    def of(cls, config: ModelConfig, dtype: np.dtype) -> "Skeleton":
        """Trace the model's constructor."""
        make = family_of(config).module
        graphdef, state = nnx.split(nnx.eval_shape(lambda: make(config, dtype=dtype, rngs=nnx.Rngs(0))))
        shapes = {tuple(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}
        return cls(graphdef, state, shapes)

    @property
    def model(self) -> Any:
        """The model, of shapes: a module and a `Model`."""
        return nnx.merge(self.graphdef, self.state)

    def fill(self, parameters: Mapping[tuple[str, ...], jax.Array]) -> Any:
        """The model with `parameters`, which must be those of `shapes`."""
        assert parameters.keys() == self.shapes.keys()
        flat = [(path, leaf.replace(parameters[tuple(map(str, path))])) for path, leaf in nnx.to_flat_state(self.state)]
        return nnx.merge(self.graphdef, nnx.from_flat_state(flat))
