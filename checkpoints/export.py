"""Copies a model's parameters to the host as a Hugging Face checkpoint holds them."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from flax import nnx

from apt_jax.checkpoints.families import family_of
from apt_jax.model_config import ModelConfig


def export_huggingface(config: ModelConfig, model: nnx.Module | nnx.State) -> dict[str, np.ndarray]:
    """Copy the model's parameters to the host under torch names, shapes and layout.

    A tied `lm_head.weight` is left out, as transformers does when it saves safetensors. One stack of layers
    is on the host at a time besides the result.

    Raises:
        ValueError: the parameters do not fit `config`.
    """
    state = nnx.state(model, nnx.Param) if isinstance(model, nnx.Module) else model
    flat = dict(nnx.to_flat_state(state))
    wanted = family_of(config).mapping.slots(config)
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
