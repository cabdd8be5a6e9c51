"""What decode attention costs on each preset, against figures counted by hand and those of the kernels' notes."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from apt_jax.cache import CacheKind
from apt_jax.model_config import ModelConfig
from apt_jax.scheduling.costs.cost_model import CostModel
from apt_jax.scheduling.costs.decode_kernels import START_S, DecodeKernel, Loops, Rates
from apt_jax.scheduling.costs.hardware import HARDWARE, MODELS
from apt_jax.scheduling.costs.step_load import StepLoad

KV, HIDDEN = CacheKind.KV.index, CacheKind.HIDDEN.index
MODEL = MODELS["opt-13b"]
VECTOR_BYTES, WIDE, LAYERS = 2 * 5120, 40 * 5120, 40


def opt_13b(device: str, mode: str = "absorbed") -> CostModel:
    return CostModel(MODEL, HARDWARE[device], mode)


def test_every_preset_has_the_kernel_that_runs_there():
    assert {name: device.hidden_kernel.name.split(" (")[0] for name, device in HARDWARE.items()} == {
        "a100-40gb": "XLA", "a100-80gb": "XLA", "h100-80gb": "Mosaic GPU, two passes", "h200": "Mosaic GPU, two passes",
        "tpu-v5e": "Pallas TPU, wide heads", "tpu-v5p": "Pallas TPU, wide heads", "tpu-v6e": "Pallas TPU, wide heads",
        "tpu7x": "Pallas TPU, wide heads",
    }  # fmt: skip


def test_a_one_pass_kernel_on_an_a100_moves_q_and_context_for_79_us_a_request():
    """40 us if the kernel alone moved them: 6 bytes for each of 204,800 numbers and 40 layers, at 1.244 TB/s."""
    model = opt_13b("a100-40gb", "one-pass")
    assert model.request_s[HIDDEN] == pytest.approx(2 * 6 * WIDE * LAYERS / 1.244e12)
    assert model.request_s[HIDDEN] == pytest.approx(79e-6, rel=0.01)
    assert model.attention_s[HIDDEN] == pytest.approx(model.attention_s[KV] / 2)
    assert model.hidden_delay_s(100) > 0 > model.hidden_delay_s(300), "slower when short, faster when long"


def test_a_request_is_slower_by_its_own_share_and_by_its_tokens():
    model = opt_13b("tpu-v6e")
    of_kv, of_hidden = (
        model.step_s(StepLoad(decode_requests=1, context_tokens=context, samples=1, decodes=decodes))
        for context, decodes in (((500, 0), (1, 0)), ((0, 500), (0, 1)))
    )
    assert of_hidden - of_kv == pytest.approx(model.hidden_delay_s(500))


@pytest.mark.parametrize(("tokens", "predicted"), [(256, 1.22), (512, 1.11), (1024, 1.06), (2048, 1.03)])
def test_two_passes_on_hopper_are_as_the_notes_predict(tokens, predicted):
    """docs/log/2026-11-30-gpu-kernels.md, OPT-13B, 128 rows: the kernel alone, against the KV kernel."""
    kernel = HARDWARE["h200"].hidden_kernel
    rates = Rates(1e15, 1e12, 1)
    token_s = kernel.token_s(MODEL, CacheKind.HIDDEN, 0.0, rates)
    hidden_s = kernel.own_s(MODEL, CacheKind.HIDDEN, token_s, rates) + tokens * token_s
    kv_s = tokens * HARDWARE["h200"].kv_kernel.token_s(MODEL, CacheKind.KV, 0.0, rates)
    assert hidden_s / kv_s == pytest.approx(predicted, rel=0.03)


def test_on_an_a100_xla_starts_12_programs_for_128_tokens_and_11_for_a_row():
    """32.0 us of starts for a chunk, where its bytes take 7.5; a row 29 us, where q' and context take 5.3."""
    model = opt_13b("a100-40gb")
    chunk_bytes = 4 * 128 * VECTOR_BYTES + 20 * WIDE
    found = chunk_bytes / 1.244e12, 12 * START_S, 32 * WIDE / 1.244e12, 11 * START_S
    assert found == pytest.approx((7.5e-6, 32e-6, 5.3e-6, 29e-6), rel=0.02)
    assert model.attention_s[HIDDEN] == pytest.approx(LAYERS * 12 * START_S / 128)
    assert model.request_s[HIDDEN] == pytest.approx(LAYERS * (11 + 6) * START_S)
    wide = replace(MODEL, hidden_size=100 * 5120, num_attention_heads=4000)
    assert CostModel(wide, HARDWARE["a100-40gb"]).request_s[HIDDEN] > 1000 * model.request_s[HIDDEN], "then by bytes"


@pytest.mark.parametrize(
    ("device", "kv_bound", "hidden_bound"),
    [("tpu-v5e", "HBM", "HBM"), ("tpu-v5p", "HBM", "HBM"), ("tpu-v6e", "HBM", "HBM"), ("tpu7x", "HBM", "bundles")],
)
def test_tpu_kernels_are_bound_as_their_bundles_say(device, kv_bound, hidden_bound):
    hardware, model = HARDWARE[device], opt_13b(device)
    for kind, kernel, bound in (
        (CacheKind.KV, hardware.kv_kernel, kv_bound), (CacheKind.HIDDEN, hardware.hidden_kernel, hidden_bound),
    ):  # fmt: skip
        moving = kind.blocks_per_page * VECTOR_BYTES / (0.8 * hardware.bytes_per_s)
        computing = kernel.cycles_of(5120) / kernel.cycles_per_s
        assert model.attention_s[kind.index] == pytest.approx(LAYERS * max(moving, computing))
        assert (moving > computing) == (bound == "HBM"), (kind, moving, computing)


