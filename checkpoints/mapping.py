"""How the tensors of a Hugging Face checkpoint fill the parameters of a model, for any family.

A checkpoint holds one tensor per layer (`model.decoder.layers.3.fc1.weight`); our layers are stacked, so that tensor
fills row 3 of the parameter at `("layers", "fc1", "kernel")`. A torch linear weight is `[out, in]`, a Flax kernel
`[in, out]`; the model's is `[in, out]` with heads split into `[N, H]`.

Everything here is pure host code. Names are always those of torch's state dict; other spellings are brought to them by
`WeightMapping.canonical_name` and `flax_name`. Which tensors a family has is a file of its own, such as
`mappings/opt.py`.
"""

import dataclasses
import enum
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from apt_jax.model_config import ModelConfig


class Layout(enum.Enum):
    """How a stored tensor is laid out against the parameter that it fills."""

    VECTOR = "vector"  # one axis: a bias or a layer norm's scale
    TABLE = "table"  # an embedding [rows, width], the same everywhere
    LINEAR = "linear"  # torch [out, in], Flax [in, out]


@dataclasses.dataclass(frozen=True)
class Slot:
    """One tensor of a Hugging Face checkpoint and the place in the model that it fills."""

    name: str  # torch name
    path: tuple[str, ...]  # path in the NNX state
    layer: int | None  # row of the parameter's leading axis L; None: the whole parameter
    layout: Layout
    flax_shape: tuple[int, ...]  # as Flax stores it: [in, out], [rows, width] or [n]
    shape: tuple[int, ...]  # as the model holds it (one layer of it): heads split into [N, H]

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """Shape of the tensor in a torch or safetensors file."""
        return self.flax_shape[::-1] if self.layout is Layout.LINEAR else self.flax_shape

    def from_torch(self, tensor: np.ndarray) -> np.ndarray:
        """View a `torch_shape` tensor as the slice `shape` of the model's parameter."""
        return self.from_flax(tensor.T if self.layout is Layout.LINEAR else tensor)

    def from_flax(self, tensor: np.ndarray) -> np.ndarray:
        """View a `flax_shape` tensor as the slice `shape` of the model's parameter."""
        return tensor.reshape(self.shape)

    def to_torch(self, parameter: np.ndarray) -> np.ndarray:
        """Lay a slice `shape` of the model's parameter out as a contiguous `torch_shape` tensor."""
        matrix = parameter.reshape(self.flax_shape)
        return np.ascontiguousarray(matrix.T if self.layout is Layout.LINEAR else matrix)


@dataclasses.dataclass(frozen=True)
class WeightMapping:
    """The tensors of a family's checkpoints.

    Attributes:
        make_slots: every tensor that a checkpoint of a config must hold, in the order of the network.
        embedding: name of the table of token embeddings.
        head: name of the tensor that logits are made with; stored with a tied head, it has to equal the table.
        canonical_name: the torch name of a key found in a file, or None for a key that is no weight.
    """

    make_slots: Callable[[ModelConfig], Iterable[Slot]]
    embedding: str
    head: str
    canonical_name: Callable[[str], str | None] = lambda stored: stored

    def slots(self, config: ModelConfig) -> dict[str, Slot]:
        """What `make_slots` tells, by torch name."""
        return {slot.name: slot for slot in self.make_slots(config)}

    def hf_shapes(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Torch name to torch shape of every tensor of a checkpoint of `config`."""
        return {name: slot.torch_shape for name, slot in self.slots(config).items()}

    def flax_name(self, path: Sequence[str]) -> str | None:
        """Torch name of a leaf of a Flax parameter tree, such as `("model", "decoder", ..., "fc1", "kernel")`."""
        *parents, leaf = path[1:] if path[0] == "params" else path
        leaf = "weight" if leaf in ("kernel", "scale", "embedding") else leaf
        return self.canonical_name(".".join((*parents, leaf)))
