"""The studies' bookkeeping: going on after an interruption, ratios, and a small study end to end."""

import json
from dataclasses import replace

from apt_jax.simulation.experiment import Experiment
from apt_jax.simulation.throughput.searches import Found
from experiments.studies.__main__ import run
from experiments.studies.catalogue import STUDIES, Case, Study
from experiments.studies.pictures import draw_rates, draw_targets
from experiments.studies.tables import head, rates_table, targets_table

SMALL = Experiment(model="opt-125m", hardware="tpu-v5e", workload="humaneval", num_blocks=260, num_requests=10)
CASES = (Case("KV", "fcfs", "kv", experiment=SMALL), Case("both", "apt", "hybrid", experiment=SMALL))
STUDY = Study("small", "Why?", CASES, rates=(0.03, 0.06), columns=("strict_attainment", "mean_batch", "longest_wait_s"))


def test_a_study_goes_on_where_it_was_stopped_with_the_same_figures(tmp_path):
    path = tmp_path / "small.json"
    rows = run(STUDY, path)
    assert [(r["case"], r["rate"]) for r in rows] == [("KV", 0.03), ("KV", 0.06), ("both", 0.03), ("both", 0.06)]
    stored = json.loads(path.read_text())
    del stored["rows"][1]
    del stored["rows"][0]["moved_bytes"]  # a row of an older version
    path.write_text(json.dumps(stored))
    assert run(STUDY, path) == rows
    table = rates_table(STUDY, rows)
    assert "| KV | 0.03 | " in table and table.count("\n") == 4 + len(rows)
    draw_rates(STUDY, rows, tmp_path / "small.png")
    assert (tmp_path / "small.png").stat().st_size > 1000


def searched(rate, seed=0):
    return [
        {
            "reading": reading,
            "target": 0.9,
            "rate": times * rate,
            "not_sustained": more * rate,
            "fluid_bound": 9.0,
            "seeds": [seed],
        }
        for reading, times, more in (("strict", 1, 0), ("paper", 2, 3))
    ]


def test_ratios_are_to_the_first_case_of_the_same_experiment(tmp_path):
    study = next(s for s in STUDIES if s.name == "workloads")
    rows = [{"case": case.label, "effective_throughput": searched(float(k))} for k, case in enumerate(study.cases, 1)]
    lines = targets_table(study, rows).splitlines()[4:]
    cells = [[cell.strip(" |") for cell in line.split(" | ")] for line in lines]
    assert [row[1] for row in cells] == ["1.00", "2.00", "3.00", "4.00"]
    assert cells[0][2] == "2.00 (3.00)", "a rate that is kept and does not last is in brackets"
    assert [row[3] for row in cells] == ["1.00", "2.00", "1.00", "1.33"] and cells[0][5] == "9.00"
    draw_targets(study, rows, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 1000


def test_a_target_that_a_case_was_not_asked_has_no_figure(tmp_path):
    study = replace(STUDY, rates=(), targets=(0.9, 0.99))
    both = [*searched(2.0), *({**each, "target": 0.99} for each in searched(1.0))]
    rows = [
        {"case": "KV", "effective_throughput": both},
        {"case": "both", "effective_throughput": [{**searched(3.0)[0], "target": 0.99}]},
    ]
    cells = [cell.strip() for cell in targets_table(study, rows).splitlines()[-1].split("|")]
    assert cells[2:11] == ["-", "-", "3.00", "-", "-", "-", "3.00", "-", "9.00"]
    draw_targets(study, rows, tmp_path / "bars.png")


def test_a_case_is_searched_for_its_own_targets(tmp_path, monkeypatch):
    def search(experiment, configuration, questions):
        yield from ()
        return dict.fromkeys(questions, Found(1.0, True, 0.0))

    monkeypatch.setattr("experiments.studies.__main__.search", search)
    cases = (replace(CASES[0], targets=(0.5,)), CASES[1])
    rows = run(replace(STUDY, cases=cases, rates=(), targets=(0.9, 0.99)), tmp_path / "small.json")
    assert [{each["target"] for each in row["effective_throughput"]} for row in rows] == [{0.5}, {0.9, 0.99}]


def test_several_seeds_are_means_with_their_spread(tmp_path):
    study = replace(STUDY, rates=(0.06,), seeds=(0, 1, 2))
    rows = run(study, tmp_path / "small.json")
    assert [(r["case"], r["seed"]) for r in rows] == [(case, seed) for case in ("KV", "both") for seed in (0, 1, 2)]
    assert len({r["mean_batch"] for r in rows}) > 2, "another seed is another run"
    made_up = [{"case": "KV", "rate": 1.0, "seed": k, "strict_attainment": x} for k, x in enumerate((0.5, 0.7, 0.9))]
    table = rates_table(replace(study, columns=("strict_attainment",)), made_up)
    assert "| KV | 1 | 70.0% ± 11.5 |" in table and "3 seeds" in table  # sqrt(0.04 / 3)
    draw_rates(study, rows, tmp_path / "small.png")
    study = replace(STUDY, rates=(), cases=CASES[:1], targets=(0.9,), seeds=(0, 1))
    found = [{"case": "KV", "effective_throughput": searched(rate, seed)} for seed, rate in enumerate((1.0, 2.0))]
    line = targets_table(study, found).splitlines()[-1]
    assert [cell.strip() for cell in line.split("|")][1:4] == ["KV", "1.50 ± 0.71", "3.00 ± 1.41 (4.50)"]


def test_every_column_has_a_heading_and_names_and_labels_are_unique():
    assert all(head(column) for study in STUDIES for column in study.columns)
    assert len({s.name for s in STUDIES}) == len(STUDIES)
    for study in STUDIES:
        assert len({c.label for c in study.cases}) == len(study.cases), study.name
        assert bool(study.points[0][1]) != bool(study.targets)
