"""The baseline with prefill and decode on devices of their own (DistServe): two tensor-parallel groups and a link."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from apt_jax.scheduling.costs.cost_model import CostModel
from apt_jax.scheduling.costs.step_load import StepLoad
from apt_jax.simulation.elastic.service import Served
from apt_jax.simulation.workload import Arrival

BATCH_TOKENS = 8192  # of prompts computed together, unless one alone is longer


@dataclass(frozen=True)
class Disaggregated:
    """Groups of half of the devices each; `capacity` is the decoding group's, in tokens."""

    prefill: CostModel
    decode: CostModel
    capacity: int

    def run(self, arrivals: Sequence[Arrival]) -> list[Served]:
        """Serve all of them: prompts in order of arrival, then their keys and values over the link, then tokens."""
        served = [Served(arrival) for arrival in arrivals]
        ready = self._prefilled(served)
        heapq.heapify(ready)
        waiting: list[Served] = []
        running: list[Served] = []
        now, free = 0.0, self.capacity
        while ready or waiting or running:
            if not waiting and not running:
                now = max(now, ready[0][0])
            while ready and ready[0][0] <= now:
                waiting.append(heapq.heappop(ready)[2])
            while waiting and waiting[0].whole <= free:
                free -= waiting[0].whole
                running.append(waiting.pop(0))
            if not running:
                raise ValueError(f"a request of {waiting[0].whole} tokens does not fit in {self.capacity}")
            count = len(running)
            load = StepLoad(
                0, 0, count, (sum(r.known for r in running), 0), samples=count, decodes=(count, 0)
            )  # fmt: skip
            now += self.decode.step_s(load)
            for request in running:
                request.generated += 1
            for request in [r for r in running if r.generated >= r.arrival.output_tokens]:
                request.ended_s = now
                free += request.whole
                running.remove(request)
        return served

    def _prefilled(self, served: Sequence[Served]) -> list[tuple[float, int, Served]]:
        """When each request's keys and values are with the decoding group."""
        m = self.prefill
        token_bytes = 2 * m.model.num_hidden_layers * m.model.hidden_size * m.number_bytes
        link_bytes_per_s = m.hardware.link_bytes_per_s * m.devices  # each device sends its slice
        found: list[tuple[float, int, Served]] = []
        now, i = 0.0, 0
        while i < len(served):
            now = max(now, served[i].arrival.arrival_s)
            batch = [served[i]]
            for request in served[i + 1 :]:
                tokens = sum(r.arrival.prompt_tokens for r in batch) + request.arrival.prompt_tokens
                if request.arrival.arrival_s > now or tokens > BATCH_TOKENS:
                    break
                batch.append(request)
            lengths = [r.arrival.prompt_tokens for r in batch]
            pairs = sum(n * (n + 1) // 2 for n in lengths)
            now += m.step_s(StepLoad(prefill_tokens=sum(lengths), prefill_pairs=pairs, samples=len(batch)))
            for k, request in enumerate(batch):
                request.first_s, request.generated = now, 1
                sent_s = request.arrival.prompt_tokens * token_bytes / link_bytes_per_s
                if request.arrival.output_tokens == 1:
                    request.ended_s = now
                else:
                    found.append((now + sent_s, i + k, request))
            i += len(batch)
        return found
