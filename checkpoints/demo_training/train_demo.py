"""Train the bundled demo checkpoint on text that ships with Python.

`python -m apt_jax.checkpoints.demo_training.train_demo`.

It can be stopped at any time; the same command resumes from the last saved state. How the checkpoint in this
repository came about is in `docs/demo_model.md`.
"""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import tyro
from flax import nnx
from tokenizers import Tokenizer
from tqdm import tqdm

from apt_jax.checkpoints.demo_training.batches import TokenStream, encode, window_batch
from apt_jax.checkpoints.demo_training.corpus import Corpus, build_corpus
from apt_jax.checkpoints.demo_training.folder import write_folder
from apt_jax.checkpoints.demo_training.state import Progress, load_state, save_state
from apt_jax.checkpoints.demo_training.steps import make_optimizer, make_step, mean_loss
from apt_jax.checkpoints.demo_training.tokenizer import train_tokenizer
from apt_jax.model_config import ModelConfig
from apt_jax.models.opt import OPT

SHAPE = ModelConfig(
    vocab_size=3072,
    hidden_size=256,
    num_hidden_layers=3,
    ffn_dim=1024,
    max_position_embeddings=1024,
    num_attention_heads=4,
    word_embed_proj_dim=256,
)
WARMUP_STEPS = 100
LONG_SHARE = 0.15  # the last part of training uses windows as long as the context


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How the demo model is trained."""

    out: Path = Path("checkpoints/demo")  # the Hugging Face folder to write
    state: Path = Path(".cache/demo_training")  # where training resumes from
    minutes: float = 60.0  # wall time of the steps; the learning rate follows the share of it that has passed
    steps: int | None = None  # end after this many steps instead, so that a run can be repeated exactly
    muon_rate: float = 4e-3  # learning rate of the layers' matrices
    adam_rate: float = 3e-3  # learning rate of embeddings, biases and norms
    weight_decay: float = 0.1
    rows: int = 8  # windows in a batch
    window: int = 256  # tokens in a window, until the last part
    seed: int = 0
    save_every_minutes: float = 5.0

    def share(self, progress: Progress) -> float:
        """Part of the planned training that is done, 0 to 1."""
        if self.steps is not None:
            return min(1.0, progress.step / self.steps)
        return min(1.0, progress.seconds / (60.0 * self.minutes))


@dataclasses.dataclass(frozen=True)
class Data:
    """The text as the model sees it."""

    corpus: Corpus
    tokenizer: Tokenizer
    train: TokenStream
    held_out: TokenStream


def rate_factor(step: int, share: float) -> float:
    """Factor on the learning rates: linear warm-up, then a cosine down to 2% at the end of the plan."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * (0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * share)))


def train(config: TrainConfig) -> None:
    """Train, or resume training, then write the checkpoint folder."""
    corpus = build_corpus()
    tokenizer = train_tokenizer(corpus.train, SHAPE.vocab_size)
    streams = [encode(tokenizer, texts, config.seed) for texts in (corpus.train, corpus.validation)]
    data = Data(corpus, tokenizer, *streams)
    print(f"{len(data.train.ids)} training tokens, {len(data.held_out.ids)} held out", flush=True)

    graphdef, state = nnx.split(OPT(SHAPE, rngs=nnx.Rngs(config.seed)))
    optimizer = make_optimizer(config.weight_decay)
    (state, slots), progress = load_state(config.state, (state, optimizer.init(state)))
    state = _run(config, data, graphdef, optimizer, state, slots, progress)
    facts = _facts(config, data, graphdef, state, progress)
    write_folder(config.out, SHAPE, state, tokenizer, facts, corpus.license_text)


def _run(
    config: TrainConfig,
    data: Data,
    graphdef: nnx.GraphDef[OPT],
    optimizer: optax.GradientTransformationExtraArgs,
    state: nnx.State,
    slots: Any,
    progress: Progress,
) -> nnx.State:
    """The loop; advances `progress` in place and returns the trained weights."""
    train_step = make_step(graphdef, optimizer, config.muon_rate, config.adam_rate)
    losses: list[float] = []
    saved = progress.seconds
    done = 100.0 * config.share(progress)
    with tqdm(total=100.0, initial=done, unit="%", bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}") as bar:
        while (share := config.share(progress)) < 1.0:
            begin = time.perf_counter()
            ids, first = _batch(config, data.train, progress.step, share)
            factor = rate_factor(progress.step, share)
            state, slots, loss = train_step(state, slots, factor, ids, first)
            losses = [*losses[-99:], float(loss)]
            progress.seconds += time.perf_counter() - begin
            progress.step += 1
            progress.tokens += ids.shape[0] * (ids.shape[1] - 1)
            speed = progress.tokens / progress.seconds
            bar.set_postfix_str(f"step {progress.step} loss {np.mean(losses):.3f} {speed:.0f} tokens/s")
            bar.update(100.0 * config.share(progress) - bar.n)
            if progress.seconds - saved > 60 * config.save_every_minutes:
                saved = progress.seconds
                save_state(config.state, (state, slots), progress)
                held_out = mean_loss(graphdef, state, data.held_out, rows=16, length=config.window)
                bar.write(f"step {progress.step}: training {np.mean(losses):.3f}, held out {held_out:.3f}")
    if losses:
        save_state(config.state, (state, slots), progress)
    return state


def _batch(config: TrainConfig, stream: TokenStream, step: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Short windows first, in the end fewer windows as long as the context."""
    longest = SHAPE.max_position_embeddings
    rows, length = config.rows, config.window
    if share >= 1.0 - LONG_SHARE:
        rows, length = max(2, rows * length // longest), longest
    return window_batch(stream, step=step, seed=config.seed, rows=rows, length=length, max_positions=longest)


def _facts(
    config: TrainConfig, data: Data, graphdef: nnx.GraphDef[OPT], state: nnx.State, progress: Progress
) -> dict[str, Any]:
    """The content of `training.json`; losses are of the final weights in float32, in whole-context windows."""
    part = data.train.head(len(data.held_out.ids))
    trained, held_out = (
        mean_loss(graphdef, state, stream, rows=4, length=SHAPE.max_position_embeddings)
        for stream in (part, data.held_out)
    )
    tokens_per_byte = (len(data.held_out.ids) - 1) / data.held_out.text_bytes
    settings = dataclasses.asdict(config)
    return {
        "training_loss_nats_per_token": trained,
        "validation_loss_nats_per_token": held_out,
        "validation_bits_per_byte": held_out * tokens_per_byte / math.log(2),
        "uniform_loss_nats_per_token": math.log(SHAPE.vocab_size),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state)),
        "steps": progress.step,
        "tokens_seen": progress.tokens,
        "training_minutes": round(progress.seconds / 60, 1),
        "corpus": {
            "python_version": data.corpus.python_version,
            "files_read": data.corpus.files_read,
            "files_left_out": data.corpus.files_left_out,
            "training_documents": len(data.corpus.train),
            "training_bytes": data.train.text_bytes,
            "training_tokens": len(data.train.ids),
            "validation_documents": len(data.corpus.validation),
            "validation_bytes": data.held_out.text_bytes,
            "validation_tokens": len(data.held_out.ids),
        },
        "settings": {name: value for name, value in settings.items() if name not in ("out", "state")},
    }


if __name__ == "__main__":
    train(tyro.cli(TrainConfig))
