"""The question of each study, and the points that answer it. OPT-13B on one A100 (40 GB) unless a case differs."""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

from apt_jax.cache import MODE_KINDS, CacheMode
from apt_jax.scheduling.costs.cost_model import HiddenMode
from apt_jax.simulation.experiment import Configuration, Experiment
from apt_jax.simulation.requests.surge import Surge
from experiments.studies.settings import SETTINGS

FOLDER = Path(__file__).parent
DEFAULT = SETTINGS["a100-13b-one-pass"].experiment
SHARES = ("strict_attainment", "attainment", "worst_class", "frozen")


@dataclass(frozen=True)
class Case:
    """One line of a plot: a policy with a cache, on an experiment. `rates` and `targets` are its own, if given."""

    label: str
    policy: str
    cache_mode: CacheMode
    hidden_attention: HiddenMode = "one-pass"
    experiment: Experiment = DEFAULT
    rates: tuple[float, ...] = ()
    targets: tuple[float, ...] = ()

    @property
    def configuration(self) -> Configuration:
        """What the experiment is run with."""
        return self.policy, self.cache_mode, self.hidden_attention


@dataclass(frozen=True)
class Study:
    """Cases at rates (attainment and what goes with it), or searched for effective throughput at targets.

    `columns` are fields of the report that its table shows; the first two are drawn. Every point is simulated with each
    of `seeds`; tables have means and spreads. A study of routers says with `over` which field its table and plot run
    over: rate (of an instance), instances or report_interval_s.
    """

    name: str
    question: str
    cases: tuple[Case, ...]
    rates: tuple[float, ...] = ()
    targets: tuple[float, ...] = ()
    columns: tuple[str, ...] = (
        "strict_attainment",
        "attainment",
        "mean_batch",
        "p99_ttft_s",
        "p99_tbt_s",
        "preemptions",
    )
    over: str = ""
    seeds: tuple[int, ...] = (0,)

    @property
    def points(self) -> list[tuple[Case, float | None, int]]:
        """What is simulated, in this order: case, rate and seed; a rate of None is a search."""
        return [
            (case, rate, seed)
            for case in self.cases
            for rate in (case.rates or self.rates or (None,))
            for seed in self.seeds
        ]


# on devices whose kernels this package has: what it runs there; else the kernel that reads every vector once
VLLM_0 = ("vllm-v0, KV", "vllm-v0", "kv", "absorbed")
VLLM_1 = ("vllm-v1, KV", "vllm-v1", "kv", "absorbed")
SARATHI = ("sarathi, hidden", "sarathi", "hidden", "absorbed")
BEST = ("apt, hybrid", "apt", "hybrid", "absorbed")
PAPER = ("paper: apt-paper, hybrid, recompute", "apt-paper", "hybrid", "recompute")
SARATHI_ONE_PASS = ("sarathi, hidden, one pass", "sarathi", "hidden", "one-pass")
BEST_ONE_PASS = ("apt, hybrid, one pass", "apt", "hybrid", "one-pass")
BASELINE = VLLM_1


def _cases(experiment: Experiment, *kinds: tuple[str, str, str, str], prefix: str = "") -> tuple[Case, ...]:
    return tuple(
        Case(prefix + label, policy, mode, attention, experiment)  # type: ignore[arg-type]
        for label, policy, mode, attention in kinds
    )


def _targets(
    name: str, question: str, *experiments: tuple[str, Experiment], targets: tuple[float, ...] = (0.9,),
    kinds: tuple[tuple[str, str, str, str], ...] = (BASELINE, BEST_ONE_PASS), seeds: tuple[int, ...] = (0,),
) -> Study:  # fmt: skip
    cases = [_cases(experiment, *kinds, prefix=f"{label}: " if label else "") for label, experiment in experiments]
    return Study(name, question, sum(cases, ()), targets=targets, seeds=seeds)


def _modes(*settings: tuple[str, HiddenMode, tuple[float, ...]]) -> tuple[Case, ...]:
    """KV alone, hidden alone and both, on each of these: a setting's name, its hidden attention and its rates."""
    return tuple(
        Case(f"{name}, {attention}: {mode}", "apt", mode, attention, SETTINGS[name].experiment, rates)
        for name, attention, rates in settings
        for mode in MODE_KINDS
    )


def _options(*options: str, experiment: Experiment, mode: CacheMode = "hybrid") -> tuple[Case, ...]:
    """`apt` with its defaults, and with each of these options."""
    return (
        Case("defaults", "apt", mode, experiment=experiment),
        *(Case(option, f"apt:{option}", mode, experiment=experiment) for option in options),
    )


ROUTERS = ("pending-time", "least-requests", "round-robin", "power-of-two")


