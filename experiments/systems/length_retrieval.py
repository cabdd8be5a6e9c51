"""How well output lengths are foretold, on real outputs: `python -m experiments.systems.length_retrieval`.

The demo model continues beginnings of Python's documentation and code, sampled at temperature 1, to their end.
Lengths of the last prompts are foretold from the earlier ones by the history, by retrieval as the engine does it, from
the model's hidden states after prompts, and by another answer to the same prompt: what the prompt says about the length
at all. `--cost` measures instead what retrieval costs an engine.
"""

import argparse
import random
import time
from collections.abc import Sequence

import numpy as np

from apt_jax.checkpoints.demo_training.corpus import build_corpus
from apt_jax.engine.engine import Engine
from apt_jax.request import FinishReason, Request, SamplingParams
from apt_jax.scheduling.length import LengthPredictor
from apt_jax.scheduling.policies.catalogue import make_policy
from apt_jax.scheduling.policies.papers.length_by_retrieval import RetrievalPredictor
from apt_jax.serve.llm import LLM

LONGEST = 400  # tokens of an answer
BEGINNINGS = (8, 64)  # tokens of a prompt, from and to


def prompts_of(llm: LLM, count: int, seed: int) -> list[list[int]]:
    """Beginnings of texts, each of a length of its own."""
    corpus, drawn = build_corpus(), random.Random(seed)
    texts = drawn.sample([*corpus.train, *corpus.validation], count)
    tokenizer = llm.get_tokenizer()
    assert tokenizer is not None
    return [list(tokenizer.encode(text))[: drawn.randint(*BEGINNINGS)] for text in texts]


def lengths_of(llm: LLM, prompts: Sequence[Sequence[int]], seed: int) -> list[int]:
    """Tokens of one answer to each prompt."""
    params = [SamplingParams(temperature=1.0, max_tokens=LONGEST, seed=seed + i) for i in range(len(prompts))]
    results = llm.generate([{"prompt_token_ids": list(p)} for p in prompts], params, use_tqdm=False)
    return [len(result.outputs[0].token_ids) for result in results]


def foretold(
    predictor: LengthPredictor,
    prompts: Sequence[Sequence[int]],
    lengths: Sequence[int],
    known: int,
    states: Sequence[np.ndarray] = (),
) -> list[float]:
    """By a predictor of the engine: it learns the first `known`, and is asked for the others.

    `states` are those after the prompts, for one that retrieves.
    """
    requests = []
    for order, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        request = Request(f"r{order}", list(prompt), SamplingParams(), 0.0, LONGEST)
        request.order = order
        requests.append(request)
        if isinstance(predictor, RetrievalPredictor):
            predictor.saw_prompt(request, states[order])
        if order < known:
            request.output_token_ids = [5] * length
            request.finish_reason = FinishReason.STOP
            predictor.learn(request)
    asked = requests[known:]
    counts = np.array([len(request.prompt_token_ids) for request in asked])
    return predictor.remaining_of(asked, counts, np.zeros(len(asked), np.int64)).tolist()


def states_of(llm: LLM, prompts: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Last hidden states, at length 1."""
    results = llm.encode([{"prompt_token_ids": list(prompt)} for prompt in prompts], use_tqdm=False)
    return [np.array(result.outputs.data, np.float32) for result in results]


def cost(llm: LLM, prompts: Sequence[Sequence[int]], rounds: int = 9) -> str:
    """Seconds of one engine for `prompts` and few tokens each, with retrieval and without, alternately."""
    engine, seconds = llm.engine, dict[str, list[float]]()
    assert isinstance(engine, Engine)
    policies = {name: make_policy(name, engine.policy_context) for name in ("alise:retrieval=off", "alise")}
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    for _ in range(rounds + 1):  # the first makes the memory of finished requests full
        for name, engine.policy in policies.items():
            started = time.perf_counter()
            llm.generate([{"prompt_token_ids": list(p)} for p in prompts], params, use_tqdm=False)
            seconds.setdefault(name, []).append(time.perf_counter() - started)
    found = []
    for name, times in seconds.items():
        low, middle, high = np.percentile(times[1:], (25, 50, 75))
        found.append(f"{name}: median {middle:.3f} s, quartiles {low:.3f} to {high:.3f}")
    return "\n".join(found)


def figures(found: Sequence[float], lengths: Sequence[int]) -> tuple[float, float]:
    """The mean error in tokens, and the share of pairs of answers whose order is right."""
    guess, right = np.array(found), np.array(lengths)
    longer = right[:, None] > right
    order = np.sign(guess[:, None] - guess)[longer]
    return float(np.abs(guess - right).mean()), float((order > 0).mean() + (order == 0).mean() / 2)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1200)
    parser.add_argument("--asked", type=int, default=400, help="of these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cost", action="store_true")
    args = parser.parse_args()
    llm, known = LLM(), args.prompts - args.asked
    prompts = prompts_of(llm, args.prompts, args.seed)
    if args.cost:
        print(cost(llm, prompts))
        return
    lengths, again = (lengths_of(llm, prompts, seed) for seed in (10_000, 20_000))
    right = lengths[known:]
    ended = sum(length < LONGEST for length in lengths) / len(lengths)
    print(f"{len(lengths)} answers, mean {np.mean(lengths):.0f} tokens, median {np.median(lengths):.0f}, "
          f"{ended:.0%} ended by the model")  # fmt: skip
    print("| foretold by | mean error, tokens | pairs in the right order |")
    print("|---|---:|---:|")
    for name, found in (
        ("the median of all", [float(np.median(lengths[:known]))] * args.asked),
        ("history by prompt length", foretold(LengthPredictor(), prompts, lengths, known)),
        (
            "retrieval by hidden states, as the engine does",
            foretold(RetrievalPredictor(LengthPredictor()), prompts, lengths, known, states_of(llm, prompts)),
        ),
        ("another answer to the same prompt", [float(length) for length in again[known:]]),
    ):
        error, order = figures(found, right)
        print(f"| {name} | {error:.0f} | {order:.1%} |")
    llm.close()


if __name__ == "__main__":
    main()
