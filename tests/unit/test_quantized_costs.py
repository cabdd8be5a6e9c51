"""What int8 weights change in the cost model and in what fits beside them, by hand; the flag of `simulate`."""

import json
from dataclasses import replace

import pytest

from apt_jax.cache import CacheKind
from apt_jax.model_config import ModelConfig
from apt_jax.scheduling.costs.cost_model import CostModel, cache_blocks
from apt_jax.scheduling.costs.hardware import HARDWARE, MODELS, Hardware
from apt_jax.scheduling.costs.step_load import Chunk
from apt_jax.scheduling.costs.weight_sizes import WeightSizes
from apt_jax.simulation.cli import run
from apt_jax.simulation.options import SimulateArgs

# A layer has 4 x 8 x 8 + 2 x 8 x 32 = 768 numbers in its projections, and 9 x 8 + 32 = 104 in biases and norms. Its
# projections have 8 inputs and 8 outputs four times, and 8 and 32 twice: 144 scales and factors.
TOY = ModelConfig(
    vocab_size=100, hidden_size=8, num_hidden_layers=2, ffn_dim=32, num_attention_heads=2, word_embed_proj_dim=8,
    max_position_embeddings=50,
)  # fmt: skip
# 500 operations and 2,000 bytes a second
SLOW = Hardware("toy", 1e6, 1000, 8000, 1000, "made up", 0.5, 0.25, overhead_s=0.5)
WIDE, INT8, DYNAMIC = (CostModel(TOY, SLOW, quantization=name) for name in ("none", "int8", "int8-dynamic"))


def test_bytes_of_weights():
    assert WeightSizes(TOY).nbytes == 2 * (2 * (768 + 104) + 800)
    assert WeightSizes(TOY, "int8").nbytes == 2 * (768 + 4 * 144 + 2 * 104) + 800 + 4 * 100
    assert WeightSizes(TOY, "int8-dynamic").nbytes == WeightSizes(TOY, "int8").nbytes
    assert WeightSizes(TOY, "int8").count == WeightSizes(TOY).count == 2 * 872 + 800
    assert INT8.weight_bytes == WeightSizes(TOY, "int8").nbytes + 2 * 50 * 8


def test_an_iteration_reads_the_bytes_as_they_are_stored():
    assert WIDE.weights_s == 5088 / 2000
    assert INT8.weights_s == DYNAMIC.weights_s == 4304 / 2000


def test_only_dynamic_products_are_faster_and_not_those_of_keys_and_values():
    assert INT8.token_s == WIDE.token_s == 2 * 2 * 872 / 500
    assert INT8.logits_s == WIDE.logits_s == 2 * 800 / 500
    assert DYNAMIC.token_s == pytest.approx(2 * 2 * (872 - (768 - 2 * 64) / 2) / 500)
    assert DYNAMIC.logits_s == 800 / 500
    unknown = CostModel(TOY, replace(SLOW, int8_rate=1.0), quantization="int8-dynamic")
    assert (unknown.token_s, unknown.logits_s) == (WIDE.token_s, WIDE.logits_s)
    assert HARDWARE["tpu7x"].int8_rate == 1.0 and HARDWARE["a100-40gb"].int8_rate == 2.0


def test_projecting_a_cached_prefix_reads_half_of_the_kernels():
    v5e = HARDWARE["tpu-v5e"]
    chunk = Chunk(CacheKind.HIDDEN.index, 512, 16)  # few cached tokens: reading Wk and Wv is what takes time
    wide, int8 = (CostModel(MODELS["opt-13b"], v5e, quantization=name) for name in ("none", "int8"))
    read_s = 40 * 2 * 5120**2 / (v5e.bytes_per_s * v5e.bandwidth_efficiency)
    kernel = v5e.prefix_kernel
    assert not kernel.absorbs(chunk, wide.model)
    assert wide.prefix_s(CacheKind.HIDDEN, 512, 16) - int8.prefix_s(CacheKind.HIDDEN, 512, 16) == pytest.approx(read_s)


@pytest.mark.parametrize("name", ["opt-1.3b", "opt-13b", "opt-66b"])
def test_scales_are_a_fraction_of_large_models(name):
    share = WeightSizes(MODELS[name], "int8").nbytes / WeightSizes(MODELS[name]).nbytes
    assert 0.5 < share < 0.505


def test_blocks_take_the_memory_that_the_weights_give_back():
    settings = {"block_size": 16, "max_num_batched_tokens": 2048, "max_num_seqs": 256}
    models = [CostModel(MODELS["opt-13b"], HARDWARE["a100-40gb"], quantization=name) for name in ("none", "int8")]
    wide, int8 = (cache_blocks(model, **settings) for model in models)
    saved = models[0].weight_bytes - models[1].weight_bytes
    assert abs((int8 - wide) - saved / (40 * 5120 * 2 * 16)) < 1
    v5e = replace(models[0], hardware=HARDWARE["tpu-v5e"], model=MODELS["opt-6.7b"])
    with pytest.raises(ValueError, match="leave no room"):
        cache_blocks(replace(v5e, model=MODELS["opt-13b"]), **settings)
    assert cache_blocks(replace(v5e, quantization="int8"), **settings) > 2 * cache_blocks(v5e, **settings)


def test_simulate_has_the_flag_and_says_what_it_simulated(tmp_path):
    def simulated(quantization: str, **options) -> dict:
        file = tmp_path / f"{quantization}.json"
        arguments = SimulateArgs(
            quantization=quantization, policies="fcfs", cache_modes="kv", num_requests=10, duration_s=2, json=file,
            jobs=1, **options,
        )  # fmt: skip
        run(arguments)
        return json.loads(file.read_text())

    wide, int8 = simulated("none", rate="4"), simulated("int8", rate="4")
    assert int8["arguments"]["quantization"] == "int8"
    assert int8["num_blocks"] > wide["num_blocks"]
    assert int8["runs"][0]["p50_tbt_s"] < wide["runs"][0]["p50_tbt_s"]
    with pytest.raises(ValueError, match="unknown quantization 'int4'; known: none, int8, int8-dynamic"):
        simulated("int4", rate="4")
