"""A cache kind is declared in one place: with one more, every policy serves requests in it."""

import json
import subprocess
import sys

import pytest

from apt_jax.scheduling.policies.catalogue import policy_names


@pytest.fixture(scope="module")
def simulated():
    command = [sys.executable, "-m", "tests.support.third_kind"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("policy", policy_names())
@pytest.mark.parametrize("attention", ["one-pass", "recompute"])
def test_every_policy_serves_requests_of_another_kind(policy, attention, simulated):
    for mode, kinds in (("hidden8", {"hidden8"}), ("hybrid8", {"kv", "hidden8"})):
        found = simulated[f"{policy} {mode} {attention}"]
        assert found["ends"] == {"stop": 8}
        assert set(found["kinds"]) <= kinds


def test_apt_weighs_the_kind_that_the_mode_has(simulated):
    """Of a quarter of KV's bytes, read once, it is the faster kind; recomputed it brings less even in a full pool."""
    one_pass, recomputed = (simulated[f"apt hybrid8 {attention}"]["kinds"] for attention in ("one-pass", "recompute"))
    assert set(one_pass) == {"hidden8"}
    assert set(recomputed) == {"kv"}
