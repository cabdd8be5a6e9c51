"""Run studies and write their figures: `python -m experiments.studies sharegpt cliff --out docs/studies`.

Each writes NAME.json (every figure), NAME.md (its table) and NAME.png. A study that was interrupted goes on where it
stopped: points that NAME.json has are not simulated again.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from apt_jax.simulation.search import effective_throughput
from experiments.studies.catalogue import STUDIES, Case, Study
from experiments.studies.pictures import draw_rates, draw_routing, draw_targets
from experiments.studies.tables import rates_table, routing_table, targets_table

Row = dict[str, Any]


def run(study: Study, path: Path) -> list[Row]:
    """The rows of a study; those that `path` has are taken from it, and it is written after each new one."""
    rows: list[Row] = json.loads(path.read_text("utf-8"))["rows"] if path.exists() else []
    points = study.points
    wanted = {(case.label, rate) for case, rate in points}
    rows = [row for row in rows if (row["case"], row.get("rate")) in wanted]
    done = {(row["case"], row.get("rate")) for row in rows}
    for case, rate in tqdm([p for p in points if (p[0].label, p[1]) not in done], desc=study.name, unit="point"):
        start = max((max(row["rates"].values()) for row in rows if "rates" in row), default=1.0)
        rows.append(_simulate(case, rate) if rate is not None else _search(case, study.targets, start))
        path.write_text(json.dumps({"question": study.question, "rows": rows}, indent=1) + "\n", "utf-8")
    order = [case.label for case in study.cases]
    return sorted(rows, key=lambda row: (order.index(row["case"]), row.get("rate", 0)))


def _simulate(case: Case, rate: float) -> Row:
    _, report = case.experiment.run(case.policy, case.cache_mode, case.hidden_attention, rate)
    assert report is not None
    return {"case": case.label, **report.as_dict()}


def _search(case: Case, targets: tuple[float, ...], start: float) -> Row:
    reaches = case.experiment.reaches(case.policy, case.cache_mode, case.hidden_attention)
    found = effective_throughput(reaches, targets, start=start)
    return {"case": case.label, "rates": {f"{target:g}": float(f"{rate:.4g}") for target, rate in found.items()}}


def main() -> None:
    """Command line."""
    names = [study.name for study in STUDIES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*names, []], help=f"default: all of {', '.join(names)}")
    parser.add_argument("--out", type=Path, default=Path("docs/studies"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for study in STUDIES:
        if args.names and study.name not in args.names:
            continue
        rows = run(study, args.out / f"{study.name}.json")
        if study.over:
            table, draw = routing_table, draw_routing
        else:
            table, draw = (rates_table, draw_rates) if study.rates else (targets_table, draw_targets)
        text = table(study, rows)
        (args.out / f"{study.name}.md").write_text(text, "utf-8")
        draw(study, rows, args.out / f"{study.name}.png")
        print(text)


if __name__ == "__main__":
    main()
