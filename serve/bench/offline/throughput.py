"""`apt-jax bench throughput`: many requests through the engine, without HTTP, as fast as possible."""

import time
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from apt_jax.engine.interface import ServingEngine
from apt_jax.files import check_writable
from apt_jax.progress import is_hidden
from apt_jax.serve.bench.offline.measure import Tally, checked, open_engine, samples_of, write_result
from apt_jax.serve.bench.offline.options import BenchThroughput
from apt_jax.serve.bench.work import Work, check_dataset, load_dataset, make_work
from apt_jax.serve.runtime.driver import Driver
from apt_jax.simulation.requests.conversations import Conversations


def run(args: BenchThroughput) -> int:
    """Run the command.

    Raises:
        ValueError: a flag has a bad value, or a request cannot be served; one sentence.
    """
    check_writable(args.output, "--output")
    check_dataset(args.work)
    if Conversations.parse(args.work.dataset) is not None:
        raise ValueError(f"dataset={args.work.dataset}: turns wait for answers; measure a server, with bench serve")
    engine = open_engine(args.model, args.load, args.engine)
    works = token_works(args, engine)
    engine.warm_up(progress=True)
    figures = measure(engine, works, temperature=args.temperature)
    print(
        f"{len(works)} requests in {figures['elapsed_time']:.2f} s: {figures['requests_per_second']:.3g} requests/s, "
        f"{figures['tokens_per_second']:.1f} total and {figures['output_tokens_per_second']:.1f} output tokens/s"
    )
    print(
        f"{figures['iterations']} iterations of {figures['mean_batch']:.1f} requests on average, "
        f"{figures['padding']:.1%} of the token slots were padding"
    )
    print(
        f"cache of {figures['num_blocks']} blocks: {figures['mean_kv_usage']:.1%} KV and "
        f"{figures['mean_hidden_usage']:.1%} hidden on average, at most {figures['peak_cache_usage']:.1%} in use, "
        f"{figures['preemptions']} preemptions, {figures['conversions']} conversions"
    )
    write_result(args.output, args, figures)
    return 0


def token_works(args: BenchThroughput, engine: ServingEngine) -> list[Work]:
    """The requests, with token ids as prompts.

    Raises:
        ValueError: the dataset cannot be read, needs a tokenizer, or does not fit; one sentence.
    """
    seed, tokenizer = args.engine.seed, engine.tokenizer
    dataset = load_dataset(args.work, seed=seed, tokenizer=tokenizer, max_model_len=engine.max_model_len)
    rows = dataset.rows(args.work.num_prompts, seed=seed)
    vocab_size = min(args.work.vocab_size, engine.model_config.vocab_size)
    works = make_work(dataset, rows.tolist(), vocab_size=vocab_size, tokenizer=None, seed=(seed, 3))
    if tokenizer is None:
        return works
    return [
        replace(work, prompt=tokenizer.encode(work.prompt)) if isinstance(work.prompt, str) else work for work in works
    ]


def measure(engine: ServingEngine, works: list[Work], *, temperature: float = 0.0) -> dict[str, Any]:
    """Serve `works` (prompts as token ids) to the end; vLLM's names where it has the figure.

    Raises:
        ValueError: the engine refused a request.
        RuntimeError: it failed on one.
    """
    tally = Tally(engine)
    output_tokens = 0
    samples = samples_of(works, temperature=temperature, prefix="throughput-")
    started = time.perf_counter()
    with tqdm(total=len(samples), desc="requests", unit="request", disable=is_hidden()) as bar:
        for _, answer in Driver(engine, tally.add).run(samples):
            output = checked(answer)
            output_tokens += len(output.token_ids)
            if output.finish_reason is not None:
                bar.update()
    seconds = time.perf_counter() - started
    total_tokens = output_tokens + sum(work.prompt_tokens for work in works)
    return {
        "elapsed_time": seconds,
        "num_requests": len(works),
        "total_num_tokens": total_tokens,
        "total_output_tokens": output_tokens,
        "requests_per_second": len(works) / seconds,
        "tokens_per_second": total_tokens / seconds,
        "output_tokens_per_second": output_tokens / seconds,
        **tally.figures(),
    }
