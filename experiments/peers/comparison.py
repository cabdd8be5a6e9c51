"""The tasks of every peer, the agreement of their tokens, and the table of ratios. Pure."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.peers.folder import VOCABULARY

LOWEST_ID = 10


@dataclass(frozen=True)
class Task:
    """A number of equal requests at once. `is_rate`: reported as new tokens per second, else as milliseconds."""

    name: str
    title: str
    num_prompts: int
    prompt_tokens: int
    new_tokens: int
    is_rate: bool

    def prompts(self, seed: int) -> list[list[int]]:
        """Random token ids; another seed gives other ids, so that nothing is cached."""
        shape = (self.num_prompts, self.prompt_tokens)
        return np.random.default_rng([seed, self.prompt_tokens]).integers(LOWEST_ID, VOCABULARY, shape).tolist()

    def figure(self, seconds: float) -> float:
        """Tokens per second, or milliseconds."""
        return self.num_prompts * self.new_tokens / seconds if self.is_rate else 1e3 * seconds


TASKS = {
    task.name: task
    for task in (
        Task("offline", "offline, tokens/s", 32, 128, 128, True),
        Task("single", "single stream, tokens/s", 1, 32, 128, True),
        Task("ttft", "TTFT of 512 tokens, ms", 1, 512, 1, False),
    )
}


@dataclass(frozen=True)
class Agreement:
    """Greedy tokens of two engines: share of equal ones, and of those before the first difference in a request."""

    equal: float
    before_first_difference: float


def agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> Agreement:
    """Compare `[request][token]`. After the first difference the texts diverge, which says little."""
    same = np.array(ours) == np.array(theirs)
    prefix = np.cumprod(same, axis=1)
    return Agreement(float(same.mean()), float(prefix.mean()))


def medians(seconds: Mapping[tuple[str, str], Sequence[float]]) -> dict[tuple[str, str], float]:
    """Median figure by peer and task."""
    return {(peer, task): TASKS[task].figure(statistics.median(times)) for (peer, task), times in seconds.items()}


def ratio(task: str, ours: float, theirs: float) -> float:
    """Speed of apt-jax divided by the peer's."""
    return ours / theirs if TASKS[task].is_rate else theirs / ours


def markdown(dtype: str, found: Mapping[tuple[str, str], float], reference: str, agreements: Mapping[str, Any]) -> str:
    """A table: one row per peer, with figure and ratio per task, and agreement of the greedy tokens."""
    peers = list(dict.fromkeys([*(peer for peer, _ in found), *agreements]))
    tasks = [name for name in TASKS if any(task == name for _, task in found)]
    head = "".join(f" {TASKS[task].title} | {reference} / it |" for task in tasks)
    lines = [f"| {dtype} |{head} same greedy tokens |", "|---|" + "---:|---:|" * len(tasks) + "---:|"]
    for peer in peers:
        cells = ""
        for task in tasks:
            if (peer, task) not in found:
                cells += " - | - |"
                continue
            cells += f" {found[peer, task]:.0f} |"
            other = peer != reference and (reference, task) in found
            cells += f" {ratio(task, found[reference, task], found[peer, task]):.2f} x |" if other else " |"
        same = f"{agreements[peer].before_first_difference:.0%}" if peer in agreements else ""
        lines.append(f"| {peer} |{cells} {same} |")
    return "\n".join(lines)
