"""Users in simulations, and how evenly they are served."""

from dataclasses import replace

import numpy as np
import pytest

from apt_jax.request import Request, SamplingParams, Slo
from apt_jax.simulation.experiment import Experiment
from apt_jax.simulation.requests.classes import load_classes
from apt_jax.simulation.workload import load_lengths
from experiments.systems.fairness import FLOOD, evenness


def test_classes_and_tables_say_whose_requests_are(tmp_path):
    (tmp_path / "c.csv").write_text("share,name,user\n1,a,ann\n1,b,\n")
    assert [each.terms.user for each in load_classes(tmp_path / "c.csv", Slo())] == ["ann", None]
    (tmp_path / "w.csv").write_text("prompt_tokens,output_tokens,user\n5,6,ann\n7,8,\n")
    terms = load_lengths(str(tmp_path / "w.csv")).terms
    assert [each.user for each in terms] == ["ann", None]


def served(user, arrival_s, prompt, first_s, gaps_s):
    made = Request(f"{user}{arrival_s}", range(prompt), SamplingParams(), arrival_s, 99, user=user)
    made.first_token_s, made.gaps_s, made.ended_s = first_s, gaps_s, first_s + sum(gaps_s)
    return made


def test_evenness_by_hand():
    """Two users are busy for the first ten seconds, one of them for the next ten, and both for the last ten."""
    a = [served("a", 0.0, 10, 1.0, [1.0] * 12), served("a", 19.5, 4, 21.0, [1.0] * 14)]
    b = [served("b", 0.0, 4, 2.0, [2.0, 23.0, 9.0])]
    first = np.array([10 + 9 * 2.0, 4 + 2 * 2.0])  # tokens before ten seconds
    last = np.array([4 + 10 * 2.0, 2.0])  # the thirtieth second included
    indices = [each.sum() ** 2 / (2 * (each**2).sum()) for each in (first, last)]
    differences = [(each[0] - each[1]) / each.mean() for each in (first, last)]
    found = evenness([*a, *b], 30.0)
    assert found == (pytest.approx(np.mean(indices)), pytest.approx(np.mean(differences)), 2)


def test_fastswitch_by_user_serves_users_more_evenly_than_by_class():
    experiment = Experiment(num_requests=150, duration_s=30.0, num_blocks=700, classes=FLOOD)
    found = {}
    for by in ("class", "user"):
        outcome, _ = experiment.run(f"fastswitch:by={by}", "kv", "one-pass", 5.0)
        assert {request.user for request in outcome.requests} == {"flood", "first", "second"}
        found[by] = evenness(outcome.requests, outcome.window_s)
    assert found["user"][0] > found["class"][0] + 0.05 and found["user"][1] < found["class"][1]
    assert replace(experiment, classes=None).request_classes == []
