"""What `apt-jax simulate` prints, draws and writes is what it simulated: every figure in its column."""

import io
import json

import pytest
from matplotlib.figure import Figure
from tqdm import tqdm

from apt_jax.run_figures import SUSTAINED_S
from apt_jax.simulation.cli import configurations, run
from apt_jax.simulation.options import SimulateArgs
from apt_jax.simulation.workload import MIN_DURATION_S

FLAGS = {
    "policies": "fcfs", "cache_modes": "kv", "num_requests": 20, "duration_s": 5.0, "num_blocks": 60,
    "max_num_seqs": 4, "jobs": 1,
}  # fmt: skip


@pytest.fixture
def simulated(tmp_path, capsys):
    """Runs with flags of their own; what is returned, and the tables printed, each a list of rows by column."""
    (tmp_path / "w.csv").write_text("prompt_tokens,output_tokens\n30,4\n200,20\n60,60\n")

    def simulate(**flags):
        result = run(SimulateArgs(workload=str(tmp_path / "w.csv"), **{**FLAGS, **flags}))
        tables, lines = [], capsys.readouterr().out.splitlines()
        for line in lines:
            cells = [cell.strip() for cell in line.replace("┃", "│").split("│")[1:-1]]
            if line.startswith("┃"):
                head = cells
                tables.append([])
            elif line.startswith("│"):
                tables[-1].append(dict(zip(head, cells, strict=True)))
        return result, tables, lines

    return simulate


def test_a_run_is_a_row(simulated):
    result, (table,), lines = simulated(rate="2,4", cache_modes="kv,hidden")
    assert lines[0].endswith("w.csv: 60 blocks, 480 tokens as KV")
    assert lines[-1] == "whether a rate lasts is unknown: that takes 900 s of arrivals (--duration-s)"
    assert [(r["policy"], r["cache"], r["hidden"], r["rate"]) for r in table] == [
        ("fcfs", "kv", "-", "2"), ("fcfs", "kv", "-", "4"), ("fcfs", "hidden", "absorbed", "2"),
        ("fcfs", "hidden", "absorbed", "4"),
    ]  # fmt: skip
    assert "seed" not in table[0] and "router" not in table[0] and "instances" not in table[0]
    for row, figures in zip(table, result["runs"], strict=True):
        assert row["strict"] == f"{figures['strict_attainment']:.1%}" and row["P99"] == f"{figures['attainment']:.1%}"
        assert row["backlog by quarter"] == " ".join(map(str, figures["backlog_by_quarter"]))
        bound = figures["fluid_bound"]
        assert bound > 0
        assert (row["fluid bound"], row["of the bound"]) == (f"{bound:.2f}", f"{figures['rate'] / bound:.0%}")
        assert (row["sustained"], row["preempt"]) == ("unknown", str(figures["preemptions"]))


def test_several_seeds_are_rows_of_their_own_with_a_mean(simulated):
    result, (runs, means), _ = simulated(rate="4", seeds="0,1,7")
    assert [row["seed"] for row in runs] == ["0", "1", "7"] and result["arguments"]["seed"] == 0
    (mean,) = means
    figures = result["means"][0]["figures"]["strict_attainment"]
    assert mean["strict"] == f"{figures['mean']:.1%} ± {figures['spread']:.1%}"
    assert simulated(rate="4", seed=7)[0]["runs"][0] == result["runs"][2]
    assert len(simulated(rate="4")[1]) == 1, "one seed has no mean"


def test_routers_are_compared_in_columns_of_their_own(simulated):
    result, (runs,), lines = simulated(
        rate="4", instances=2, max_instances=3, report_interval_s=0.5, router="round-robin,random"
    )
    assert lines[0].endswith("; 2 to 3 instances, reports up to 0.5 s old")
    assert [(row["router"], row["instances"]) for row in runs] == [
        (r["router"], f"{r['mean_instances']:.1f}") for r in result["runs"]
    ]
    assert [row["router"] for row in runs] == ["round-robin", "random"]
    _, _, lines = simulated(rate="4", instances=2)
    assert lines[0].endswith("; 2 instances")


