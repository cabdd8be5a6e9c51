"""NVIDIA's aiperf: 20 streamed chats with synthetic prompts."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

url, demo = sys.argv[1], sys.argv[3]
with tempfile.TemporaryDirectory() as name:
    command = [
        str(Path(sys.executable).parent / "aiperf"), "profile", "--model", "apt-jax-demo", "--url", url, "--tokenizer", demo,
        "--endpoint-type", "chat", "--streaming", "--concurrency", "4", "--request-count", "20",
        "--synthetic-input-tokens-mean", "32", "--output-tokens-mean", "16", "--extra-inputs", "ignore_eos:true",
        "--extra-inputs", "min_tokens:16", "--ui", "none", "--artifact-dir", name,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=name, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    files = [file for file in Path(name).rglob("*.json") if "profile_export" in file.name and "inputs" not in file.name]
    found = json.loads(files[0].read_text())
    count = (found.get("request_count") or found["records"]["request_count"])["avg"]
    errors = (found.get("error_request_count") or {"avg": 0})["avg"]
    assert count == 20 and not errors, found
print(f"{count:g} of 20 streamed chats")
