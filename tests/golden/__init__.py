"""What transformers' `OPTForCausalLM` answers for small models of every variant, and those models' checkpoints.

The answers are files under `data/`, made by `golden/make.py`; the weights are made again from a seed.
Needs numpy and safetensors only, so that it also runs beside torch in another Python.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.golden.weights import fingerprint, make_weights

DATA = Path(__file__).parent / "data"
ACTIVATIONS_FILE = Path(__file__).parent / "activations.json"  # values of the activation functions at a few points


@dataclasses.dataclass(frozen=True)
class Golden:
    """One model and transformers' float32 answers to a few prompts."""

    name: str
    config: dict[str, Any]  # the contents of config.json, as transformers wrote it
    weights_seed: int
    weights_sha256: str
    prompts: list[list[int]]
    greedy_tokens: list[list[int]]  # for each prompt, as many tokens whatever they are (no stop at </s>)
    logits_at: list[list[int]]  # for each prompt, positions in prompt + greedy tokens, in order
    logits: np.ndarray  # float32 [all positions, V]: the rows of `logits_at`, prompt after prompt
    margin: float  # smallest gap between the best and the second logit over all greedy steps
    made_with: dict[str, str]

    @property
    def sequences(self) -> list[list[int]]:
        """Each prompt followed by its greedy tokens."""
        return [prompt + tokens for prompt, tokens in zip(self.prompts, self.greedy_tokens, strict=True)]


def golden_names(folder: Path = DATA) -> list[str]:
    """Names of the models in `folder`, sorted."""
    return sorted(path.stem for path in folder.glob("*.json"))


def load_golden(name: str, folder: Path = DATA) -> Golden:
    """Read one model's answers."""
    fields = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return Golden(name=name, logits=np.load(folder / f"{name}.npy", allow_pickle=False), **fields)


def save_golden(golden: Golden, folder: Path) -> None:
    """Write `NAME.json` and `NAME.npy`; lists of numbers stay on one line."""
    fields = {f.name: getattr(golden, f.name) for f in dataclasses.fields(golden) if f.name not in ("name", "logits")}
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in fields.items()]
    (folder / f"{golden.name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    np.save(folder / f"{golden.name}.npy", golden.logits)


def write_checkpoint(golden: Golden | str, folder: Path) -> Path:
    """Write the model as a Hugging Face folder: `config.json` and `model.safetensors`, no tokenizer.

    Returns:
        `folder`, made if it was not there.

    Raises:
        ValueError: the weights are not those that the answers were made from.
    """
    golden = load_golden(golden) if isinstance(golden, str) else golden
    weights = make_weights(golden.config, golden.weights_seed)
    if fingerprint(weights) != golden.weights_sha256:
        raise ValueError(f"the weights of {golden.name} changed; make the golden files again with golden/make.py")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(golden.config, indent=2), encoding="utf-8")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
