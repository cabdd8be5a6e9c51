"""Which parameters of a model are 8-bit integers, and what they are in its modules (`models/quantization.py`)."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
from flax import nnx

from apt_jax.model_config import Quantization
from apt_jax.models.kernels import Int8Kernel, Int8Table, Kernel, RowScaledKernel
from apt_jax.models.linear import Head, Linear
from apt_jax.models.quantization import Int8Weight, quantise_stack, quantise_table, quantise_weight

type Path = tuple[str, ...]

VOCABULARY = "vocabulary"  # what logits are made with
PARTS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", VOCABULARY)
NEVER_DYNAMIC = ("k_proj", "v_proj")  # absorbed into queries too, and keys must be the same in every way to get them
_LAYERS, _TABLE = "layers", ("embed_tokens", "embedding")


@dataclass(frozen=True)
class Int8Choice:
    """The quantised parameters of a model.

    Attributes:
        quantization: int8 or int8-dynamic.
        dtype: number type of the model, which everything else is in.
        paths: number of axes of the inputs, by the path of the parameter; 1 for a table.
        parts: of `PARTS`, what `paths` was made of.
    """

    quantization: Quantization
    dtype: np.dtype
    paths: Mapping[Path, int]
    parts: tuple[str, ...] = PARTS

    @classmethod
    def of(cls, model: nnx.Module, quantization: Quantization, parts: Collection[str] = PARTS) -> "Int8Choice | None":
        """The choice for `model`, whose parameters may be shapes; None without quantisation.

        Args:
            parts: of `PARTS`, what is quantised; projections of other names stay wide.
        """
        if quantization == "none":
            return None
        found: dict[Path, int] = {}
        heads = False
        for path, module in nnx.iter_modules(model):
            names = tuple(map(str, path))
            if isinstance(module, Head):
                heads = True
                if VOCABULARY in parts:
                    found[*names, "kernel"] = 1
            elif isinstance(module, Linear) and names[0] == _LAYERS and names[-1] in parts:
                found[*names, "kernel"] = len(module.inputs)
        if VOCABULARY in parts and not heads:
            found[_TABLE] = 1
        dtype = np.dtype(jax.tree.leaves(nnx.state(model))[0].dtype)
        return cls(quantization, dtype, found, tuple(parts))

    def quantise(self, path: Path, array: np.ndarray) -> Int8Weight:
        """The parameter at `path`, one of `paths`: a stack of the layers' kernels, a table or one kernel.

        Raises:
            ValueError: it is not finite.
        """
        try:
            if path[0] == _LAYERS:
                return quantise_stack(array, self.paths[path])
            if path == _TABLE:
                return Int8Weight(*quantise_table(array))
            return Int8Weight(*quantise_weight(array, self.paths[path]))
        except ValueError as error:
            raise ValueError(f"{'.'.join(path)}: {error}") from error

    def axes(self, path: Path, ndim: int) -> tuple[range, range, range]:
        """Axes of the parameter at `path`: those of the stack, the inputs and the outputs."""
        if path == _TABLE:
            return range(0), range(1, 2), range(1)
        first = 1 if path[0] == _LAYERS else 0
        last = first + self.paths[path]
        return range(first), range(first, last), range(last, ndim)

    def shapes(self, path: Path, shape: tuple[int, ...]) -> Int8Weight:
        """Shapes and number types of what `quantise` makes of a parameter of `shape`."""
        stack, inputs, outputs = self.axes(path, len(shape))

        def of(axes: range) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(tuple(shape[axis] for axis in (*stack, *axes)), np.float32)

        factor = of(inputs) if path[0] == _LAYERS else None
        return Int8Weight(jax.ShapeDtypeStruct(shape, np.int8), of(outputs), factor)  # type: ignore[arg-type]

    def nbytes(self, shapes: Mapping[Path, jax.ShapeDtypeStruct]) -> int:
        """Bytes of all parameters of these shapes, quantised or not."""
        total = 0
        for path, wide in shapes.items():
            parts = self.shapes(path, wide.shape) if path in self.paths else (wide,)
            total += sum(int(np.prod(part.shape)) * part.dtype.itemsize for part in parts if part is not None)
        return total

    def is_dynamic(self, path: Path) -> bool:
        """Whether activations are quantised too where the parameter at `path` is multiplied."""
        return self.quantization == "int8-dynamic" and path[-2] not in NEVER_DYNAMIC

    def in_module(self, path: Path) -> Callable[..., Kernel]:
        """What arrays of the parameter at `path`, of one layer or a stack, are in its module."""
        kind = Int8Table if path == _TABLE else Int8Kernel
        return partial(quantised_kernel, partial(kind, dynamic=self.is_dynamic(path), dtype=self.dtype))


def quantised_kernel(make: Callable[..., Kernel], values: jax.Array, scale: jax.Array, *factor: jax.Array) -> Kernel:
    """A kernel of values and scale, whose inputs have a factor if that is given."""
    kernel = make(values, scale)
    return RowScaledKernel(kernel, *factor) if factor else kernel