def test_bundles_of_a_width_that_was_not_counted_lie_between_or_in_proportion():
    kernel = DecodeKernel("k", "made up", cycles={100: 2.0, 300: 4.0})
    assert [kernel.cycles_of(width) for width in (50, 100, 200, 300, 600)] == pytest.approx([1.0, 2.0, 3.0, 4.0, 8.0])


def test_hidden_decodes_read_weights_again_beside_others():
    """Two passes: 8 bytes for each number of Wv and 4 starts, a layer; Wk and Wv once more if others need keys."""
    model = opt_13b("h200")
    alone = LAYERS * (8 * 5120**2 / 3.84e12 + 4 * START_S)
    again = LAYERS * 2 * 5120**2 * 2 / 3.84e12
    wide = LAYERS * 6 * WIDE / 3.84e12
    cases = [
        (StepLoad(decode_requests=3, decodes=(3, 0)), 0.0),
        (StepLoad(decode_requests=3, decodes=(0, 3)), alone),
        (StepLoad(decode_requests=3, decodes=(2, 1)), alone + again + 2 * wide),
        (StepLoad(16, 136, decode_requests=3, decodes=(0, 3)), alone + again),
        (StepLoad(5, 0, decode_requests=3, decodes=(0, 3)), alone),  # padding is no prompt
    ]
    for load, seconds in cases:
        assert model.mixing_s(load) == pytest.approx(seconds), load
    assert replace(model, hidden_mode="recompute").mixing_s(cases[2][0]) == 0.0


def test_loops_and_bytes_of_a_toy_by_hand():
    """2 heads, 8 wide: 16 wide numbers; 1,000 bytes and 500 FLOPs a second."""
    toy = ModelConfig(hidden_size=8, num_hidden_layers=1, ffn_dim=8, num_attention_heads=2, word_embed_proj_dim=8)
    rates, hidden = Rates(500.0, 1000.0, 1), CacheKind.HIDDEN
    kernel = DecodeKernel("k", "made up", passes=3.0, head_bytes=5.0, own_bytes=2.0, batch_bytes=4.0, value_bytes=10.0)
    assert kernel.token_s(toy, hidden, 10.0, rates) == pytest.approx((3 * 16 + 5 * 2) / 1000)
    assert replace(kernel, rate=0.25).token_s(toy, hidden, 10.0, rates) == pytest.approx(40 / 500)
    assert replace(kernel, cycles={8: 30.0}, cycles_per_s=100.0).token_s(toy, hidden, 10.0, rates) == pytest.approx(0.3)
    assert kernel.own_s(toy, hidden, 7.0, rates) == pytest.approx(32 / 1000)
    assert kernel.batch_s(toy, hidden, rates) == pytest.approx(64 / 1000)
    assert kernel.layer_s(toy, rates) == pytest.approx(640 / 1000)
    looped = replace(kernel, loops=Loops(4, 3, 6.0, 2))
    assert looped.token_s(toy, hidden, 10.0, rates) == pytest.approx((3 * 16 + 5 * 2 + 6 * 16 / 4) / 1000)
    assert looped.own_s(toy, hidden, 7.0, rates) == pytest.approx(32 / 1000 + 7 * 4 / 2)


DEVICES = {
    "A100 40 GB": ("a100-40gb", "absorbed"), "A100 40 GB, `one-pass`": ("a100-40gb", "one-pass"),
    "H100": ("h100-80gb", "absorbed"), "H200": ("h200", "absorbed"), "v5e": ("tpu-v5e", "absorbed"),
    "v5p": ("tpu-v5p", "absorbed"), "v6e": ("tpu-v6e", "absorbed"), "tpu7x": ("tpu7x", "absorbed"),
}  # fmt: skip


@pytest.mark.parametrize("label", DEVICES)
def test_the_page_on_the_cost_model_shows_its_figures(label):
    model = opt_13b(*DEVICES[label])
    page = (Path(__file__).parents[2] / "docs/cost_model.md").read_text(encoding="utf-8")
    row, *_ = re.findall(rf"^\| {re.escape(label)} \| [^|]+ \| (\S+) \| (\S+) \| (\S+) \| (\S+), (\S+) \|$", page, re.M)
    alone = StepLoad(decode_requests=1, decodes=(0, 1))
    again = [model.mixing_s(load) for load in (alone, replace(alone, prefill_tokens=1, prefill_pairs=1))]
    found = [1e6 * model.attention_s[KV], 1e6 * model.attention_s[HIDDEN], 1e6 * model.request_s[HIDDEN]]
    for text, value in zip(row, [*found, *(1e3 * s for s in again)], strict=True):
        digits = len(text.partition(".")[2])
        assert float(text.replace(",", "")) == pytest.approx(value, abs=0.51 * 10**-digits), (text, value)
