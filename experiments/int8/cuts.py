"""How many requests get other tokens where chunks end elsewhere: `python -m experiments.int8.cuts [--backend xla]`.

Each request is run with its prompt in one chunk, and again with chunks of random sizes beside other requests, preempted
once at a random length. Computed in float32, greedy, over each kind of cache; prompts are the begins of the demo
model's held-out documents, and random ids for small random models. Prints how many requests differ.
"""

import argparse
from collections.abc import Sequence
from typing import Literal

import jax
import numpy as np
from flax import nnx

from apt_jax.batching import buckets
from apt_jax.cache import CacheKind
from apt_jax.checkpoints.demo_training.corpus import build_corpus
from apt_jax.checkpoints.load import load_model
from apt_jax.engine.engine import Engine
from apt_jax.engine.setup import set_up
from apt_jax.engine_config import EngineConfig
from apt_jax.execution.weights.choice import laid_out
from apt_jax.model_config import ModelConfig, Quantization
from apt_jax.models.opt import OPT
from apt_jax.request import Request, SamplingParams
from apt_jax.scheduling.plan import Plan, Preempted, Reason, Scheduled
from apt_jax.scheduling.state import SchedulerState
from apt_jax.tokenization.tokenizer import Tokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
ROWS, TOKENS = 8, 256
type Backend = Literal["native", "xla"]
WEIGHTS = 0.2  # standard deviation of what is added to a random model's weights
SETTINGS: tuple[tuple[str, Quantization], ...] = (("auto", "none"), ("int8", "none"), ("int8", "int8-dynamic"))


class RandomCuts:
    """A policy for one kind of cache: whole prompts, or with `rng` random parts of them and random preemptions."""

    def __init__(self, kind: CacheKind, rng: np.random.Generator | None = None):
        self.kind, self.rng = kind, rng
        self.preempt_at: dict[str, int] = {}

    def schedule(self, state: SchedulerState, now: float) -> Plan:
        """A plan; see `apt_jax.scheduling.policies`."""
        decodes = [r for r in state.running if r.is_decoding and not r.is_exhausted]
        preempted = [r for r in decodes if len(r.output_token_ids) == self.preempt_at.get(r.request_id)]
        for request in preempted:
            del self.preempt_at[request.request_id]
        left = [Scheduled(r, 1, self.kind, Reason.DECODES) for r in decodes if r not in preempted]
        free, budget, seats = state.pool.num_free, TOKENS - len(left), ROWS - len(state.running)
        prefills = []
        for request in (*state.running, *state.waiting):
            if request.is_decoding or request.is_exhausted or budget <= 0 or free <= 0:
                continue
            seats -= request.table is None
            if seats < 0:
                break
            tokens = min(budget, request.num_uncomputed_tokens)
            if self.rng is not None:
                tokens = int(self.rng.integers(1, tokens + 1))
                self.preempt_at.setdefault(request.request_id, int(self.rng.integers(1, GREEDY.max_tokens)))
            elif tokens < request.num_uncomputed_tokens:
                break
            budget -= tokens
            prefills.append(Scheduled(request, tokens, self.kind, Reason.CONTINUES_PREFILL))
        gone = tuple(Preempted(request, Reason.PREEMPTED_NO_BLOCKS) for request in preempted)
        return Plan(scheduled=(*left, *prefills), preempted=gone)

    def finished(self, request: Request, now: float) -> None:
        """Nothing to do."""


def answers(engine: Engine, policy: RandomCuts, prompts: Sequence[list[int]]) -> list[list[int]]:
    """What all requests generate."""
    engine.policy = policy
    requests = [engine.add(prompt, GREEDY, request_id=str(i)) for i, prompt in enumerate(prompts)]
    while engine.has_unfinished:
        engine.step()
    return [request.output_token_ids for request in requests]


def compare(
    model: OPT, config: ModelConfig, tokenizer: Tokenizer | None, prompts: Sequence[list[int]], backend: Backend
) -> dict[str, tuple[int, int]]:
    """Requests that differ, and all of them, by setting and kind."""
    found = {}
    for cache, quantization in SETTINGS:
        options = EngineConfig(
            dtype="float32", attention_backend=backend, max_num_seqs=ROWS, max_num_batched_tokens=TOKENS,
            num_blocks=600, enable_prefix_caching=False, calibrate=False, cache_dtype=cache, quantization=quantization,
        )  # fmt: skip
        engine = Engine(set_up(laid_out(model, config, options), config, options, tokenizer))
        for kind in CacheKind:
            whole = answers(engine, RandomCuts(kind), prompts)
            cut = answers(engine, RandomCuts(kind, np.random.default_rng(0)), prompts)
            different = sum(a != b for a, b in zip(whole, cut, strict=True))
            found[f"weights {quantization}, cache {cache}, {kind.value}"] = different, len(prompts)
            print(f"weights {quantization}, cache {cache}, {kind.value}: {different} of {len(prompts)}", flush=True)
    return found


def random_model(seed: int) -> tuple[OPT, ModelConfig, list[list[int]]]:
    """A model of random shape, and prompts of 1 to 150 tokens for it."""
    rng = np.random.default_rng(seed)
    heads, head_dim = int(rng.integers(2, 5)), int(rng.choice([16, 32, 48]))
    D = heads * head_dim
    config = ModelConfig(
        vocab_size=500, hidden_size=D, num_hidden_layers=int(rng.integers(2, 5)), ffn_dim=4 * D,
        max_position_embeddings=256, num_attention_heads=heads, word_embed_proj_dim=D, eos_token_ids=(),
    )  # fmt: skip
    model = OPT(config, rngs=nnx.Rngs(seed))
    nnx.update(model, jax.tree.map(lambda a: a + WEIGHTS * rng.standard_normal(a.shape, np.float32), nnx.state(model)))
    return model, config, [rng.integers(0, 500, int(rng.integers(1, 151))).tolist() for _ in range(50)]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("native", "xla"), default="native", help="what attends")
    parser.add_argument("--documents", type=int, default=200, help="prompts for the demo model")
    parser.add_argument("--models", type=int, default=4, help="random models, of 50 prompts each")
    args = parser.parse_args()
    buckets.ladder = lambda smallest, largest: [largest]  # few shapes to compile
    loaded = load_model(None, dtype="float32")
    tokenizer = Tokenizer.from_folder(loaded.folder)
    rng = np.random.default_rng(0)
    texts = sorted(build_corpus().validation, key=len, reverse=True)[: args.documents]
    prompts = [tokenizer.encode(text)[: int(rng.integers(1, 151))] for text in texts]
    trained = compare(loaded.model, loaded.config, tokenizer, prompts, args.backend)
    others = []
    for seed in range(args.models):
        model, config, own = random_model(seed)
        others.append(compare(model, config, None, own, args.backend))
    print(f"requests with other tokens, {args.backend}\n| | demo model | random models |\n|---|---:|---:|")
    for name, (different, count) in trained.items():
        sums = [sum(each[name][i] for each in others) for i in (0, 1)]
        print(f"| {name} | {different} of {count} | {sums[0]} of {sums[1]} |")


if __name__ == "__main__":
    main()
