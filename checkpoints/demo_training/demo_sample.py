"""Print text from the demo model, without the engine.

`python -m apt_jax.checkpoints.demo_training.demo_sample "def "`.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import tyro
from flax import nnx
from tokenizers import Tokenizer

from apt_jax.checkpoints.load import load_model
from apt_jax.checkpoints.source import DEMO_FOLDER
from apt_jax.model_config import ModelConfig
from apt_jax.models.linear import AttentionProjections
from apt_jax.models.opt import OPT


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """What to print."""

    prompts: Annotated[tuple[str, ...], tyro.conf.Positional] = ("The ", "def ", "Return the", "import ")
    folder: Path = DEMO_FOLDER
    tokens: int = 120  # prompt and answer together, at most the model's context
    temperature: float = 0.0  # 0 takes the likeliest token
    seed: int = 0


def generate(
    model: OPT, config: ModelConfig, prompt: list[int], tokens: int, temperature: float, seed: int
) -> list[int]:
    """Token ids of the prompt and its continuation, `tokens` in all; the end token does not stop it.

    Raises:
        ValueError: `tokens` is more than the model's context, or less than the prompt.
    """
    if not len(prompt) <= tokens <= config.max_position_embeddings:
        raise ValueError(
            f"tokens={tokens} must lie between the prompt's {len(prompt)} and the context's "
            f"{config.max_position_embeddings}"
        )
    graphdef, state = nnx.split(model)
    given = jnp.array([*prompt, *[-1] * (tokens - len(prompt))], jnp.int32)
    shape = (2, config.num_hidden_layers, tokens, config.num_attention_heads, config.head_dim)
    return _roll_out(graphdef, state, given, shape, temperature, jax.random.key(seed)).tolist()


@partial(jax.jit, static_argnums=(0, 3, 4))
def _roll_out(
    graphdef: nnx.GraphDef[OPT],
    state: nnx.State,
    given: jax.Array,
    shape: tuple[int, ...],
    temperature: float,
    key: jax.Array,
) -> jax.Array:
    """One token at a time over a dense cache `[K or V, L, T, N, H]`; -1 in `given [T]` asks for a token."""
    model: OPT = nnx.merge(graphdef, state)

    def step(carry: tuple[jax.Array, jax.Array], position: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        cache, sampled = carry
        token = jnp.where(given[position] >= 0, given[position], sampled)
        hidden, cache = model(token[None], position[None], partial(_attend, position), cache)
        logits = model.logits(hidden)[0]
        if temperature:
            sampled = jax.random.categorical(jax.random.fold_in(key, position), logits / temperature)
        else:
            sampled = logits.argmax()
        return (cache, sampled.astype(jnp.int32)), token

    start = (jnp.zeros(shape, jnp.float32), jnp.int32(0))
    return jax.lax.scan(step, start, jnp.arange(given.shape[0], dtype=jnp.int32))[1]


def _attend(
    position: jax.Array, projections: AttentionProjections, h: jax.Array, cache: jax.Array, layer: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Attention of the one token `h [1, D]` over all tokens up to its position."""
    cache = cache.at[0, layer, position].set(projections.k_proj(h)[0])
    cache = cache.at[1, layer, position].set(projections.v_proj(h)[0])
    scores = jnp.einsum("nh,snh->ns", projections.query(h)[0], cache[0, layer])
    seen = jnp.arange(cache.shape[2]) <= position
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
    return jnp.einsum("ns,snh->nh", weights, cache[1, layer])[None], cache


def samples(settings: SampleConfig) -> Iterator[str]:
    """Prompt and continuation for each prompt, up to the end token."""
    loaded = load_model(str(settings.folder), dtype="float32")
    config = loaded.config
    tokenizer = Tokenizer.from_file(str(settings.folder / "tokenizer.json"))
    for prompt in settings.prompts:
        ids = tokenizer.encode(prompt).ids
        found = generate(loaded.model, config, ids, settings.tokens, settings.temperature, settings.seed)
        answer = found[len(ids) :]
        ends = [i for i, token in enumerate(answer) if token in config.eos_token_ids]
        yield tokenizer.decode(ids + answer[: ends[0]] if ends else found)


if __name__ == "__main__":
    for text in samples(tyro.cli(SampleConfig)):
        print(text, end="\n\n-----\n")
