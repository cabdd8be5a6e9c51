"""What an int8 cache costs in quality: `python -m experiments.int8.quality`.

Log-probabilities of the demo model's held-out documents (`checkpoints/demo_training/corpus.py`), in chunks over
the cache as an engine does it, against float32 with a float32 cache: mean absolute difference of the tokens'
log-probabilities, Kullback-Leibler divergence of the whole distributions, perplexity, and the share of positions with
the same most likely token. Also for the same model with planted outliers: some channels of every attention's layer norm
times k and the rows of Wq, Wk and Wv divided by k, which changes nothing in exact arithmetic.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from apt_jax.cache import BlockTable, CacheKind
from apt_jax.checkpoints.demo_training.corpus import build_corpus
from apt_jax.checkpoints.load import load_model
from apt_jax.engine.setup import EngineSetup, set_up
from apt_jax.engine_config import EngineConfig
from apt_jax.execution.programs import StepKey
from apt_jax.execution.runner import Runner
from apt_jax.execution.weights.choice import laid_out
from apt_jax.models.opt import OPT
from apt_jax.request import Request, SamplingParams
from apt_jax.scheduling.state import Span
from apt_jax.tokenization.tokenizer import Tokenizer

CHUNK, LONGEST = 64, 512  # tokens
CACHES = (("auto", CacheKind.KV), ("auto", CacheKind.HIDDEN), ("int8", CacheKind.KV), ("int8", CacheKind.HIDDEN))
OUTLIERS = ((0, 1.0), (4, 30.0), (6, 100.0))  # channels of each layer, and their factor


@dataclass(frozen=True)
class Difference:
    """Of one configuration against float32, means over all predicted tokens; KL in nats."""

    logprob: float
    kl: float
    perplexity: float
    agreement: float


def with_outliers(model: OPT, count: int, factor: float) -> OPT:
    """The same function with `count` channels of each attention input times `factor`."""
    graphdef, state = nnx.split(model)
    copied = nnx.merge(graphdef, jax.tree.map(jnp.copy, state))
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
    args = parser.parse_args()
    loaded = load_model(None, dtype="float32")
    tokenizer = Tokenizer.from_folder(loaded.folder)
    texts = sorted(build_corpus().validation, key=len, reverse=True)[: args.documents]
    documents = [tokenizer.encode(text)[:LONGEST] for text in texts]
    print(f"{len(documents)} documents, {sum(map(len, documents))} tokens, chunks of {CHUNK}")
    for count, factor in OUTLIERS:
        exact: list[np.ndarray] = []
        print(f"\n{count} channels of each layer times {factor:g}" if count else "\nas it is")
        print(f"{'weights':10}{'cache':16}{'|difference|':>14}{'KL':>12}{'perplexity':>12}{'same best':>11}")
        for dtype in ("float32", "bfloat16"):
            for cache, kind in CACHES:
                config = EngineConfig(
                    dtype=dtype, cache_dtype=cache, cache_mode=kind.value, num_blocks=128,
                    max_num_seqs=1, max_num_batched_tokens=CHUNK, attention_backend="xla", calibrate=False,
                )  # fmt: skip
                model = with_outliers(loaded.model, count, factor)
                graphdef, state = nnx.split(model)
                model = nnx.merge(graphdef, jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), state))
                setup = set_up(laid_out(model, loaded.config, config), loaded.config, config, tokenizer)
                found = list(logprobs(setup, kind, documents))
                exact = exact or found
                got = compare(exact, found, documents)
                name = f"{dtype if cache == 'auto' else cache} {kind.value}"
                print(
                    f"{dtype:10}{name:16}{got.logprob:14.2e}{got.kl:12.2e}{got.perplexity:12.3f}{got.agreement:11.2%}"
                )


if __name__ == "__main__":
    main()