def _routed(
    over: str, experiment: Experiment, policy: str, mode: CacheMode, rates: tuple[float, ...], duration_s: float, *,
    instances: tuple[int, ...] = (8,), intervals: tuple[float, ...] = (0.0,),
) -> tuple[Case, ...]:  # fmt: skip
    """Each router, with the policy in every instance; `rates` are those of one instance."""
    cases = []
    for number, interval, router in itertools.product(instances, intervals, ROUTERS):
        varied = {"rate": "", "instances": f", {number} instances", "report_interval_s": f", every {interval:g} s"}[
            over
        ]
        each = replace(
            experiment, instances=number, router=router, report_interval_s=interval, num_requests=1,
            duration_s=duration_s,
        )  # fmt: skip
        total = tuple(round(number * rate, 6) for rate in rates)
        cases.append(Case(f"{policy}, {router}{varied}", policy, mode, "one-pass", each, total))
    return tuple(cases)


def _conversations(*names: str) -> tuple[Case, ...]:
    """Nothing kept, prefixes, and host memory behind them, as KV and hidden, in a pool of the same bytes."""
    kinds: tuple[tuple[str, CacheMode], ...] = (("sarathi", "kv"), ("sarathi", "hidden"), ("vllm-v1", "kv"))
    return tuple(
        Case(
            f"{name}: {policy}, {mode}, {kept}", policy, mode,
            SETTINGS[name].hidden_attention if name == "v6e-13b" else "one-pass",
            replace(SETTINGS[name].experiment, workload="conversations", duration_s=900.0, num_requests=1,
                    enable_prefix_caching=kept != "none", host_cache_bytes=HOST_BYTES * kept.endswith("host")),
        )
        for name in names for policy, mode in kinds for kept in ("none", "prefix cache", "prefix cache, host")
    )  # fmt: skip


def _systems(*experiments: tuple[str, Experiment, float | None]) -> tuple[Case, ...]:
    """The systems named beside Apt-Serve, with KV as in their papers, between the baselines and `apt`."""
    found: list[Case] = []
    for where, experiment, rate in experiments:
        host = replace(experiment, enable_prefix_caching=True, host_cache_bytes=HOST_BYTES)
        for label, policy, mode, each in (
            ("vllm-v0, KV", "vllm-v0", "kv", experiment),
            ("vllm-v1, KV", "vllm-v1", "kv", experiment),
            ("fastserve, KV", "fastserve", "kv", experiment),
            ("fastserve, KV, host", "fastserve", "kv", host),
            ("alise, KV, host", "alise", "kv", host),
            ("alise, KV, host, lengths known within 1.65", "alise", "kv",
             replace(host, known_lengths=True, known_lengths_error=0.5)),
            ("alise, KV, host, lengths known", "alise", "kv", replace(host, known_lengths=True)),
            ("fastswitch, KV", "fastswitch", "kv", experiment),
            ("fastswitch, KV, host", "fastswitch", "kv", host),
            ("wait, KV", "wait", "kv", experiment),
            ("nested-wait, KV", "nested-wait", "kv", experiment),
            ("semi-pd, KV", "semi-pd", "kv", experiment),
            ("sarathi, KV", "sarathi", "kv", experiment),
            ("apt, KV", "apt", "kv", experiment),
            ("apt, hybrid", "apt", "hybrid", experiment),
        ):  # fmt: skip
            rates = () if rate is None else (rate,)
            found.append(Case(f"{where}{label}", policy, mode, "one-pass", each, rates))  # type: ignore[arg-type]
    return tuple(found)


