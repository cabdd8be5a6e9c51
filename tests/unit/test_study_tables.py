"""The tables in docs/studies say what the figures beside them say, and every point of a study has its figures."""

import json
from pathlib import Path

import pytest

from experiments.studies.__main__ import has_figures
from experiments.studies.catalogue import STUDIES
from experiments.studies.tables import rates_table, routing_table, seed_of, targets_table
from experiments.systems import elastic, fairness, spatial, spot, switching

FOLDER = Path(__file__).parents[2] / "docs" / "studies"
OTHERS = {"switching": switching, "fair_users": fairness, "spatial": spatial, "spot": spot, "elastic": elastic}


def rows_of(name):
    return json.loads((FOLDER / f"{name}.json").read_text("utf-8"))["rows"]


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_a_study_has_every_point_and_its_table_is_of_them(study):
    rows = rows_of(study.name)
    assert {(row["case"], row.get("rate"), seed_of(row)) for row in rows} == {
        (case.label, rate, seed) for case, rate, seed in study.points
    }
    assert all(map(has_figures, rows))
    table = routing_table if study.over else targets_table if study.targets else rates_table
    assert table(study, rows) == (FOLDER / f"{study.name}.md").read_text("utf-8")


@pytest.mark.parametrize("name", OTHERS)
def test_tables_between_words_are_those_of_the_figures(name):
    assert OTHERS[name].table(rows_of(name)).strip() in (FOLDER / f"{name}.md").read_text("utf-8")