def test_an_effective_throughput_is_a_row_for_each_reading_and_target(simulated):
    result, (found,), _ = simulated(effective_throughput="0.5", instances=2, router="round-robin")
    assert result["runs"] == [] and [row["reading"] for row in found] == ["strict", "paper"]
    for row, entry in zip(found, result["effective_throughput"], strict=True):
        rate = row["effective throughput (requests/s)"]
        assert entry["rate"] > 0 and rate == f"{entry['rate']:.2f} (unknown whether it lasts)"
        assert (row["router"], row["target"], row["kept but not sustained"]) == ("round-robin", "50%", "-")
        assert entry["router"] == "round-robin" and row["of the bound"] == f"{entry['share_of_bound']:.0%}"


def test_phases_of_a_surge_are_a_table(simulated):
    _, (_, phases), lines = simulated(rate="2", surge="1:2:3", duration_s=5.0)
    assert "strict attainment by phase (requests)" in "\n".join(lines)
    (row,) = phases
    assert (row["policy"], row["rate"]) == ("fcfs", "2") and len(row) > 5


def test_the_classes_of_a_file_are_a_table_whatever_their_names(simulated, tmp_path):
    """Names are text of the user: no markup of the terminal's."""
    (tmp_path / "c.csv").write_text('name,share,ttft_ms\n"[red]chat",3,1000\n[/x],1,0.001\n')
    result, (_, classes), lines = simulated(rate="4", classes=tmp_path / "c.csv")
    assert "strict attainment by class (requests)" in "\n".join(lines)
    (row,), entries = classes, result["runs"][0]["attainment_by_class"]["slo_class"]
    counts = {entry["name"]: entry["requests"] for entry in entries}
    assert {name: row[name] for name in counts} == {
        "[red]chat": f"100.0% ({counts['[red]chat']})", "[/x]": f"0.0% ({counts['[/x]']})",
    }  # fmt: skip
    assert simulated(rate="4")[1][1:] == [], "one class has no table"


def test_requests_are_abandoned_as_by_the_server_s_flag(simulated):
    """Four seats and 40 requests a second: nobody waits longer than the SLO of a second and the time that is added."""
    waits = {}
    for after in (None, 0.0, 0.5, 1000.0):
        figures = simulated(rate="40", num_requests=100, abandon_after=after)[0]["runs"][0]
        waits[after] = figures["longest_wait_s"]
        assert (figures["turned_away"] > 0) is (after in (0.0, 0.5))
        assert figures["strict_attainment"] <= 1 - figures["turned_away"]
    assert 1 < waits[0.0] < 1.25 and 1.5 < waits[0.5] < 1.75 and waits[None] == waits[1000.0] > 5, waits
    with pytest.raises(ValueError, match="abandon_after=-1 must be at least 0"):
        SimulateArgs(abandon_after=-1)


def test_the_rates_without_a_flag(simulated, tmp_path):
    assert [r["rate"] for r in simulated()[0]["runs"]] == [1.0, 2.0, 3.0]
    (tmp_path / "w.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,30,4\n1,20,2\n4,9,9\n")
    assert [r["rate"] for r in simulated(num_requests=3, duration_s=0.0)[0]["runs"]] == [0.75], "3 requests in 4 s"


def test_cache_modes_without_a_flag_are_those_of_the_policy():
    def chosen(policies, modes=""):
        return [
            (policy, mode) for policy, mode, _ in configurations(SimulateArgs(policies=policies, cache_modes=modes))
        ]

    assert chosen("fcfs,vllm-v1") == [("fcfs", "kv"), ("fcfs", "hybrid"), ("vllm-v1", "kv")]
    assert chosen("vllm-v0,fcfs", "hidden") == [("vllm-v0", "hidden"), ("fcfs", "hidden")]