AZURE = replace(DEFAULT, workload="azure")
HOST_BYTES = 64 * 10**9  # of host memory
SYSTEMS_COLUMNS = (
    "strict_attainment", "attainment", "frozen", "kept_token_throughput", "mean_token_latency_s", "p99_ttft_s",
    "p99_tbt_s", "preemptions", "moved_bytes", "backlog_growth",
)  # fmt: skip
LONG = replace(DEFAULT, duration_s=900.0)  # long enough to say whether a rate lasts
MIXED = replace(DEFAULT, workload="sharegpt+longbench")
SEEDS = (0, 1, 2)
OVERLOAD = replace(DEFAULT, duration_s=900.0, surge=Surge(200.0, 300.0, 3.0))
SHORT = replace(DEFAULT, num_requests=300)  # still 300 seconds of arrivals, see `make_arrivals`
STUDIES = (
    _targets("sharegpt", "What request rate keeps the promise for 90% and 99% of all requests?", ("", DEFAULT),
             targets=(0.9, 0.99), kinds=(VLLM_0, VLLM_1, PAPER, SARATHI_ONE_PASS, BEST_ONE_PASS), seeds=SEEDS),
    _targets("steps", "What is each step worth: prompts mixed with decodes, hidden blocks, the policy, both kinds?",
             ("", DEFAULT), targets=(0.9, 0.99),
             kinds=tuple((f"{policy}, {mode}", policy, mode, "one-pass")
                         for mode in ("kv", "hidden", "hybrid") for policy in ("fcfs", "sarathi", "apt"))),
    _targets("devices", "And on a device that the kernels of this package are written for?",
             *((name, SETTINGS[name].experiment) for name in ("v6e-13b", "v6e-6.7b")),
             targets=(0.9, 0.99), kinds=(VLLM_1, SARATHI, BEST), seeds=SEEDS),
    _targets("more-devices", "And on others?",
             *((name, SETTINGS[name].experiment) for name in ("v5e-6.7b", "h200-13b-10gb")),
             targets=(0.9, 0.99), kinds=(VLLM_1, SARATHI, BEST)),
    Study("int8", "What do numbers of one byte bring, in the cache, in the weights and in both?",
          tuple(replace(case, label=f"{name}: {case.label}{of}", targets=targets, experiment=replace(
                    case.experiment, cache_dtype=cache, quantization=weights))
                for name in ("v6e-13b", "a100-13b-one-pass", "v6e-6.7b")
                for case in _cases(SETTINGS[name].experiment, VLLM_1, BEST if "v6e" in name else BEST_ONE_PASS)
                for of, cache, weights, targets in (
                    ("", "auto", "none", ()), (", int8 cache", "int8", "none", ()),
                    (", int8 weights", "auto", "int8", ()), (", both", "int8", "int8", ()),
                    (", both, int8-dynamic", "int8", "int8-dynamic", (0.99,)))
                if weights != "int8-dynamic" or "13b" in name),
          targets=(0.9, 0.99)),
    _targets("workloads", "Does it hold for other request lengths?",
             ("HumanEval", replace(SHORT, workload="humaneval")), ("LongBench", replace(SHORT, workload="longbench"))),
    Study("cliff", "How does attainment fall with the rate?",
          _cases(DEFAULT, VLLM_1, PAPER, SARATHI_ONE_PASS, BEST_ONE_PASS),
          rates=(1, 2, 3, 4, 5, 6, 8),
          columns=(*SHARES, "p50_ttft_s", "p99_ttft_s", "p99_tbt_s", "mean_batch", "backlog", "longest_wait_s")),
    Study("policies", "Hidden blocks for all, 900 s of arrivals: what does the policy alone change, and who pays?",
          tuple(Case(policy, policy, "hidden", experiment=LONG)
                for policy in ("fcfs", "sarathi", "edf", "sjf", "mlfq", "apt")),
          rates=(4.4, 5.0),
          columns=(*SHARES, "longest_gap_s", "longest_wait_s", "backlog_growth", "preemptions")),
    Study("long-prompts", "ShareGPT and LongBench, half and half, 900 s, hidden blocks: who keeps long prompts?",
          tuple(Case(policy, policy, "hidden", experiment=replace(MIXED, duration_s=900.0))
                for policy in ("fcfs", "sarathi", "edf", "sjf", "mlfq", "apt")),
          rates=(2.0, 2.6),
          columns=(*SHARES, "longest_gap_s", "longest_wait_s", "backlog_growth", "preemptions")),
    Study("classes", "Chats (0.5 s, gaps of 0.1 s) and a fifth of summaries (30 s, 5 s), 900 s, hidden blocks.",
          tuple(Case(policy, policy, "hidden", experiment=replace(LONG, classes=FOLDER / "chats_and_summaries.csv"))
                for policy in ("fcfs", "sarathi", "edf", "sjf", "mlfq", "apt")),
          rates=(2.0, 3.0),
          columns=(*SHARES, "longest_gap_s", "longest_wait_s", "backlog_growth", "preemptions")),
    Study("overload", "Three times the base rate for 300 s of 900, hidden blocks, a base of 2.8/s: who is kept when?",
          tuple(Case(policy, policy, "hidden", experiment=OVERLOAD)
                for policy in ("fcfs", "sarathi", "edf", "sjf", "mlfq", "apt")),
          rates=(2.8,), seeds=SEEDS,
          columns=("strict_attainment", "worst_class", "frozen", "before", "surge", "minute_after", "later",
                   "longest_wait_s")),
    Study("kinds", "Is the mix of kinds ever worse than the better of KV alone and hidden alone?",
          _modes(("a100-13b-one-pass", "one-pass", (3.5, 5.2)), ("a100-13b", "recompute", (3.5,)),
                 ("v6e-13b", "absorbed", (3.0,)), ("v5e-6.7b", "absorbed", (2.0,)),
                 ("h200-13b-10gb", "absorbed", (8.0,))),
          seeds=(0, 1, 2, 3, 4), columns=("strict_attainment", "worst_class", "mean_batch", "preemptions")),
    Study("lengths", "What is kept of the worst class, and what does it cost the others to keep more?",
          tuple(
              replace(case, label=f"{name}: {case.label}", rates=rates,
                      hidden_attention=SETTINGS[name].hidden_attention)
              for name, rates in (("a100-13b-one-pass", (4.5, 5.0)), ("v6e-13b", (2.8, 3.2, 3.5)))
              for case in _options("value=longest", "value=absolute", "lane_share=0.2", "late_margin=1",
                                   experiment=replace(SETTINGS[name].experiment, duration_s=900.0))),
          columns=(*SHARES, "backlog_growth", "longest_wait_s", "preemptions")),
    Study("options", "What is each part of the policy worth?",
          _options("mixed=off", "convert=off", "prediction=off", "paced=off", "readmit_first=off", "fit_victims=off",
                   "margin=1.5", "margin=2", "patience_s=5", "patience_s=60", "lane_share=0", "lane_share=0.2",
                   "fallback=none", "fallback=constant", "value=absolute", "value=slack", "value=longest",
                   experiment=LONG),
          rates=(5.2,), columns=(*SHARES, "backlog_growth", "longest_wait_s", "preemptions")),
    Study("oracle", "What could knowing output lengths in advance bring?",
          (Case("not predicted", "apt:prediction=off", "hybrid", experiment=LONG),
           Case("learnt from finished requests", "apt", "hybrid", experiment=LONG),
           Case("known", "apt", "hybrid", experiment=replace(LONG, known_lengths=True)),
           Case("known, no margin", "apt:margin=0:late_margin=0", "hybrid",
                experiment=replace(LONG, known_lengths=True))),
          rates=(5.2, 5.6), columns=(*SHARES, "backlog_growth", "mean_batch", "preemptions")),
    _targets("bursts", "What do bursts do? Gamma gaps with coefficient of variation 2 and 4.",
             ("cv 2", replace(SHORT, cv=2.0)), ("cv 4", replace(SHORT, cv=4.0))),
    _targets("larger", "Larger models over several devices.",
             ("OPT-30B x2", replace(SHORT, model="opt-30b", tensor_parallel_size=2)),
             ("OPT-66B x4", replace(SHORT, model="opt-66b", tensor_parallel_size=4))),
    _targets("azure", "Recorded arrivals: Azure's conversation trace of 2023, stretched in time.",
             ("", replace(SHORT, workload="azure"))),
    Study("conversations", "Four turns after a shared system prompt: what do cached prefixes bring, by kind?",
          _conversations("v6e-13b", "a100-13b-one-pass"), targets=(0.9,)),
    Study("systems", "The systems named beside Apt-Serve on one scheduler: ShareGPT, KV as in their papers, 900 s.",
          _systems(("", LONG, None)), rates=(1.5, 2.0, 2.5, 3.0), columns=SYSTEMS_COLUMNS),
    Study("systems-elsewhere", "The same: recorded arrivals, mixed classes, bursts (variation 2), 900 s.",
          _systems(("Azure: ", replace(AZURE, duration_s=900.0), 0.9),
                   ("classes: ", replace(LONG, classes=FOLDER / "chats_and_summaries.csv"), 1.5),
                   ("bursts: ", replace(LONG, cv=2.0), 2.5)), columns=SYSTEMS_COLUMNS),
    Study("routing", "Eight instances: which router keeps most promises?",
          (*_routed("rate", AZURE, "fcfs", "kv", (0.7, 0.9, 1.0, 1.1, 1.2, 1.4), 60),
           *_routed("rate", AZURE, "apt", "hybrid", (2.0, 2.5), 60)), over="rate"),
    Study("routing-instances", "4 to 64 instances, at one rate for each of them, at the cliff.",
          (*_routed("instances", AZURE, "fcfs", "kv", (1.1,), 40, instances=(4, 8, 16, 32, 64)),
           *_routed("instances", AZURE, "apt", "hybrid", (2.3,), 40, instances=(4, 8))), over="instances"),
    Study("routing-reports", "Eight instances, fcfs inside: what if reports are old?",
          _routed("report_interval_s", AZURE, "fcfs", "kv", (1.1,), 60, intervals=(0.0, 0.25, 1.0, 4.0)),
          over="report_interval_s"),
    Study("routing-lengths", "Eight instances, chats and summaries mixed (ShareGPT and LongBench, half and half).",
          (*_routed("rate", MIXED, "fcfs", "kv", (1.0, 1.3, 1.6), 60),
           *_routed("rate", MIXED, "apt", "hybrid", (3.0,), 30)),
          over="rate"),
)  # fmt: skip
