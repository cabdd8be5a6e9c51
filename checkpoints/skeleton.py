"""The model without its weights: graph definition and shapes, made without allocating anything."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx

from apt_jax.model_config import ModelConfig
from apt_jax.models.opt import OPT


@dataclasses.dataclass(frozen=True)
class Skeleton:
    """An abstract `OPT`: its graph definition and its parameters as shapes."""

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
        graphdef, state = nnx.split(nnx.eval_shape(lambda: OPT(config, dtype=dtype, rngs=nnx.Rngs(0))))
        shapes = {tuple(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}
        return cls(graphdef, state, shapes)

    @property
    def model(self) -> OPT:
        """The model, of shapes."""
        model: OPT = nnx.merge(self.graphdef, self.state)
        return model

    def fill(self, parameters: Mapping[tuple[str, ...], jax.Array]) -> OPT:
        """The model with `parameters`, which must be those of `shapes`."""
        assert parameters.keys() == self.shapes.keys()
        flat = [(path, leaf.replace(parameters[tuple(map(str, path))])) for path, leaf in nnx.to_flat_state(self.state)]
        return nnx.merge(self.graphdef, nnx.from_flat_state(flat))
