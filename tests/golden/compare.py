"""Compares a model on JAX with the answers of transformers, without any cache: the plain causal forward pass."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from apt_jax.checkpoints.load import load_model
from apt_jax.models.interface import causal_attention
from apt_jax.models.opt import OPT
from tests.golden import Golden, write_checkpoint

LOGITS_TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far our answers are from transformers'."""

    logits: float  # largest absolute difference at the golden positions
    greedy_tokens: list[list[int]]  # ours, generated step by step from the prompts
    same_tokens: bool

    @property
    def acceptable(self) -> bool:
        """Whether the logits are within 1e-4 and every greedy token is the same."""
        return self.logits <= LOGITS_TOLERANCE and self.same_tokens


def load_golden_model(golden: Golden, folder: Path) -> OPT:
    """Write the golden's checkpoint to `folder` and load it as a server would, in float32."""
    return load_model(str(write_checkpoint(golden, folder)), dtype="float32").model


def compare(model: OPT, golden: Golden) -> Difference:
    """Run a float32 model on the golden prompts; compiles one program."""
    forward = whole_sequences(model, max(map(len, golden.sequences)))
    rows = forward(golden.sequences)
    ours = np.concatenate([rows[i, at] for i, at in enumerate(golden.logits_at)])
    tokens = greedy(forward, golden.prompts, golden.greedy_tokens)
    error = float(np.abs(ours - golden.logits).max())
    return Difference(error, tokens, tokens == golden.greedy_tokens)


type Forward = Callable[[Sequence[Sequence[int]]], np.ndarray]


def whole_sequences(model: OPT, length: int) -> Forward:
    """Return a function from token ids of several sequences to logits `[B, length, V]`, padded on the right."""
    graphdef, state = nnx.split(model)
    run = _program(graphdef)

    def forward(sequences: Sequence[Sequence[int]]) -> np.ndarray:
        ids = np.zeros((len(sequences), length), np.int32)
        for row, sequence in zip(ids, sequences, strict=True):
            row[: len(sequence)] = sequence
        return np.asarray(run(state, ids))

    return forward


@functools.cache
def _program(graphdef: nnx.GraphDef) -> Callable[[nnx.State, np.ndarray], jax.Array]:
    """One jitted function per architecture, so that the same model with other weights compiles nothing."""

    @jax.jit
    def run(state: nnx.State, ids: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, state)
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
        hidden, _ = model(ids, positions, causal_attention, None)
        return model.logits(hidden)

    return run


def greedy(forward: Forward, prompts: Sequence[Sequence[int]], drafts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Generate as many tokens after each prompt as its draft has, the likeliest every time.

    A draft is only a guess that saves steps: one pass over prompt and draft gives the likeliest token after each
    prefix, which is the greedy choice up to the first token where the draft was wrong. From there the pass is
    repeated with its own tokens as the draft, so every pass settles at least one token more.
    """
    sequences = [[*prompt, *draft] for prompt, draft in zip(prompts, drafts, strict=True)]
    while True:
        rows = forward(sequences)
        settled = True
        for i, (prompt, sequence) in enumerate(zip(prompts, sequences, strict=True)):
            chosen = [*prompt, *rows[i, len(prompt) - 1 : len(sequence) - 1].argmax(-1).tolist()]
            settled &= chosen == sequence
            sequences[i] = chosen
        if settled:
            return [sequence[len(prompt) :] for sequence, prompt in zip(sequences, prompts, strict=True)]
