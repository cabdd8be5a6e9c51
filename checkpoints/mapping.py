"""Which Hugging Face tensor fills which slice of which parameter of `apt_jax.models.opt.OPT`.

A checkpoint of OPT holds one tensor per layer (`model.decoder.layers.3.fc1.weight`); our layers are stacked,
so that tensor fills row 3 of the parameter at `("layers", "fc1", "kernel")`. A torch linear weight is
`[out, in]`, a Flax kernel `[in, out]`; the model's is `[in, out]` with heads split into `[N, H]`.

Everything here is pure host code. Names are always those of torch's `OPTForCausalLM` state dict; other
spellings are brought to them by `canonical_name` and `flax_name`.

Source: transformers `modeling_opt.py` and `modeling_flax_opt.py` (names and shapes).
"""

import dataclasses
import enum
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from flax import nnx

from apt_jax.model_config import POSITION_OFFSET, ModelConfig
from apt_jax.models.opt import OPT

EMBEDDING_NAME = "model.decoder.embed_tokens.weight"
HEAD_NAME = "lm_head.weight"
_BASE = "model.decoder."
_IGNORED = frozenset({"model.decoder.version"})  # a format mark that metaseq exports carry, not a weight


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


def slots(config: ModelConfig) -> dict[str, Slot]:
    """Every tensor that a checkpoint of `config` must hold, by torch name, in the order of the network."""
    found = [*_embedding_slots(config)]
    for layer in range(config.num_hidden_layers):
        found += _layer_slots(config, layer)
    if config.has_final_layer_norm:
        found += _norm(config, "final_layer_norm", None)
    if not config.tie_word_embeddings:
        E, V = config.word_embed_proj_dim, config.vocab_size
        found.append(Slot(HEAD_NAME, ("lm_head", "kernel"), None, Layout.LINEAR, (E, V), (E, V)))
    return {slot.name: slot for slot in found}


def hf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Torch name to torch shape of every tensor of a checkpoint of `config`."""
    return {name: slot.torch_shape for name, slot in slots(config).items()}


def canonical_name(stored: str) -> str | None:
    """Torch name of a key found in a file, `model.` put back in front; None for a key that is no weight."""
    name = f"model.{stored}" if stored.startswith("decoder.") else stored
    return None if name in _IGNORED else name


def flax_name(path: Sequence[str]) -> str | None:
    """Torch name of a leaf of a Flax parameter tree, such as `("model", "decoder", ..., "fc1", "kernel")`."""
    *parents, leaf = path[1:] if path[0] == "params" else path
    leaf = "weight" if leaf in ("kernel", "scale", "embedding") else leaf
    return canonical_name(".".join((*parents, leaf)))


def export_huggingface(config: ModelConfig, model: OPT | nnx.State) -> dict[str, np.ndarray]:
    """Copy the model's parameters to the host under torch names, shapes and layout.

    A tied `lm_head.weight` is left out, as transformers does when it saves safetensors. One stack of layers
    is on the host at a time besides the result.

    Raises:
        ValueError: the parameters do not fit `config`.
    """
    state = nnx.state(model, nnx.Param) if isinstance(model, OPT) else model
    flat = dict(nnx.to_flat_state(state))
    wanted = slots(config)
    result: dict[str, np.ndarray] = {}
    for path in {slot.path: None for slot in wanted.values()}:
        if path not in flat:
            raise ValueError(f"the model has no parameter {_dotted(path)} that its config asks for")
        parameter = np.asarray(_value(flat.pop(path)))
        for slot in (s for s in wanted.values() if s.path == path):
            part = parameter if slot.layer is None else parameter[slot.layer]
            if part.shape != slot.shape:
                raise ValueError(f"{_dotted(path)} has shape {part.shape}, but its config asks for {slot.shape}")
            result[slot.name] = slot.to_torch(part)
    if flat:
        raise ValueError(f"the model has parameters that its config does not: {sorted(map(_dotted, flat))}")
    return {name: result[name] for name in wanted}


def _dotted(path: Iterable[Any]) -> str:
    return ".".join(map(str, path))


def _value(leaf: Any) -> Any:
    return leaf[...] if isinstance(leaf, nnx.Variable) else leaf


def _embedding_slots(config: ModelConfig) -> list[Slot]:
    D, E, V = config.hidden_size, config.word_embed_proj_dim, config.vocab_size
    rows = config.max_position_embeddings + POSITION_OFFSET
    found = [
        Slot(EMBEDDING_NAME, ("embed_tokens", "embedding"), None, Layout.TABLE, (V, E), (V, E)),
        Slot(
            f"{_BASE}embed_positions.weight",
            ("embed_positions", "embedding"),
            None,
            Layout.TABLE,
            (rows, D),
            (rows, D),
        ),
    ]
    if E != D:
        found.append(Slot(f"{_BASE}project_in.weight", ("project_in", "kernel"), None, Layout.LINEAR, (E, D), (E, D)))
        found.append(Slot(f"{_BASE}project_out.weight", ("project_out", "kernel"), None, Layout.LINEAR, (D, E), (D, E)))
    return found


def _layer_slots(config: ModelConfig, layer: int) -> list[Slot]:
    D, F, N, H = config.hidden_size, config.ffn_dim, config.num_attention_heads, config.head_dim
    found: list[Slot] = []
    for name in ("q_proj", "k_proj", "v_proj"):
        found += _linear(config, f"self_attn.{name}", layer, kernel=(D, N, H), matrix=(D, D), bias=(N, H))
    found += _linear(config, "self_attn.out_proj", layer, kernel=(N, H, D), matrix=(D, D), bias=(D,))
    found += _norm(config, "self_attn_layer_norm", layer)
    found += _linear(config, "fc1", layer, kernel=(D, F), matrix=(D, F), bias=(F,))
    found += _linear(config, "fc2", layer, kernel=(F, D), matrix=(F, D), bias=(D,))
    return found + _norm(config, "final_layer_norm", layer)


def _linear(
    config: ModelConfig,
    module: str,
    layer: int,
    *,
    kernel: tuple[int, ...],
    matrix: tuple[int, int],
    bias: tuple[int, ...],
) -> list[Slot]:
    name, path = f"{_BASE}layers.{layer}.{module}", ("layers", *module.split("."))
    found = [Slot(f"{name}.weight", (*path, "kernel"), layer, Layout.LINEAR, matrix, kernel)]
    if config.enable_bias:
        found.append(Slot(f"{name}.bias", (*path, "bias"), layer, Layout.VECTOR, (matrix[1],), bias))
    return found


def _norm(config: ModelConfig, module: str, layer: int | None) -> list[Slot]:
    if not config.layer_norm_elementwise_affine:
        return []
    width = (config.hidden_size,)
    prefix, path = (_BASE, (module,)) if layer is None else (f"{_BASE}layers.{layer}.", ("layers", module))
    return [
        Slot(f"{prefix}{module}.weight", (*path, "scale"), layer, Layout.VECTOR, width, width),
        Slot(f"{prefix}{module}.bias", (*path, "bias"), layer, Layout.VECTOR, width, width),
    ]
