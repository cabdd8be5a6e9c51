"""What 8-bit weights and caches cost in quality: `python -m experiments.int8.quality [--model opt-125m] [--by-part]`.

Log-probabilities of the demo model's held-out documents (`checkpoints/demo_training/corpus.py`), in chunks over the
cache as an engine does it, against float32 weights with a float32 KV cache: mean absolute difference of the tokens'
log-probabilities, Kullback-Leibler divergence of the whole distributions, perplexity, and the share of positions with
the same most likely token. Also for the same model with planted outliers: some channels of every attention's layer norm
times k and the rows of Wq, Wk and Wv divided by k, which changes nothing in exact arithmetic.

With `--model` the shape of another model with random weights and random documents, whose perplexity says nothing. With
`--by-part` every part of the weights quantised alone.
"""

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from apt_jax.cache import BlockTable, CacheKind, as_cache_dtype
from apt_jax.checkpoints.demo_training.corpus import build_corpus
from apt_jax.checkpoints.load import load_model
from apt_jax.checkpoints.skeleton import Skeleton
from apt_jax.engine.setup import EngineSetup, set_up
from apt_jax.engine_config import EngineConfig
from apt_jax.execution.programs import StepKey
from apt_jax.execution.runner import Runner
from apt_jax.execution.weights.choice import serving_layout
from apt_jax.execution.weights.int8 import PARTS, Int8Choice
from apt_jax.execution.weights.layout import path_of
from apt_jax.model_config import ModelConfig, Quantization
from apt_jax.models.opt import OPT
from apt_jax.request import Request, SamplingParams
from apt_jax.scheduling.state import Span
from apt_jax.tokenization.tokenizer import Tokenizer
from experiments.preset_model import preset_model

CHUNK, LONGEST, RANDOM_LENGTH = 64, 512, 192  # tokens
OUTLIERS = ((0, 1.0), (4, 30.0), (6, 100.0))  # channels of each layer, and their factor
KV, HIDDEN = CacheKind.KV, CacheKind.HIDDEN


@dataclass(frozen=True)
class Setting:
    """What a model's weights and cache are stored as."""

    name: str
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    kind: CacheKind = KV
    cache: str = "auto"
    quantization: Quantization = "none"
    parts: tuple[str, ...] = PARTS


SETTINGS = (
    Setting("float32, KV", "float32"),
    Setting("float32, hidden", "float32", HIDDEN),
    Setting("bf16, KV"),
    Setting("bf16, hidden", kind=HIDDEN),
    Setting("bf16, int8 KV", cache="int8"),
    Setting("bf16, int8 hidden", kind=HIDDEN, cache="int8"),
    Setting("int8, KV", quantization="int8"),
    Setting("int8, hidden", kind=HIDDEN, quantization="int8"),
    Setting("int8, int8 KV", cache="int8", quantization="int8"),
    Setting("int8, int8 hidden", kind=HIDDEN, cache="int8", quantization="int8"),
    Setting("int8-dynamic, KV", quantization="int8-dynamic"),
    Setting("int8-dynamic, int8 KV", cache="int8", quantization="int8-dynamic"),
    Setting("int8-dynamic, int8 hidden", kind=HIDDEN, cache="int8", quantization="int8-dynamic"),
)
BY_PART = (
    SETTINGS[0],
    *(
        Setting(f"{name} {part}", "float32", quantization=name, parts=(part,))
        for name in ("int8", "int8-dynamic")
        for part in PARTS
    ),
)


@dataclass(frozen=True)
class Difference:
    """Of one setting against float32, means over all predicted tokens; KL in nats."""

    logprob: float
    kl: float
    perplexity: float
    agreement: float


def with_outliers(model: OPT, count: int, factor: float) -> OPT:
    """The same function with `count` channels of each attention input times `factor`."""
    graphdef, state = nnx.split(model)
    copied = nnx.merge(graphdef, jax.tree.map(lambda array: array, state))  # parameters of its own, the same arrays
    attention, norm = copied.layers.self_attn, copied.layers.self_attn_layer_norm
    assert norm.scale is not None
    L, D = norm.scale[...].shape
    gain = np.ones((L, D), np.float32)
    for layer in range(L):
        gain[layer, np.random.default_rng(layer).choice(D, count, replace=False)] = factor
    for parameter in (norm.scale, norm.bias):
        assert parameter is not None
        parameter[...] = (parameter[...] * gain).astype(parameter[...].dtype)
    for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
        linear.kernel[...] = (linear.kernel[...] / gain[:, :, None, None]).astype(linear.kernel[...].dtype)
    return copied


def enliven(model: OPT) -> None:
    """Make a random model's queries, keys and logits larger: attention and predictions are nearly uniform else."""
    attention = model.layers.self_attn
    for parameter, factor in (
        (attention.q_proj.kernel, 3), (attention.k_proj.kernel, 3), (model.embed_tokens.embedding, 4),
    ):  # fmt: skip
        parameter[...] = parameter[...] * factor


