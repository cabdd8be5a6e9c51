"""What `bench throughput` and `bench latency` share: a warm engine, samples, and a tally of its iterations."""

import dataclasses
import json
import platform
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from apt_jax.cache import KINDS
from apt_jax.engine.interface import ServingEngine
from apt_jax.engine_config import EngineConfig
from apt_jax.files import EVERYBODY, replace_file
from apt_jax.output import Output
from apt_jax.request import FinishReason, SamplingParams
from apt_jax.serve.bench.work import Work
from apt_jax.serve.options import LoadOptions
from apt_jax.serve.runtime.build import build_engine
from apt_jax.serve.runtime.samples import Sample


def open_engine(model: str | None, load: LoadOptions, config: EngineConfig) -> ServingEngine:
    """The engine; nothing is compiled yet.

    Raises:
        ValueError: the model cannot be loaded or does not fit; one sentence.
    """
    return build_engine(model, engine_config=config, **dataclasses.asdict(load))


def samples_of(works: Sequence[Work], *, temperature: float, prefix: str) -> list[Sample]:
    """One sample of exactly its output tokens for each; prompts must be token ids."""
    return [
        Sample(
            f"{prefix}{number}",
            0,
            work.prompt,
            SamplingParams(temperature=temperature, max_tokens=work.output_tokens, ignore_eos=True, seed=number),
        )
        for number, work in enumerate(works)
        if not isinstance(work.prompt, str)
    ]


def checked(output: Output | ValueError) -> Output:
    """The output.

    Raises:
        ValueError: the engine refused the request.
        RuntimeError: it failed on it.
    """
    if isinstance(output, ValueError):
        raise output
    if output.finish_reason is FinishReason.ERROR:
        raise RuntimeError(f"the engine failed on request {output.request.request_id}: {output.error}")
    return output


@dataclass
class Tally:
    """Sums over iterations. Token slots are what the device computed, padding included; blocks are those in use."""

    engine: ServingEngine
    steps: int = 0
    tokens: int = 0
    slots: int = 0
    rows: int = 0
    preemptions: int = 0
    conversions: int = 0
    held_blocks: Counter[str] = field(default_factory=Counter)  # by name of the cache kind, summed over iterations
    peak_blocks: int = 0

    def add(self) -> None:
        """Count the engine's last iteration."""
        figures = self.engine.figures()
        plan = figures.plan
        self.preemptions += len(plan.preempted)
        self.conversions += len(plan.converted)
        if not plan.scheduled:
            return
        tokens, rows = plan.num_tokens, len(plan.scheduled)
        self.steps += 1
        self.tokens += tokens
        self.rows += rows
        self.slots += figures.padded_tokens
        self.held_blocks.update(figures.blocks)
        self.peak_blocks = max(self.peak_blocks, figures.num_held_blocks)

    def figures(self) -> dict[str, Any]:
        """Plain data; shares of token slots and of the pool."""
        steps, blocks = max(self.steps, 1), self.engine.figures().num_blocks
        return {
            "iterations": self.steps,
            "mean_batch": self.rows / steps,
            "padding": 1 - self.tokens / max(self.slots, 1),
            "preemptions": self.preemptions,
            "conversions": self.conversions,
            "num_blocks": blocks,
            **{f"mean_{kind.spec.name}_usage": self.held_blocks[kind.spec.name] / steps / blocks for kind in KINDS},
            "peak_cache_usage": self.peak_blocks / blocks,
        }


def write_result(path: Path | None, args: Any, figures: dict[str, Any]) -> None:
    """JSON with the figures, every flag and the versions; nothing if `path` is None."""
    if path is None:
        return
    flags = dataclasses.asdict(args)
    for group in ("work", "load", "engine"):
        flags |= flags.pop(group, {})
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in flags.items()}
    versions = {name: version(name) for name in ("apt-jax", "jax", "jaxlib", "flax")}
    versions["python"] = platform.python_version()
    text = json.dumps({**figures, "versions": versions, "arguments": arguments}, indent=1) + "\n"
    replace_file(path, text.encode(), mode=EVERYBODY)
    print(f"wrote {path}", file=sys.stderr)
