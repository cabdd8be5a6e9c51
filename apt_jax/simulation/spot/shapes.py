"""How many groups of how many machines: the choice of a formation for so many machines and a rate.

SpotServe (arXiv 2311.15566, algorithm 1): among (data, tensor, pipeline, batch) the lowest latency at enough
throughput, else the highest throughput. Here a group is tensor-parallel only, and its batch is the scheduler's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from apt_jax.cache import CacheKind
from apt_jax.scheduling.costs.cost_model import CostModel, block_bytes, cache_blocks
from apt_jax.scheduling.costs.hardware import HARDWARE, MODELS, Hardware
from apt_jax.scheduling.costs.step_load import StepLoad
from apt_jax.scheduling.state import Limits
from apt_jax.simulation.throughput.bound import fluid_bound
from apt_jax.simulation.workload import Lengths

HEADROOM = 0.8  # of its bound that a formation is trusted with
MAX_SEQS, MAX_TOKENS, BLOCK_SIZE = 256, 2048, 16


@dataclass(frozen=True)
class Machine:
    """One machine of a kind, with one accelerator.

    Attributes:
        hardware: its accelerator; the link is the network between machines, 50 Gbit/s as in the paper.
        storage_bytes_per_s: at which it reads weights from storage. Assumed.
        utilization: of the memory.
        on_demand_price, spot_price: of an hour, in any unit. Assumed: 3.9 and 1.9 dollars of a g4dn.12xlarge.
    """

    hardware: Hardware = field(
        default_factory=lambda: replace(HARDWARE["a100-40gb"], link_bytes_per_s=6.25e9, link_latency_s=30e-6)
    )
    storage_bytes_per_s: float = 1e9
    utilization: float = 0.92
    on_demand_price: float = 3.9
    spot_price: float = 1.9


@dataclass(frozen=True)
class Shape:
    """So many groups of so many machines."""

    groups: int
    degree: int


@dataclass(frozen=True)
class Model:
    """A model on machines of a kind, for requests of certain lengths: those of the paper, unless said otherwise."""

    name: str = "opt-30b"
    machine: Machine = field(default_factory=Machine)
    lengths: Lengths = field(default_factory=lambda: Lengths("paper", np.array([512]), np.array([128])))
    degrees: tuple[int, ...] = (2, 4, 8)

    def cost_model(self, degree: int) -> CostModel:
        """Iteration times of a group."""
        return CostModel(MODELS[self.name], self.machine.hardware, devices=degree)

    def num_blocks(self, degree: int) -> int:
        """Blocks of a group's pool."""
        return cache_blocks(
            self.cost_model(degree), block_size=BLOCK_SIZE, max_num_batched_tokens=MAX_TOKENS, max_num_seqs=MAX_SEQS,
            utilization=self.machine.utilization,
        )  # fmt: skip

    def limits(self, degree: int) -> Limits:
        """Of a group's iterations."""
        return Limits(MAX_SEQS, MAX_TOKENS, "kv", watermark_blocks=self.num_blocks(degree) // 100)

    @property
    def weight_bytes(self) -> float:
        """Of the whole model."""
        return self.cost_model(self.degrees[0]).weight_bytes

    @property
    def token_bytes(self) -> float:
        """Of a cached token, over all machines of a group."""
        per_page = CacheKind.KV.blocks_per_page
        return block_bytes(self.cost_model(self.degrees[0]), BLOCK_SIZE) * per_page / BLOCK_SIZE

    @cached_property
    def _bounds(self) -> dict[int, float]:
        found = {}
        for degree in self.degrees:
            try:
                found[degree] = fluid_bound(
                    self.lengths.prompt_tokens, self.lengths.output_tokens, self.cost_model(degree),
                    kinds=(CacheKind.KV,), num_blocks=self.num_blocks(degree), block_size=BLOCK_SIZE,
                    max_num_seqs=MAX_SEQS,
                )  # fmt: skip
            except ValueError:  # the weights do not fit
                continue
        return found

    def bound(self, shape: Shape) -> float:
        """Requests per second that a formation can serve for long at most."""
        return shape.groups * self._bounds[shape.degree]

    def latency_s(self, shape: Shape, rate: float) -> float:
        """Predicted seconds of a request of mean lengths at `rate`, without waiting."""
        cost, lengths = self.cost_model(shape.degree), self.lengths
        prompt, output = float(lengths.prompt_tokens.mean()), float(lengths.output_tokens.mean())
        first_s = cost.step_s(StepLoad(prefill_tokens=round(prompt), prefill_pairs=round(prompt**2 / 2), samples=1))
        running, step_s = 1.0, 0.0
        for _ in range(20):  # Little's law: as many run as arrive while one runs
            count = max(round(running), 1)
            context = round(count * (prompt + output / 2))
            prompts = round(rate / shape.groups * step_s * prompt)
            load = StepLoad(prompts, 0, count, (context, 0), samples=count, decodes=(count, 0))
            step_s = cost.step_s(load)
            running = min(rate / shape.groups * output * step_s, MAX_SEQS)
        return first_s + output * step_s

    def shapes(self, machines: int) -> Sequence[Shape]:
        """Those that so many machines can have, with as many groups as fit."""
        return [Shape(machines // degree, degree) for degree in self._bounds if machines >= degree]

    def choose(self, machines: int, rate: float) -> Shape | None:
        """The formation with the lowest latency of those that bear `rate`, else the one that bears most; None: none."""
        shapes = self.shapes(machines)
        enough = [shape for shape in shapes if HEADROOM * self.bound(shape) >= rate]
        if enough:
            return min(enough, key=lambda shape: self.latency_s(shape, rate))
        return max(shapes, key=self.bound, default=None)
