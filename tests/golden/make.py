"""Make golden files with transformers and torch: `PYTHONPATH=. PYTHON -m tests.golden.make [--random N --seed S]`.

Without `--random`, the committed files under `tests/golden/data` are made again. Any Python that has torch,
transformers and safetensors will do; our own package is not imported. Weights whose greedy tokens are a close
call or dull are passed over, so that another correct implementation must give the very same tokens.
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import OPTConfig, OPTForCausalLM
from transformers.activations import ACT2FN

from tests.golden import ACTIVATIONS_FILE, DATA, Golden, save_golden, write_checkpoint
from tests.golden.configs import ACTIVATIONS, FIXED, GREEDY_TOKENS, prompts, random_configs
from tests.golden.weights import fingerprint, make_weights

MIN_MARGIN = 5e-3  # of the best logit over the second; float32 rounding is a hundred times smaller
MIN_MARGIN_RANDOM = 1e-3  # found in fewer tries
MIN_DISTINCT = 20  # different tokens among the greedy tokens of one prompt; fewer if the vocabulary is tiny
SEEDS_TRIED = 100


def main() -> None:
    """Write one golden for every config; print margins, variety and transformers' own rounding error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DATA)
    parser.add_argument("--random", type=int, default=0, metavar="N", help="make N random configs instead")
    parser.add_argument("--seed", type=int, default=0, help="of the random configs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    configs = random_configs(arguments.seed, arguments.random) if arguments.random else FIXED
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not arguments.random:
        ACTIVATIONS_FILE.write_text(activation_values(), encoding="utf-8")
    for name, fields in configs.items():
        min_margin = MIN_MARGIN_RANDOM if arguments.random else MIN_MARGIN
        save_golden(first_good(name, fields, arguments.seed, min_margin), arguments.out)


def first_good(name: str, fields: dict[str, Any], seed: int, min_margin: float) -> Golden:
    """Answers of the first weights that leave no close call and repeat themselves little."""
    enough = min(MIN_DISTINCT, fields["vocab_size"] // 5)
    for weights_seed in range(1000 * seed, 1000 * seed + SEEDS_TRIED):
        golden, model = answer(name, fields, weights_seed)
        distinct = min(len(set(tokens)) for tokens in golden.greedy_tokens)
        if golden.margin >= min_margin and distinct >= enough:
            rounding = rounding_error(model, golden)
            print(
                f"{name:20s} seed {weights_seed}  margin {golden.margin:.1e}  distinct tokens >= {distinct}  "
                f"largest logit {np.abs(golden.logits).max():.1f}  float32 against float64 {rounding:.1e}",
                flush=True,
            )
            return golden
    raise SystemExit(f"{name}: none of {SEEDS_TRIED} seeds gave clear and varied greedy tokens")


def answer(name: str, fields: dict[str, Any], weights_seed: int) -> tuple[Golden, OPTForCausalLM]:
    """Ask transformers; also the model that answered."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        OPTConfig(architectures=["OPTForCausalLM"], dtype="float32", **fields).save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        asked = prompts(config, weights_seed)
        golden = Golden(
            name=name,
            config=config,
            weights_seed=weights_seed,
            weights_sha256=fingerprint(make_weights(config, weights_seed)),
            prompts=asked,
            greedy_tokens=[],
            logits_at=[sample_positions(len(prompt)) for prompt in asked],
            logits=np.zeros((0, config["vocab_size"]), np.float32),
            margin=0.0,
            made_with={"transformers": transformers.__version__, "torch": torch.__version__},
        )
        model = load(write_checkpoint(golden, folder))
    golden = dataclasses.replace(golden, greedy_tokens=[generate(model, prompt) for prompt in asked])
    logits = [forward(model, ids) for ids in golden.sequences]
    golden = dataclasses.replace(
        golden,
        logits=np.concatenate([rows[at] for rows, at in zip(logits, golden.logits_at, strict=True)]),
        margin=min(margin(rows, golden, i) for i, rows in enumerate(logits)),
    )
    return golden, model


def rounding_error(model: OPTForCausalLM, golden: Golden) -> float:
    """How far transformers' own float32 logits are from its float64 ones. Turns the model to float64."""
    model.double()
    exact = [forward(model, ids)[at] for ids, at in zip(golden.sequences, golden.logits_at, strict=True)]
    return float(np.abs(np.concatenate(exact) - golden.logits).max())


def load(folder: Path) -> OPTForCausalLM:
    """Load a folder as a user would, and insist that every tensor was found and used."""
    model, report = OPTForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


@torch.inference_mode()
def generate(model: OPTForCausalLM, prompt: list[int]) -> list[int]:
    """`GREEDY_TOKENS` tokens by `model.generate`, with its own KV cache, never stopping at </s>."""
    ids = torch.tensor([prompt])
    model.generation_config.eos_token_id = None
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=0, max_new_tokens=GREEDY_TOKENS
    )
    return found[0, len(prompt) :].tolist()


@torch.inference_mode()
def forward(model: OPTForCausalLM, ids: list[int]) -> np.ndarray:
    """Logits `[T, V]` of a whole sequence at once, without a cache."""
    return model(torch.tensor([ids]), use_cache=False).logits[0].numpy()


def margin(logits: np.ndarray, golden: Golden, index: int) -> float:
    """Smallest gap of best over second logit while generating; both ways of computing must choose the same."""
    start = len(golden.prompts[index]) - 1
    steps = logits[start : start + GREEDY_TOKENS]
    if steps.argmax(-1).tolist() != golden.greedy_tokens[index]:
        return 0.0  # a close call indeed: generate and the plain forward pass disagree
    best = np.sort(steps, axis=-1)
    return float((best[:, -1] - best[:, -2]).min())


def sample_positions(prompt_tokens: int) -> list[int]:
    """Eight positions or fewer: the ends of prompt and sequence, and some between."""
    last = prompt_tokens + GREEDY_TOKENS - 1
    return sorted(
        {0, prompt_tokens // 2, prompt_tokens - 1, prompt_tokens, *np.linspace(0, last, 5).astype(int).tolist()}
    )


def activation_values() -> str:
    """JSON of every activation function at 65 points, by transformers' names."""
    x = torch.linspace(-8.0, 8.0, 65)
    values = {"x": x.tolist()} | {name: ACT2FN[name](x).tolist() for name in ACTIVATIONS}
    return "{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in values.items()) + "\n}\n"


if __name__ == "__main__":
    main()
