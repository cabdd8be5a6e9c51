"""What a batch costs those who wait: `python -m experiments.servers.batch_behind`.

One server of the demo model; `apt-jax bench serve` sends it the same requests alternately with nothing else to do and
with a batch of `--lines` requests behind (OpenAI's Batch API). Prints strict attainment, times, and what of the batch
was answered meanwhile.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import openai
import tyro
import uvicorn

from apt_jax.engine_config import EngineConfig
from apt_jax.serve.batch.store import BatchStore
from apt_jax.serve.batch.worker import BatchWorker
from apt_jax.serve.http.app import create_app
from apt_jax.serve.http.server import http_config, listen, url_of
from apt_jax.serve.http.service import Service
from apt_jax.serve.logs import set_up_logs
from apt_jax.serve.options import DEMO_NAME, ServerOptions
from apt_jax.serve.runtime.build import build_engine
from apt_jax.serve.runtime.engine_thread import EngineThread
from experiments.servers.client import bench_serve


@dataclass(frozen=True)
class Args:
    """Options of the comparison."""

    lines: int = 2000
    rounds: int = 2
    policy: str = "apt"
    request_rate: float = 6.0
    num_prompts: int = 120
    max_num_seqs: int = 16
    num_blocks: int = 160
    ttft_slo_ms: float = 500.0
    tbt_slo_ms: float = 200.0
    bench: str = "--random-input-len 60 --random-output-len 40 --random-range-ratio 0.9"


def main(args: Args) -> None:
    """Run and print a line for each."""
    set_up_logs()
    with tempfile.TemporaryDirectory() as folder, _server(args, Path(folder)) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        body = {"prompt": "def read_file(path):", "max_tokens": 60, "ignore_eos": True}
        lines = [
            json.dumps({"custom_id": str(k), "method": "POST", "url": "/v1/completions", "body": {**body, "seed": k}})
            for k in range(args.lines)
        ]
        file = client.files.create(file=("in.jsonl", "\n".join(lines).encode()), purpose="batch")
        for seed in range(args.rounds):
            for behind in (False, True):
                batch = None
                if behind:
                    batch = client.batches.create(
                        input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
                    )
                    while client.batches.retrieve(batch.id).status == "validating":
                        time.sleep(0.05)
                found = bench_serve(url, _flags(args, seed))
                done = 0
                if batch is not None:
                    done = client.batches.retrieve(batch.id).request_counts.completed  # type: ignore[union-attr]
                    client.batches.cancel(batch.id)
                    while client.batches.retrieve(batch.id).status == "cancelling":
                        time.sleep(0.05)
                print(
                    f"{args.policy}, seed {seed}, {'batch behind' if behind else 'alone':12}: "
                    f"{found['strict_attainment']:.1%} strictly, worst class "
                    f"{min(c['strict_attainment'] for cs in found['attainment_by_class'].values() for c in cs):.1%}, "
                    f"p99 TTFT {found['p99_ttft_ms']:.0f} ms, p99 gap {found['p99_itl_ms']:.0f} ms, "
                    f"longest gap {found['longest_gap_ms']:.0f} ms, {done} lines of the batch in "
                    f"{found['duration']:.0f} s",
                    flush=True,
                )


def _flags(args: Args, seed: int) -> list[str]:
    return [
        *args.bench.split(), "--request-rate", str(args.request_rate), "--num-prompts", str(args.num_prompts),
        "--seed", str(seed), "--ignore-eos",
        "--ttft-slo-ms", str(args.ttft_slo_ms), "--tbt-slo-ms", str(args.tbt_slo_ms),
    ]  # fmt: skip


@contextmanager
def _server(args: Args, folder: Path) -> Iterator[str]:
    config = EngineConfig(
        max_num_seqs=args.max_num_seqs, max_num_batched_tokens=128, num_blocks=args.num_blocks, max_model_len=256,
        scheduling_policy=args.policy, compilation_cache_dir=str(Path(".cache/batch_behind").absolute()),
    )  # fmt: skip
    thread = EngineThread(lambda: build_engine(None, engine_config=config))
    service = Service.of_engine(thread, DEMO_NAME, ServerOptions(snapshot_file=None))
    store = BatchStore(folder)
    service.batches = BatchWorker(store, thread.submit, service.served_model, service.off_loop)
    listener = listen("127.0.0.1", 0)
    http = uvicorn.Server(http_config(create_app(service), service.options))
    runner = Thread(target=http.run, kwargs={"sockets": [listener]})
    runner.start()
    try:
        while service.status != "ready":
            time.sleep(0.1)
        yield url_of(listener)
    finally:
        http.should_exit = True
        runner.join(20)
        listener.close()
        store.close()


if __name__ == "__main__":
    main(tyro.cli(Args))
