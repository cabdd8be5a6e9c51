"""A Hugging Face folder of an OPT size by name, without weights: `--load-format dummy` serves it."""

import json
from pathlib import Path

from apt_jax.checkpoints.load import Loaded, load_model
from apt_jax.model_config import ModelConfig
from apt_jax.scheduling.costs.hardware import MODELS, by_name


def write_config(folder: Path, config: ModelConfig) -> Path:
    """Write `config.json` for `config` into `folder`; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_hf(), indent=1) + "\n", encoding="utf-8")
    return folder


def preset_model(name: str, folder: Path, *, dtype: str, seed: int = 0) -> Loaded:
    """Random weights of the OPT size `name`, its configuration written into `folder`."""
    config = by_name(MODELS, name, "model")
    return load_model(str(write_config(folder, config)), load_format="dummy", dtype=dtype, seed=seed)