def test_the_plot_has_the_figures_and_nothing_that_changes_from_run_to_run(simulated, tmp_path, monkeypatch):
    """Rendering takes seconds and is tested elsewhere."""
    drawn = []

    def savefig(self, file, **options):
        drawn.append((self, options))
        file.write(b"drawn")

    monkeypatch.setattr(Figure, "savefig", savefig)
    kinds = (("png", {"Software": None}), ("svg", None))
    for kind, metadata in kinds:
        path = tmp_path / f"p.{kind}"
        result, _, _ = simulated(rate="2,4", cache_modes="kv,hidden", seeds="0,1", plot=path)
        figure, options = drawn.pop()
        assert path.read_bytes() == b"drawn" and (options["format"], options["metadata"]) == (kind, metadata)
    cliff, ttft, batch, mix = figure.axes
    first_seed = [r for r in result["runs"] if r["seed"] == 0]
    lines = [line for line in cliff.lines]
    assert [line.get_label() for line in lines] == ["fcfs kv", "fcfs hidden/absorbed"]
    assert [list(line.get_xdata()) for line in lines] == [[2.0, 4.0]] * 2
    expected = [100 * r["attainment"] for r in first_seed]
    assert [y for line in lines for y in line.get_ydata()] == pytest.approx(expected, abs=1e-3)
    assert cliff.get_ylim() == (0, 102) and cliff.get_legend() is not None and ttft.get_legend() is not None
    assert ttft.get_xscale() == "log" and [line.get_label() for line in ttft.lines[:2]] == [
        "fcfs kv at 4/s", "fcfs hidden/absorbed at 4/s",
    ]  # fmt: skip
    assert list(ttft.lines[0].get_ydata()[[0, -1]]) == [0, 100]
    assert batch.get_title() == "requests per iteration" and "instance" not in mix.get_title()
    held = [max(line.get_ydata()) for line in mix.lines]
    assert max(held) <= 100 and max(held) > 10
    simulated(rate="4", instances=2, plot=tmp_path / "q.png")
    assert drawn.pop()[0].axes[2].get_title() == "requests per iteration, first instance"


def test_the_json_file_holds_what_is_returned_and_leaves_out_what_changes_no_figure(simulated, tmp_path):
    result, _, _ = simulated(rate="2", json=tmp_path / "a.json", plot=None)
    assert json.loads((tmp_path / "a.json").read_text()) == json.loads(json.dumps(result))
    assert not {"json", "plot", "jobs"} & result["arguments"].keys()
    assert (result["num_blocks"], result["block_size"], result["arguments"]["rate"]) == (60, 16, "2")


def test_figures_are_in_the_order_in_which_they_are_read(simulated, tmp_path):
    simulated(rate="2", json=tmp_path / "a.json")
    names = list(json.loads((tmp_path / "a.json").read_text()))
    assert names == ["arguments", "num_blocks", "block_size", "runs", "means", "effective_throughput"]


class Started(Exception):
    """Instead of a simulation: what would be simulated."""


@pytest.mark.parametrize(
    ("flags", "seconds"),
    [({"rate": "1"}, MIN_DURATION_S), ({"effective_throughput": "0.9"}, SUSTAINED_S), ({"duration_s": 7.0}, 7.0)],
)
def test_how_long_requests_arrive_without_a_flag(flags, seconds, monkeypatch):
    """As long as it takes to say whether a rate lasts, where that is the question."""

    def start(args, chosen, rates, seeds, questions):
        raise Started([experiment.duration_s for experiment, _ in chosen])

    monkeypatch.setattr("apt_jax.simulation.cli._simulate", start)
    with pytest.raises(Started) as caught:
        run(SimulateArgs(policies="fcfs", cache_modes="kv", **flags))
    assert caught.value.args == ([seconds],)


def test_what_is_wrong_is_told_before_the_simulation(monkeypatch, tmp_path):
    def start(*args):
        raise Started

    monkeypatch.setattr("apt_jax.simulation.cli._simulate", start)
    for flags, sentence in (
        ({"router": "none"}, "unknown router='none'"), ({"plot": tmp_path / "a.none"}, "the format '.none' is unknown"),
        ({"json": tmp_path}, "is a folder"), ({"classes": tmp_path / "none.csv"}, "none.csv"),
    ):  # fmt: skip
        with pytest.raises((ValueError, OSError), match=sentence):
            run(SimulateArgs(policies="fcfs", cache_modes="kv", **flags))
    with pytest.raises(Started):
        run(SimulateArgs(policies="fcfs", cache_modes="kv", rate="1", plot=tmp_path / "a.png"))


def test_the_progress_counts_points(simulated, monkeypatch):
    bars = []

    class Bar(tqdm):
        def __init__(self, **options):
            bars.append(self)
            super().__init__(**{**options, "disable": False, "file": io.StringIO()})

    monkeypatch.setattr("apt_jax.simulation.cli.tqdm", Bar)
    simulated(rate="2,4", seeds="0,1")
    assert [(bar.n, bar.total, bar.postfix) for bar in bars] == [(4, 4, "fcfs/kv/absorbed at 4/s")]
