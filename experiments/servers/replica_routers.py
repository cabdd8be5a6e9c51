"""Routers over the same real replicas, one after the other: `python -m experiments.servers.replica_routers`.

Needs Ray. One server with replicas of the demo model; between runs of `apt-jax bench serve` only its router changes,
and prefix caches are emptied, so that figures of one round differ by it, by chance, and by what else the machine does.
With conversations: `--routers pending-time prefix --max-model-len 1024 --num-blocks 800 --request-rate 3
--bench="--dataset conversations:turns=3:system_tokens=180:think_s=2"`.
"""

import json
import shlex
import statistics
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import tyro
import uvicorn

from apt_jax.engine_config import EngineConfig
from apt_jax.routing.catalogue import make_router
from apt_jax.serve.http.app import create_app
from apt_jax.serve.http.server import http_config, listen, url_of
from apt_jax.serve.http.service import Service
from apt_jax.serve.logs import set_up_logs
from apt_jax.serve.options import DEMO_NAME, LoadOptions, ServerOptions
from apt_jax.serve.replicas.backend import ReplicaBackend
from apt_jax.serve.replicas.messages import EngineSpec
from apt_jax.serve.replicas.options import RayOptions, ReplicaOptions
from experiments.servers.client import bench_serve


@dataclass(frozen=True)
class Args:
    """Options of the comparison."""

    replicas: int = 2
    routers: tuple[str, ...] = ("round-robin", "least-requests", "power-of-two", "pending-time")
    rounds: int = 3
    request_rate: float = 14.0
    num_prompts: int = 120
    max_num_seqs: int = 8
    num_blocks: int = 96
    max_model_len: int = 256
    ttft_slo_ms: float = 500.0
    tbt_slo_ms: float = 500.0
    bench: str = "--random-input-len 90 --random-output-len 40 --random-range-ratio 0.9 --cv 2"


def main(args: Args) -> None:
    """Run and print a table: medians over the rounds."""
    set_up_logs()
    config = EngineConfig(
        max_num_seqs=args.max_num_seqs, max_num_batched_tokens=128, num_blocks=args.num_blocks,
        max_model_len=args.max_model_len, compilation_cache_dir=str(Path(".cache/replica_routers").absolute()),
        ttft_slo_ms=args.ttft_slo_ms, tbt_slo_ms=args.tbt_slo_ms,
    )  # fmt: skip
    spec = EngineSpec(None, LoadOptions(), config, DEMO_NAME)
    backend = ReplicaBackend(spec, ReplicaOptions(replicas=args.replicas), RayOptions())
    service = Service(backend, backend.view(DEMO_NAME), DEMO_NAME, ServerOptions(snapshot_file=None))
    listener = listen("127.0.0.1", 0)
    http = uvicorn.Server(http_config(create_app(service), service.options))
    thread = threading.Thread(target=http.run, kwargs={"sockets": [listener]})
    thread.start()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in args.routers}
    try:
        while len(backend.fleet.ready()) < args.replicas:
            time.sleep(0.2)
        bench(url_of(listener), args, seed=0)  # not counted
        for number in range(1, args.rounds + 1):
            for name in args.routers:
                httpx.post(f"{url_of(listener)}/reset_prefix_cache").raise_for_status()
                backend.fleet.router = make_router(name, number)
                figures = bench(url_of(listener), args, seed=number)
                found[name].append(figures)
                print(number, name, json.dumps(figures), flush=True)
    finally:
        http.should_exit = True
        thread.join()
    first = "P99 of first-token times, ms | mean, ms | median, ms"
    head = f"router | attained strictly | by P99 of gaps | prompt tokens cached | {first} | P99 of gaps, ms"
    print(f"| {head} |\n|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, runs in found.items():
        cells = [statistics.median(run[key] for run in runs) for key in runs[0]]
        shown = [f"{cell:.1%}" for cell in cells[:3]] + [f"{cell:.0f}" for cell in cells[3:]]
        print(f"| {' | '.join([name, *shown])} |")


def bench(url: str, args: Args, seed: int) -> dict[str, float]:
    """One run's figures."""
    flags = [
        *("--request-rate", str(args.request_rate), "--num-prompts", str(args.num_prompts), "--seed", str(seed)),
        *("--ttft-slo-ms", str(args.ttft_slo_ms), "--tbt-slo-ms", str(args.tbt_slo_ms), "--ignore-eos"),
        *shlex.split(args.bench),
    ]
    run = bench_serve(url, flags)
    cached = run["total_cached_tokens"] / max(run["total_input_tokens"], 1)
    times = ("p99_ttft_ms", "mean_ttft_ms", "median_ttft_ms", "p99_itl_ms")
    return {
        "strict_attainment": run["strict_attainment"], "attainment": run["attainment"], "cached": cached,
        **{key: run[key] for key in times},
    }  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Args))
