"""What a policy's own decisions cost the host, measured once per policy; the simulator adds it to every iteration.

`python -m experiments.schedule_cost --table --iterations 100` on 30 November 2026, one core of an AMD EPYC server with
other load, Python 3.12: medians of processor time with 25 to 800 candidates of ShareGPT lengths, as a straight line. An
engine that plans while the device runs hides part of it, which is not credited. On the same machine with nothing else
running `apt` took 60 us and 0.88 us for each candidate, `sarathi` 77 and 0.24: the table charges `apt` more.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class HostTime:
    """Seconds of one decision: a constant, and for each unfinished request."""

    iteration_s: float = 0.0
    candidate_s: float = 0.0

    def seconds(self, candidates: int) -> float:
        """Seconds of a decision about so many waiting and running requests."""
        return self.iteration_s + self.candidate_s * candidates


HOST_TIMES = {
    "alise": HostTime(73e-6, 2.62e-6),
    "apt": HostTime(29e-6, 2.52e-6),
    "apt-paper": HostTime(150e-6, 0.69e-6),
    "edf": HostTime(34e-6, 0.60e-6),
    "fastserve": HostTime(64e-6, 0.59e-6),
    "fastswitch": HostTime(68e-6, 0.92e-6),
    "fcfs": HostTime(38e-6, 0.28e-6),
    "mlfq": HostTime(28e-6, 0.96e-6),
    "nested-wait": HostTime(22e-6, 0.41e-6),
    "priority": HostTime(39e-6, 0.29e-6),
    "random": HostTime(31e-6, 0.62e-6),
    "sarathi": HostTime(54e-6, 0.22e-6),
    "semi-pd": HostTime(130e-6, 0.18e-6),
    "sjf": HostTime(59e-6, 1.42e-6),
    "vllm-v0": HostTime(39e-6, 0.20e-6),
    "vllm-v1": HostTime(50e-6, 0.28e-6),
    "wait": HostTime(72e-6, 0.08e-6),
}


def host_time(policy: str) -> HostTime:
    """Of a policy by name, its options as in `make_policy`; nothing for one that was not measured."""
    return HOST_TIMES.get(policy.split(":")[0], HostTime())
