"""The model families that are served: a row for each.

A family is the mathematics (a module in `apt_jax/models/`), how its config.json is read, and which tensor of a
checkpoint fills which parameter. The table stands here, not beside the models: it names the mappings, which are a
matter of checkpoints, and models know nothing of files. Above this folder nothing names a family, and below it only
`execution/forms/native.py` does, for the layers that it calls C++ for.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flax import nnx

from apt_jax.checkpoints.errors import CheckpointError, first_line
from apt_jax.checkpoints.foreign_quantization import refuse_quantized_config, refuse_quantized_folder
from apt_jax.checkpoints.mapping import WeightMapping
from apt_jax.checkpoints.mappings.opt import OPT_MAPPING
from apt_jax.files import Unreadable, read_json
from apt_jax.model_config import ModelConfig
from apt_jax.models.opt import OPT


@dataclass(frozen=True)
class Family:
    """One row.

    Attributes:
        model_type: as config.json and `ModelConfig.model_type` name it.
        parse_config: the mapping of a config.json as a `ModelConfig`, or one of a subclass if the family has fields of
            its own; raises ValueError for what the module cannot honour.
        module: called with that config, `dtype=` and `rngs=`, makes an `nnx.Module` that is a
            `apt_jax.models.interface.Model`.
        mapping: its checkpoints.
    """

    model_type: str
    parse_config: Callable[[Mapping[str, Any]], ModelConfig]
    module: Callable[..., nnx.Module]
    mapping: WeightMapping


FAMILIES: dict[str, Family] = {
    row.model_type: row
    for row in (
        Family("opt", ModelConfig.from_hf, OPT, OPT_MAPPING),
        # the next family
    )
}


def family_of(config: ModelConfig) -> Family:
    """The row of a config that `parse_config` made."""
    return FAMILIES[config.model_type]


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Read the mapping of a config.json.

    Raises:
        ValueError: its family is not served, or cannot honour one of its values.
    """
    model_type = raw.get("model_type")
    row = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if row is None:
        raise ValueError(f"unsupported {model_type=}: use one of {', '.join(sorted(FAMILIES))}")
    refuse_quantized_config(raw)
    config = row.parse_config(raw)
    assert config.model_type == row.model_type
    return config


def read_config(folder: Path) -> ModelConfig:
    """Read config.json in `folder`.

    Raises:
        CheckpointError: it is missing, unreadable or no JSON object, or asks for something that is not supported.
    """
    path = folder / "config.json"
    try:
        raw = read_json(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; {folder} is no model folder") from error
    except Unreadable as error:
        raise CheckpointError(str(error)) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {first_line(error)}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} holds a JSON {type(raw).__name__}, not an object")
    try:
        refuse_quantized_folder(folder)
        return parse_config(raw)
    except ValueError as error:
        raise CheckpointError(f"{path}: {first_line(error)}") from error