def make_setup(model: OPT, config: ModelConfig, setting: Setting, tokenizer: Tokenizer | None) -> EngineSetup:
    """The parts of an engine of `model`, which is of float32, in one setting."""
    options = EngineConfig(
        dtype=setting.dtype, cache_dtype=setting.cache, cache_mode=setting.kind.value, num_blocks=128,
        max_num_seqs=1, max_num_batched_tokens=CHUNK, attention_backend="xla", calibrate=False,
    )  # fmt: skip
    leaves = nnx.to_flat_state(nnx.state(model))
    cast = {path_of(path): leaf.get_value().astype(setting.dtype) for path, leaf in leaves}
    model = Skeleton.of(config, jnp.dtype(setting.dtype)).fill(cast)
    layout = serving_layout(
        model, config, np.dtype(jnp.dtype(setting.dtype)), backend="xla", block_size=options.block_size,
        device=jax.devices()[0], cache_dtype=as_cache_dtype(setting.cache),
        int8=Int8Choice.of(model, setting.quantization, setting.parts),
    )  # fmt: skip
    return set_up(layout.lay_out(model), config, options, tokenizer)


def logprobs(setup: EngineSetup, kind: CacheKind, documents: list[list[int]]) -> Iterator[np.ndarray]:
    """Log-probabilities `[T - 1, V]` after every token but the last of each document."""
    runner, pool = setup.runner, setup.state.pool
    assert isinstance(runner, Runner)
    logits = jax.jit(lambda arrays, x: jax.nn.log_softmax(runner.weights.model(arrays).logits(x), axis=-1))
    for ids in documents:
        request = Request("document", ids, SamplingParams(), 0.0, 1)
        request.table = BlockTable(kind)
        found = []
        for start in range(0, len(ids), CHUNK):
            tokens = min(CHUNK, len(ids) - start)
            pool.grow(request.table, start + tokens)
            batch = setup.builder.build([Span(request, start, tokens, samples=False)], prefill=True)
            step = runner.programs[StepKey(batch.bucket, runner.num_blocks)]
            output = step(runner._pool, runner._history, batch.tokens, batch.rows)
            runner._pool, runner._history = output.pool, output.history
            assert output.every is not None
            found.append(np.asarray(logits(runner.weights.outer.arrays, output.every))[:tokens])
        pool.release(request.table)
        request.table = None  # its slot is free
        yield np.concatenate(found)[:-1]


def compare(exact: list[np.ndarray], found: list[np.ndarray], documents: list[list[int]]) -> Difference:
    """The figures of `found` against `exact`."""
    sums = np.zeros(4)
    for p, q, ids in zip(exact, found, documents, strict=True):
        targets = np.array(ids[1:])[:, None]
        own, other = (np.take_along_axis(x, targets, 1)[:, 0] for x in (p, q))
        kl = (np.exp(p) * (p - q)).sum(-1)
        sums += [np.abs(own - other).sum(), kl.sum(), -other.sum(), (p.argmax(-1) == q.argmax(-1)).sum()]
    logprob, kl, loss, agreement = sums / sum(len(ids) - 1 for ids in documents)
    return Difference(logprob, kl, float(np.exp(loss)), agreement)


def main() -> None:
    """Print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=40, help="held-out documents, the longest first")
    parser.add_argument("--model", default=None, help="a model's shape with random weights, instead of the demo model")
    parser.add_argument("--by-part", action="store_true", help="every part of the weights quantised alone, in float32")
    parser.add_argument("--outliers", type=int, nargs="*", default=range(len(OUTLIERS)), help="which of 0, 1, 2")
    args = parser.parse_args()
    tokenizer = None
    if args.model is None:
        loaded = load_model(None, dtype="float32")
        tokenizer = Tokenizer.from_folder(loaded.folder)
        texts = sorted(build_corpus().validation, key=len, reverse=True)[: args.documents]
        documents = [tokenizer.encode(text)[:LONGEST] for text in texts]
    else:
        with tempfile.TemporaryDirectory() as folder:
            loaded = preset_model(args.model, Path(folder), dtype="float32")
        enliven(loaded.model)
        size = args.documents, RANDOM_LENGTH
        documents = np.random.default_rng(0).integers(4, loaded.config.vocab_size, size).tolist()
    print(f"{len(documents)} documents, {sum(map(len, documents))} tokens, chunks of {CHUNK}")
    for count, factor in (OUTLIERS[i] for i in args.outliers):
        print(f"\n{count} channels of each layer times {factor:g}" if count else "\nas it is")
        print("| weights, cache | difference | KL | perplexity | same best |\n|---|---:|---:|---:|---:|")
        model = with_outliers(loaded.model, count, factor)
        exact: list[np.ndarray] = []
        for setting in BY_PART if args.by_part else SETTINGS:
            setup = make_setup(model, loaded.config, setting, tokenizer)
            found = list(logprobs(setup, setting.kind, documents))
            del setup  # a large model's weights fit into memory twice, not three times
            exact = exact or found
            got = compare(exact, found, documents)
            perplexity = "" if tokenizer is None else f"{got.perplexity:.3f}"
            figures = f"{got.logprob:.2e} | {got.kl:.2e} | {perplexity} | {got.agreement:.2%}"
            print(f"| {setting.name} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
