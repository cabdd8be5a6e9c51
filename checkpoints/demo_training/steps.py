"""Optimizer, loss and the jitted training step of the demo model.

Shape letters: B windows in a batch, T tokens in a window.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from flax import nnx

from apt_jax.checkpoints.demo_training.batches import TokenStream, every_window
from apt_jax.models.interface import causal_attention
from apt_jax.models.opt import OPT


def make_optimizer(weight_decay: float) -> optax.GradientTransformationExtraArgs:
    """Muon for the layers' matrices, AdamW for the rest, behind a global-norm clip.

    The two learning rates are hyperparameters of the optimizer's state, set at every step. After 170 equal
    steps of this very training Muon stood at 5.04 nats per token and AdamW alone at 5.31; a step takes 9%
    longer.
    """

    def build(muon_rate: float, adam_rate: float) -> optax.GradientTransformation:
        muon = optax.contrib.muon(
            muon_rate,
            adam_learning_rate=adam_rate,
            adam_b2=0.95,
            weight_decay=weight_decay,
            weight_decay_mask=_decayed,
            muon_weight_dimension_numbers=_matrix_axes,
            consistent_rms=0.2,
        )
        return optax.chain(optax.clip_by_global_norm(1.0), muon)

    return optax.inject_hyperparams(build)(muon_rate=0.0, adam_rate=0.0)


def _decayed(state: nnx.State) -> Any:
    """Weight decay is for the layers' matrices: no embeddings, biases or norms."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _is_kernel(path), state)


def _matrix_axes(state: nnx.State) -> Any:
    """Which axes of a stacked kernel (axis 0 is the layer) are its inputs and which its outputs."""

    def axes(path: tuple[Any, ...], leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        if not _is_kernel(path):
            return None
        inputs = (1, 2) if "out_proj" in jax.tree_util.keystr(path) else (1,)
        outputs = tuple(axis for axis in range(1, leaf.ndim) if axis not in inputs)
        return optax.contrib.MuonDimensionNumbers(inputs, outputs)

    return jax.tree_util.tree_map_with_path(axes, state)


def _is_kernel(path: tuple[Any, ...]) -> bool:
    return "kernel" in jax.tree_util.keystr(path)


def token_losses(graphdef: nnx.GraphDef[OPT], state: nnx.State, ids: jax.Array, first: jax.Array) -> jax.Array:
    """Cross entropy in nats `[B, T]` of `ids [B, T + 1]`, whose rows begin at positions `first [B]`."""
    model: OPT = nnx.merge(graphdef, state)
    positions = first[:, None] + jnp.arange(ids.shape[1] - 1, dtype=jnp.int32)
    hidden, _ = model(ids[:, :-1], positions, causal_attention, None)
    return optax.softmax_cross_entropy_with_integer_labels(model.logits(hidden), ids[:, 1:])


def make_step(
    graphdef: nnx.GraphDef[OPT],
    optimizer: optax.GradientTransformationExtraArgs,
    muon_rate: float,
    adam_rate: float,
) -> Callable[..., tuple[nnx.State, Any, jax.Array]]:
    """Jitted `(weights, slots, factor on the rates, ids, first) -> (weights, slots, loss)`.

    Weights and slots (the optimizer's state) are donated.
    """

    @partial(jax.jit, donate_argnums=(0, 1))
    def train_step(
        state: nnx.State, slots: Any, factor: jax.Array, ids: jax.Array, first: jax.Array
    ) -> tuple[nnx.State, Any, jax.Array]:
        loss, gradients = jax.value_and_grad(lambda s: token_losses(graphdef, s, ids, first).mean())(state)
        slots.hyperparams["muon_rate"] = muon_rate * factor
        slots.hyperparams["adam_rate"] = adam_rate * factor
        updates, slots = optimizer.update(gradients, slots, state)
        return optax.apply_updates(state, updates), slots, loss

    return train_step


def mean_loss(graphdef: nnx.GraphDef[OPT], state: nnx.State, stream: TokenStream, *, rows: int, length: int) -> float:
    """Mean cross entropy (nats per token) of the whole stream, in windows that start at position 0."""
    losses = jax.jit(partial(token_losses, graphdef))
    first = np.zeros(rows, np.int32)
    total = weight = 0.0
    for ids, weights in every_window(stream, rows=rows, length=length):
        total += float((losses(state, ids, first) * weights).sum())
        weight += float(weights.sum())
    return total / weight
