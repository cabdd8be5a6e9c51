"""What a training run needs to resume after it was stopped."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass
class Progress:
    """How far a run has come, besides weights and optimizer state."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0  # wall time of training steps, over all resumed parts


def save_state(folder: Path, trees: Any, progress: Progress) -> None:
    """Replace the training state in `folder`; a reader never sees half of it."""
    folder.mkdir(parents=True, exist_ok=True)
    leaves = {f"leaf_{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(trees))}
    arrays: dict[str, Any] = {"progress": np.array(dataclasses.astuple(progress)), **leaves}
    partial_file = folder / "partial.npz"
    np.savez(partial_file, **arrays)
    partial_file.replace(folder / "state.npz")


def load_state(folder: Path, trees: Any) -> tuple[Any, Progress]:
    """Read what `save_state` wrote into the structure of `trees`; without a saved state, return `trees`.

    Raises:
        ValueError: the saved shapes are not those of `trees`.
    """
    path = folder / "state.npz"
    if not path.exists():
        return trees, Progress()
    with np.load(path) as saved:
        expected, structure = jax.tree.flatten(trees)
        found = [saved[f"leaf_{i}"] for i in range(len(saved.files) - 1)]
        step, tokens, seconds = saved["progress"]
    if [leaf.shape for leaf in found] != [leaf.shape for leaf in expected]:
        raise ValueError(f"{path} belongs to another model shape: remove the folder or name another --state")
    leaves = [jnp.asarray(leaf, like.dtype) for leaf, like in zip(found, expected, strict=True)]
    return jax.tree.unflatten(structure, leaves), Progress(int(step), int(tokens), float(seconds))
