"""guidellm: a benchmark of 20 requests with synthetic prompts."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

url, demo = sys.argv[1], sys.argv[3]
with tempfile.TemporaryDirectory() as name:
    command = [
        str(Path(sys.executable).parent / "guidellm"), "run",
        "--backend", f"kind=openai_http,target={url},model=apt-jax-demo", "--profile", "kind=concurrent,streams=4",
        "--constraint", "kind=max_requests,count=20", "--tokenizer", f"kind=huggingface_auto,model={demo}",
        "--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=16", "--output", "kind=json,path=out.json",
        "--disable-console",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=name, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    (benchmark,) = json.loads((Path(name) / "out.json").read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert totals["successful"] == 20 and not totals["errored"], totals
print(f"{totals['successful']} of {totals['total']} requests, 4 at once, synthetic prompts")
