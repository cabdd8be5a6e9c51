"""The settings of the studies, and what fits into their pools."""

import pytest

from apt_jax.scheduling.costs.hardware import HARDWARE, MODELS
from experiments.studies.settings import SETTINGS, capped_blocks


def test_pools_hold_what_is_said_of_them():
    tokens = {name: setting.kv_tokens for name, setting in SETTINGS.items()}
    assert tokens == {
        "v6e-13b": 6656, "v6e-6.7b": 34176, "v5e-6.7b": 4032, "h200-13b-10gb": 12192, "h200-13b": 126432,
        "a100-13b": 16304, "a100-13b-one-pass": 16304, "a100-6.7b-one-pass": 49248,
    }  # fmt: skip
    assert all(setting.experiment.device_memory_utilization == 0.92 for setting in SETTINGS.values())


def test_a_starved_pool_holds_fewer_tokens_than_64_mean_conversations():
    """ShareGPT: 157 tokens of prompt and 325 of output on average; a KV server with headroom runs more than 64."""
    for name, setting in SETTINGS.items():
        assert (setting.kv_tokens < 64 * (157 + 325 / 2)) == setting.is_starved, name


def test_the_cap_is_10_gb():
    block = 40 * 5120 * 2 * 16
    assert capped_blocks(MODELS["opt-13b"]) * block == pytest.approx(10e9, rel=block / 10e9)


def test_every_device_names_its_sheet_with_a_link():
    assert all(": https://" in device.source for device in HARDWARE.values())
    assert {name: device.link_bytes_per_s / 1e9 for name, device in HARDWARE.items() if name.startswith("tpu")} == {
        "tpu-v5e": 200, "tpu-v5p": 600, "tpu-v6e": 400, "tpu7x": 600,
    }  # fmt: skip
