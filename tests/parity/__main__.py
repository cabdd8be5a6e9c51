"""Live comparison with transformers: new random models, asked in a Python with torch, compared in this one.

    PYTHONPATH=. python tests/parity/__main__.py [--configs 12] [--seed N] [--torch-python PATH]

PATH is a Python that has torch, transformers, numpy and safetensors; without it, `.venv-parity` is made. That Python
writes the answers to a temporary folder (see `golden/make.py`), which this one then reads.
"""

import argparse
import os
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
from tqdm import tqdm

from tests.golden import Golden, golden_names, load_golden
from tests.golden.compare import LOGITS_TOLERANCE, Difference, compare, load_golden_model
from tests.parity.environment import torch_python

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    """Compare, print one line for each model, and return 0 if all agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", help="a Python that has torch and transformers (default: .venv-parity)")
    parser.add_argument("--configs", type=int, default=12, help="how many random models (default: 12)")
    parser.add_argument("--seed", type=int, help="repeat an earlier run (default: a new one every time)")
    arguments = parser.parse_args()
    seed = secrets.randbelow(1_000_000) if arguments.seed is None else arguments.seed
    python = arguments.torch_python or str(torch_python(ROOT / ".venv-parity"))
    print(f"seed {seed} (repeat with --seed {seed}); transformers answers first", flush=True)
    with tempfile.TemporaryDirectory(prefix="parity-") as scratch:
        answers = Path(scratch) / "answers"
        ask_transformers(python, answers, arguments.configs, seed)
        results = []
        for name in tqdm(golden_names(answers), desc=f"apt-jax on {jax.default_backend()}", disable=None):
            golden = load_golden(name, answers)
            model = load_golden_model(golden, Path(scratch) / name)
            results.append((golden, compare(model, golden)))
    return report(results)


def ask_transformers(python: str, answers: Path, count: int, seed: int) -> None:
    """Have the other Python write `count` golden files to `answers`.

    Raises:
        SystemExit: it could not; its own words are on the terminal by then.
    """
    command = [python, "-m", "tests.golden.make", "--out", str(answers), "--random", str(count), "--seed", str(seed)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    try:
        subprocess.run(command, check=True, env=environment)
    except FileNotFoundError as error:
        raise SystemExit(f"there is no Python at {python}; give --torch-python one with torch") from error
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"transformers did not answer: {python} ended with status {error.returncode}") from error


def report(results: list[tuple[Golden, Difference]]) -> int:
    """Print the table and its summary; 0 if every model agrees, 1 if not."""
    for golden, difference in results:
        verdict = "ok" if difference.acceptable else "DIFFERENT"
        print(f"{golden.name}  logits {difference.logits:.1e}  tokens {_same(golden, difference)}  {verdict}")
        print(f"    {_summary(golden)}")
    worst = max(difference.logits for _, difference in results)
    agreeing = sum(difference.acceptable for _, difference in results)
    versions = ", ".join(f"{name} {version}" for name, version in results[0][0].made_with.items())
    print(
        f"{agreeing} of {len(results)} models agree with {versions}: largest difference of a logit {worst:.1e} "
        f"(at most {LOGITS_TOLERANCE:.0e}), greedy tokens {'all the same' if _all_same(results) else 'DIFFERENT'}"
    )
    return 0 if agreeing == len(results) else 1


def _all_same(results: list[tuple[Golden, Difference]]) -> bool:
    return all(difference.same_tokens for _, difference in results)


def _same(golden: Golden, difference: Difference) -> str:
    """Greedy tokens before the first difference of each prompt, of all."""
    same = total = 0
    for ours, theirs in zip(difference.greedy_tokens, golden.greedy_tokens, strict=True):
        same += next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(theirs))
        total += len(theirs)
    return f"{same}/{total}"


def _summary(golden: Golden) -> str:
    config = golden.config
    sizes = {"D": "hidden_size", "N": "num_attention_heads", "L": "num_hidden_layers", "F": "ffn_dim",
             "E": "word_embed_proj_dim", "V": "vocab_size"}  # fmt: skip
    flags = {
        "post-norm": not config["do_layer_norm_before"],
        "no final norm": config["_remove_final_layer_norm"],
        "no bias": not config["enable_bias"],
        "no affine": not config["layer_norm_elementwise_affine"],
        "untied": not config["tie_word_embeddings"],
    }
    parts = [f"{letter}={config[name]}" for letter, name in sizes.items()] + [config["activation_function"]]
    return " ".join(parts) + ", " + (", ".join(name for name, on in flags.items() if on) or "plain")


if __name__ == "__main__":
    sys.exit(main())
