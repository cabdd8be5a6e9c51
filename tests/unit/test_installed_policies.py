"""Policies of other packages: a real small package in a folder of its own, with the metadata that pip writes."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from apt_jax.scheduling.abandonment import Abandoning
from apt_jax.scheduling.policies.catalogue import make_policy, policy_names
from apt_jax.scheduling.policies.fcfs import Fcfs
from apt_jax.scheduling.policies.interface import PolicyContext
from tests.support.scheduling_loop import TINY, make_state, request, serve

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "scheduling" / "README.md"
BROKEN = """
class NoPolicy:
    pass

class Bare:
    def __init__(self):
        pass
    def schedule(self, state, now): ...
    def finished(self, request, now): ...

value = 7
"""


def install(folder, name, modules, entry_points):
    """What `pip install --target` leaves of a package: its modules and its metadata."""
    for module, text in modules.items():
        (folder / f"{module}.py").write_text(text)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[apt_jax.scheduling_policies]\n{entry_points}\n")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The package of the guide, installed."""
    guide = GUIDE.read_text("utf-8")
    code = re.search(r"```python\n(.*?)```", guide, re.DOTALL)[1]
    entry = re.search(r"```toml\n\[project\.entry-points\.\"apt_jax\.scheduling_policies\"\]\n(.*?)\n```", guide)[1]
    modules = {
        "newest_first": code, "broken_policies": BROKEN, "failing_policies": "raise RuntimeError('no licence')",
        "needs_others": "import nothing_of_that_name",
    }  # fmt: skip
    names = 'fcfs = "newest_first:NewestFirst"\nbroken = "broken_policies:Gone"'
    install(tmp_path, "newest-first", modules, f"{entry}\n{names}".replace('"', ""))
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield tmp_path
    for module in modules:
        sys.modules.pop(module, None)


@pytest.mark.parametrize("name", ["newest-first", "newest_first:NewestFirst"])
def test_it_is_found_by_its_entry_point_and_by_module_and_class_and_serves(package, name):
    policy = make_policy(f"{name}:patience_s=0.5", PolicyContext(TINY))
    assert type(policy).__name__ == "NewestFirst" and policy.options.patience_s == 0.5
    assert make_policy(name).options.patience_s == 5.0
    requests = [request(5 + 7 * k % 23, 3 + 5 * k % 17, 0.05 * k) for k in range(25)]
    plans = serve(make_state(24, 4, 6, 32, "hybrid"), policy, requests, 0.05)
    assert all(len(r.output_token_ids) == r.max_new_tokens for r in requests) and plans
    newest = make_policy(name, PolicyContext(TINY))
    state = make_state(40, max_num_seqs=1)
    for number in range(3):
        state.add(request(name=f"r{number}"))
    assert [entry.request.request_id for entry in newest.schedule(state, 1.0).scheduled] == ["r2"]
    assert [entry.request.request_id for entry in newest.schedule(state, 9.0).scheduled] == ["r0"]


def test_names_of_our_own_policies_are_not_replaced(package):
    assert isinstance(make_policy("fcfs"), Fcfs) and "newest-first" not in policy_names()


def test_the_operator_s_limit_goes_around_it_too(package):
    assert isinstance(make_policy("newest-first", PolicyContext(abandon_after_s=1.0)), Abandoning)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "oldest-first",
            r"unknown scheduling_policy='oldest-first'; known: alise, .*newest-first.*MODULE:CLASS of your own",
        ),
        ("nowhere:Policy", r"'nowhere:Policy': No module named 'nowhere'; install the package .* PYTHONPATH"),
        ("needs_others:Policy", r"No module named 'nothing_of_that_name'; install"),
        ("failing_policies:Policy", r"importing failing_policies failed: RuntimeError: no licence"),
        ("newest_first:Oldest", r"newest_first has no 'Oldest'; policies in it: NewestFirst"),
        ("broken", r"'broken' of the package newest-first: broken_policies has no 'Gone'; policies in it: Bare"),
        ("broken_policies:NoPolicy", r"is no policy: it must be a class with the methods schedule and finished"),
        ("broken_policies:value", r"is no policy"),
        ("broken_policies:Bare", r"'broken_policies:Bare' cannot be made from a PolicyContext: .*positional argument"),
        ("newest-first:patience=2", r"unknown option 'patience=2' of policy 'newest-first'; .*patience_s=5.0"),
        ("newest_first:NewestFirst:patience_s=long", r"patience_s='long' .* must be of type float"),
        ("apt:mixed", r"unknown option 'mixed' of policy 'apt'"),
    ],
)
def test_what_cannot_be_used_is_told_in_a_sentence(package, name, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        make_policy(name)
    assert "\n" not in str(caught.value)


def test_one_name_from_two_packages_is_refused_and_the_classes_named(package, tmp_path):
    install(tmp_path, "rival", {"rival": BROKEN}, "newest-first = rival:Bare")
    importlib.invalidate_caches()
    with pytest.raises(ValueError, match="several installed packages: newest_first:NewestFirst, rival:Bare; choose"):
        make_policy("newest-first")


def test_the_command_of_the_guide_runs_it(package):
    command = re.search(r"PYTHONPATH=\. apt-jax (simulate .*)", GUIDE.read_text("utf-8"))[1].split()
    done = subprocess.run(
        [sys.executable, "-m", "apt_jax.serve.cli", *command, "--num-requests", "20", "--cache-modes", "kv"],
        capture_output=True, text=True, timeout=120, check=True, cwd=package,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{package}", "COLUMNS": "200"},
    )  # fmt: skip
    assert "newest_first:NewestFirst:patience_s=2" in done.stdout
