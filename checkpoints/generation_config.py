"""generation_config.json of a model's folder: the token ids that end a text, and the model's defaults of sampling."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apt_jax.checkpoints.errors import CheckpointError
from apt_jax.files import Unreadable, read_json
from apt_jax.request import SamplingParams

FILE = "generation_config.json"
AUTO, NEUTRAL = "auto", ("none", "vllm")  # values of --generation-config beside a folder
# Those that vLLM takes as defaults of requests, and their names in `SamplingParams`.
SAMPLING_FIELDS = {
    **{name: name for name in ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")},
    "max_new_tokens": "max_tokens",
}


@dataclass(frozen=True)
class GenerationConfig:
    """What one file says: `eos_token_ids` None if it does not; `sampling` are keywords of `SamplingParams`."""

    eos_token_ids: tuple[int, ...] | None = None
    sampling: Mapping[str, float] = field(default_factory=dict)


def read_generation_config(folder: Path, choice: str = AUTO) -> GenerationConfig:
    """The file in `folder`, the model's own, or as `choice` (--generation-config) says.

    auto takes all of it; none and vllm leave its defaults of sampling out; anything else is another folder with such a
    file. Without a file nothing is said.

    Raises:
        CheckpointError: the file is damaged or unreadable, a value is out of its range, or a folder given by name has
            none.
    """
    named = choice not in (AUTO, *NEUTRAL)
    path = (Path(choice).expanduser() if named else folder) / FILE
    try:
        value = read_json(path)
    except FileNotFoundError as error:
        if named:
            message = f"--generation-config {choice}: there is no {path}; give a folder, auto or none"
            raise CheckpointError(message) from error
        return GenerationConfig()
    except Unreadable as error:
        raise CheckpointError(str(error)) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return GenerationConfig(
        _end_ids(path, value.get("eos_token_id")), {} if choice in NEUTRAL else _sampling(path, value)
    )


def _end_ids(path: Path, value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(token_id, int) and not isinstance(token_id, bool) and token_id >= 0 for token_id in ids):
        raise CheckpointError(f"{path}: eos_token_id={value!r} must be a token id or a list of token ids")
    return tuple(dict.fromkeys(ids))


def _sampling(path: Path, value: dict[str, Any]) -> dict[str, float]:
    given = {ours: value[name] for name, ours in SAMPLING_FIELDS.items() if value.get(name) is not None}
    if isinstance(top_k := given.get("top_k"), float) and top_k.is_integer():
        given["top_k"] = int(top_k)
    try:
        SamplingParams(**given)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; correct it, or leave it out with --generation-config none") from error
    return given
