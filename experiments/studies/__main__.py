"""Run studies and write their figures: `python -m experiments.studies sharegpt cliff --out docs/studies`.

Each writes NAME.json (every figure), NAME.md (its table) and NAME.png. A study that was interrupted goes on where it
stopped: points that NAME.json has are not simulated again.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from apt_jax.host_limits import usable_processors
from apt_jax.run_figures import SUSTAINED_S
from apt_jax.simulation.throughput.points import Job, Task, run_jobs
from apt_jax.simulation.throughput.questions import READINGS, Question
from apt_jax.simulation.throughput.searches import search, throughput_rows
from experiments.studies.catalogue import STUDIES, Case, Study
from experiments.studies.pictures import draw_rates, draw_routing, draw_targets
from experiments.studies.tables import rates_table, routing_table, seed_of, targets_table

Row = dict[str, Any]


def run(study: Study, path: Path, num_processes: int = 1) -> list[Row]:
    """The rows of a study; those that `path` has are taken from it, and it is written after each new one."""
    rows: list[Row] = json.loads(path.read_text("utf-8"))["rows"] if path.exists() else []
    wanted = {(case.label, rate, seed) for case, rate, seed in study.points}
    rows = [row for row in rows if has_figures(row) and _key(row) in wanted]
    done = {_key(row) for row in rows}
    order = [case.label for case in study.cases]

    def keep(case: Case, rate: float | None, seed: int) -> Job:
        seeded = replace(case, experiment=replace(case.experiment, seed=seed))
        row = yield from _simulate(seeded, rate) if rate is not None else _search(seeded, case.targets or study.targets)
        rows.append({"case": case.label, **row})
        rows.sort(key=lambda row: (order.index(row["case"]), row.get("rate", 0), seed_of(row)))
        path.write_text(json.dumps({"question": study.question, "rows": rows}, indent=1) + "\n", "utf-8")
        bar.update()

    missing = [point for point in study.points if (point[0].label, *point[1:]) not in done]
    with tqdm(total=len(missing), desc=study.name, unit="point") as bar:
        run_jobs([keep(*point) for point in missing], num_processes)
    return rows


def has_figures(row: Row) -> bool:
    """Whether a row of a file has today's figures; older ones are simulated again."""
    return "effective_throughput" in row or "moved_bytes" in row


def _key(row: Row) -> tuple[str, float | None, int]:
    return row["case"], row.get("rate"), seed_of(row)


def _simulate(case: Case, rate: float) -> Job:
    point = yield Task(case.experiment, case.configuration, rate)
    assert point.report is not None
    row = point.report.as_dict()
    phases = {phase["name"].replace(" ", "_"): phase["strict_attainment"] for phase in point.report.attainment_by_phase}
    return {**row, **phases}


def _search(case: Case, targets: tuple[float, ...]) -> Job:
    """Effective throughput in both readings, and the bound."""
    questions = [Question(reading, target) for reading in READINGS for target in targets]
    experiment = replace(case.experiment, duration_s=max(case.experiment.duration_s, SUSTAINED_S))
    found = yield from search(experiment, case.configuration, questions)
    policy, mode, attention = case.configuration
    names = {
        "policy": policy, "cache_mode": mode, "hidden_attention": attention, "cache_dtype": experiment.cache_dtype,
        "quantization": experiment.quantization,
    }  # fmt: skip
    bound = experiment.fluid_bound(case.configuration)
    return {"effective_throughput": throughput_rows(names, questions, [experiment.seed], [found], bound)}


def main() -> None:
    """Command line."""
    names = [study.name for study in STUDIES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*names, []], help=f"default: all of {', '.join(names)}")
    parser.add_argument("--out", type=Path, default=Path("docs/studies"))
    parser.add_argument("--jobs", type=int, default=usable_processors(), help="processes; default: one per CPU")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for study in STUDIES:
        if args.names and study.name not in args.names:
            continue
        rows = run(study, args.out / f"{study.name}.json", args.jobs)
        if study.over:
            table, draw = routing_table, draw_routing
        else:
            table, draw = (targets_table, draw_targets) if study.targets else (rates_table, draw_rates)
        text = table(study, rows)
        (args.out / f"{study.name}.md").write_text(text, "utf-8")
        draw(study, rows, args.out / f"{study.name}.png")
        print(text)


if __name__ == "__main__":
    main()
