"""Structured outputs by several libraries on one collection of JSON schemas with instances, such as JSONSchemaBench's.

    python -m experiments.peers.grammars FOLDER --tokenizer tokenizer.json --library llguidance xgrammar=PYTHON

FOLDER holds JSON files, each with `schema` and `tests`, of which those that are `valid` have their `data` followed. A
library comes with the interpreter that has it, else this one. Each has a process, which is ended and counted if a
schema takes longer than --limit seconds.
"""

import argparse
import json
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np

WORKER = Path(__file__).parent / "workers" / "grammar_worker.py"
MAX_TOKENS = 400  # of an instance; longer ones are left out


class Worker:
    """A process that follows schemas with one library."""

    def __init__(self, name: str, tokenizer: Path, eos: int):
        self.name, _, python = name.partition("=")
        self._command = [python or sys.executable, str(WORKER), self.name, str(tokenizer), str(eos)]
        self._process: subprocess.Popen[str] | None = None

    def follow(self, schema: str, texts: list[list[int]], limit_s: float) -> dict[str, Any]:
        """The worker's answer; {"timeout": True} if it takes too long or ends."""
        if self._process is None:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            assert self._process.stdout is not None
            if not self._process.stdout.readline():
                raise SystemExit(f"{self.name} cannot be started: {' '.join(self._command)}")
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps({"schema": schema, "texts": texts}) + "\n")
        process.stdin.flush()
        timer = threading.Timer(limit_s, process.kill)
        timer.start()
        line = process.stdout.readline()
        timer.cancel()
        if line:
            return dict(json.loads(line))
        process.wait()
        self._process = None
        return {"timeout": True}


def main() -> None:
    """Measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--eos", type=int, default=2)
    parser.add_argument("--library", nargs="+", default=["llguidance"])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--limit", type=float, default=10.0)
    asked = parser.parse_args()
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(asked.tokenizer))
    files = sorted(asked.folder.glob("*.json"))
    files = sorted(random.Random(0).sample(files, min(asked.count, len(files))))
    workers = [Worker(name, asked.tokenizer, asked.eos) for name in asked.library]
    found: dict[str, list[dict[str, Any]]] = {worker.name: [] for worker in workers}
    for file in files:
        case = json.loads(file.read_text("utf-8"))
        valid = [json.dumps(test["data"], ensure_ascii=False) for test in case["tests"] if test["valid"]]
        texts = [tokenizer.encode(text, add_special_tokens=False).ids for text in valid]
        texts = [ids for ids in texts if len(ids) <= MAX_TOKENS]
        for worker in workers:  # alternately
            found[worker.name].append(worker.follow(json.dumps(case["schema"]), texts, asked.limit))
    print(f"{len(files)} schemas, vocabulary of {tokenizer.get_vocab_size()}")
    for name, answers in found.items():
        _show(name, answers)


def _show(name: str, answers: list[dict[str, Any]]) -> None:
    compiled = [answer for answer in answers if "masks_s" in answer]
    errors = [answer for answer in answers if "error" in answer]
    masks = np.array([mask for answer in compiled for mask in answer["masks_s"]]) * 1e3
    compile_ms = np.array([answer["compile_s"] for answer in compiled]) * 1e3
    accepted = [taken for answer in compiled for taken in answer["accepted"]]
    print(
        f"{name}: compiled {len(compiled)}, refused {len(errors)}, over the limit "
        f"{sum('timeout' in answer for answer in answers)}; instances accepted {sum(accepted)} of {len(accepted)}\n"
        f"  compile and first mask, ms: median {np.median(compile_ms):.2f}, 99% {np.quantile(compile_ms, 0.99):.1f}, "
        f"longest {compile_ms.max():.0f}\n"
        f"  mask and accept, ms a token ({len(masks)}): mean {masks.mean():.3f}, median {np.median(masks):.3f}, "
        f"99% {np.quantile(masks, 0.99):.2f}, longest {masks.max():.1f}\n"
        f"  peak memory {max(answer.get('peak_mib', 0) for answer in answers):.0f} MiB"
    )
    reasons: dict[str, int] = {}
    for answer in errors:
        reasons[answer["error"][:60]] = reasons.get(answer["error"][:60], 0) + 1
    for reason, count in sorted(reasons.items(), key=lambda item: -item[1])[:6]:
        print(f"  {count} x {reason}")


if __name__ == "__main__":
    main()
