"""The registry of model families: what it refuses, and a family that is added by one row, here, and served."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from apt_jax.cache import CacheKind
from apt_jax.checkpoints.convert import convert, verify
from apt_jax.checkpoints.errors import CheckpointError
from apt_jax.checkpoints.export import export_huggingface
from apt_jax.checkpoints.families import FAMILIES, Family, family_of, parse_config, read_config
from apt_jax.checkpoints.load import load_model
from apt_jax.checkpoints.mapping import Layout, Slot, WeightMapping
from apt_jax.cpu_kernels import library
from apt_jax.cpu_kernels.packed import PackedKernel
from apt_jax.engine.engine import Engine
from apt_jax.engine.setup import set_up
from apt_jax.engine_config import EngineConfig
from apt_jax.execution.forms.native import NativeForm
from apt_jax.execution.weights.choice import serving_layout
from apt_jax.model_config import ModelConfig
from apt_jax.models.activations import ACTIVATION_FUNCTIONS
from apt_jax.models.interface import causal_attention, run_layers, stack_layers
from apt_jax.models.linear import AttentionProjections, Embedding, Linear
from tests.support.checkpoint_folders import assert_same_parameters, random_model, write_safetensors
from tests.support.engines import GREEDY, Orders, finish

# The family: learned positions, GELU, pre-norm, RMS norms with an epsilon of its own, no biases but in the MLP.


@dataclass(frozen=True)
class SparrowConfig(ModelConfig):
    model_type: str = "sparrow"
    norm_epsilon: float = 1e-6

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> "SparrowConfig":
        if raw["n_embd"] % raw["n_head"]:
            raise ValueError(f"unsupported n_head={raw['n_head']}: it must divide n_embd={raw['n_embd']}")
        return cls(
            vocab_size=raw["vocab_size"], hidden_size=raw["n_embd"], num_hidden_layers=raw["n_layer"],
            ffn_dim=raw["n_inner"], max_position_embeddings=raw["n_positions"], num_attention_heads=raw["n_head"],
            word_embed_proj_dim=raw["n_embd"], bos_token_id=None, eos_token_ids=(raw["eos_token_id"],),
            pad_token_id=None, norm_epsilon=raw["norm_epsilon"],
        )  # fmt: skip


class SparrowLayer(nnx.Module):
    def __init__(self, config: SparrowConfig, *, dtype, rngs: nnx.Rngs):
        D, F, N, H = config.hidden_size, config.ffn_dim, config.num_attention_heads, config.head_dim
        norm = partial(nnx.RMSNorm, D, epsilon=config.norm_epsilon, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.norm_1, self.norm_2 = norm(), norm()
        self.self_attn = AttentionProjections(D, N, H, bias=False, dtype=dtype, rngs=rngs)
        self.up = Linear(D, F, dtype=dtype, rngs=rngs)
        self.down = Linear(F, D, dtype=dtype, rngs=rngs)

    def __call__(self, x, attend, cache, layer):
        context, cache = attend(self.self_attn, self.norm_1(x), cache, layer)
        x = x + self.self_attn.output(context)
        return x + self.down(ACTIVATION_FUNCTIONS["gelu_new"](self.up(self.norm_2(x)))), cache


class Sparrow(nnx.Module):
    def __init__(self, config: SparrowConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        D = config.hidden_size
        self.wte = Embedding(config.vocab_size, D, dtype=dtype, rngs=rngs)
        self.wpe = Embedding(config.max_position_embeddings, D, dtype=dtype, rngs=rngs)
        self.layers = stack_layers(
            lambda rngs: SparrowLayer(config, dtype=dtype, rngs=rngs), config.num_hidden_layers, rngs
        )
        self.norm = nnx.RMSNorm(D, epsilon=config.norm_epsilon, dtype=dtype, param_dtype=dtype, rngs=rngs)

    def embed(self, token_ids, positions):
        return self.wte(token_ids) + self.wpe(positions)

    def finish(self, x):
        return self.norm(x)

    def logits(self, hidden):
        return self.wte.logits(hidden)


def sparrow_slots(config: ModelConfig) -> list[Slot]:
    D, F, N, H = config.hidden_size, config.ffn_dim, config.num_attention_heads, config.head_dim
    found = [
        Slot(f"{name}.weight", (name, "embedding"), None, Layout.TABLE, (rows, D), (rows, D))
        for name, rows in (("wte", config.vocab_size), ("wpe", config.max_position_embeddings))
    ]
    kernels = (
        *((f"attn.{n}", ("self_attn", f"{n}_proj"), (D, D), (D, N, H)) for n in "qkv"),
        ("attn.out", ("self_attn", "out_proj"), (D, D), (N, H, D)),
        ("mlp.up", ("up",), (D, F), (D, F)),
        ("mlp.down", ("down",), (F, D), (F, D)),
    )
    vectors = (
        ("ln_1.weight", ("norm_1", "scale"), D), ("ln_2.weight", ("norm_2", "scale"), D),
        ("mlp.up.bias", ("up", "bias"), F), ("mlp.down.bias", ("down", "bias"), D),
    )  # fmt: skip
    for i in range(config.num_hidden_layers):
        for name, path, matrix, shape in kernels:
            found.append(Slot(f"h.{i}.{name}.weight", ("layers", *path, "kernel"), i, Layout.LINEAR, matrix, shape))
        for name, path, width in vectors:
            found.append(Slot(f"h.{i}.{name}", ("layers", *path), i, Layout.VECTOR, (width,), (width,)))
    return [*found, Slot("ln_f.weight", ("norm", "scale"), None, Layout.VECTOR, (D,), (D,))]


def without_prefix(stored: str) -> str | None:
    return None if stored == "mask" else stored.removeprefix("transformer.")


SPARROW = Family(
    "sparrow", SparrowConfig.parse, Sparrow, WeightMapping(sparrow_slots, "wte.weight", "head.weight", without_prefix)
)
CONFIG_JSON = {
    "model_type": "sparrow", "vocab_size": 96, "n_embd": 64, "n_layer": 3, "n_inner": 96, "n_positions": 64,
    "n_head": 2, "eos_token_id": 0, "norm_epsilon": 1e-3,
}  # fmt: skip
PROMPTS = [[5, 17, 80, 2, 9], [33], list(range(40, 62))]
NEW_TOKENS = 24


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A checkpoint of the family, which is served for the length of the test."""
    monkeypatch.setitem(FAMILIES, "sparrow", SPARROW)
    config = parse_config(CONFIG_JSON)
    tensors = export_huggingface(config, random_model(config, seed=3))
    kernels = {name: 0.2 * tensor if tensor.ndim == 2 else tensor for name, tensor in tensors.items()}
    path = tmp_path / "sparrow"
    path.mkdir()
    write_safetensors(path, {f"transformer.{name}": t for name, t in kernels.items()} | {"mask": np.zeros(3)})
    (path / "config.json").write_text(json.dumps(CONFIG_JSON), encoding="utf-8")
    return path


def greedy(model: Sparrow, prompt: list[int]) -> list[int]:
    """The likeliest tokens after a prompt, from whole sequences without a cache."""

    @jax.jit
    def logits(ids):
        positions = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
        x, _ = run_layers(model.layers, model.embed(ids, positions), causal_attention, None)
        return model.logits(model.finish(x))

    tokens = list(prompt)
    for _ in range(NEW_TOKENS):
        padded = np.zeros((1, CONFIG_JSON["n_positions"]), np.int32)
        padded[0, : len(tokens)] = tokens
        tokens.append(int(np.argmax(logits(padded)[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("backend", ["xla", "native"])
def test_a_family_of_one_row_generates_what_its_module_computes(backend, folder):
    """KV, hidden and converted requests in one batch, the weights laid out as the server lays them out."""
    if backend == "native":
        try:
            library.register()
        except library.Unavailable as error:
            pytest.skip(f"the C++ kernels cannot be had here: {error}")
    options = EngineConfig(
        attention_backend=backend, max_num_seqs=9, max_num_batched_tokens=16, block_size=8, num_blocks=100,
        scheduling_policy="fcfs",
    )  # fmt: skip
    loaded = load_model(
        str(folder), dtype="float32", layout=partial(serving_layout, backend=backend, block_size=options.block_size)
    )
    assert loaded.config == SparrowConfig.parse(CONFIG_JSON)
    packed = {put.func for put in loaded.weights.layers[0].in_module if put is not None} == {PackedKernel}
    assert packed == (backend == "native")
    assert not NativeForm.takes(loaded.weights)
    engine = Engine(set_up(loaded.weights, loaded.config, options))
    ids = [f"{prompt}-{how}" for prompt in range(len(PROMPTS)) for how in ("kv", "hidden", "converted")]
    engine.policy = Orders(
        kinds={i: CacheKind.KV if i.endswith("kv") else CacheKind.HIDDEN for i in ids},
        convert_at={i: 7 for i in ids if i.endswith("converted")},
    )
    params = replace(GREEDY, max_tokens=NEW_TOKENS)
    requests = {i: engine.add(PROMPTS[int(i[0])], params, request_id=i) for i in ids}
    finish(engine)
    module = load_model(str(folder), dtype="float32").model
    assert isinstance(module, Sparrow)
    expected = [greedy(module, prompt) for prompt in PROMPTS]
    assert all(len(set(tokens)) > 5 for tokens in expected)
    for i, request in requests.items():
        assert request.output_token_ids == expected[int(i[0])], i
        assert request.num_conversions == i.endswith("converted")


def test_a_family_of_one_row_is_converted_and_has_dummy_weights(folder, tmp_path):
    convert(str(folder), tmp_path / "converted")
    verify(tmp_path / "converted")
    models = [load_model(str(path), dtype="float32").model for path in (folder, tmp_path / "converted")]
    assert_same_parameters(*models)
    dummy = load_model(str(folder), load_format="dummy")
    assert isinstance(dummy.model, Sparrow)
    assert family_of(dummy.config) is SPARROW


def test_a_tensor_of_another_family_is_refused(folder):
    config = parse_config(CONFIG_JSON)
    tensors = export_huggingface(config, load_model(str(folder), dtype="float32").model)
    write_safetensors(folder, {**tensors, "model.decoder.fc1.weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(CheckpointError, match=r"holds model\.decoder\.fc1\.weight, for which"):
        load_model(str(folder))


def test_a_parser_refuses_with_the_name_of_the_file(folder):
    (folder / "config.json").write_text(json.dumps({**CONFIG_JSON, "n_head": 3}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json: unsupported n_head=3: it must divide n_embd=64$"):
        read_config(folder)


@pytest.mark.parametrize("model_type", ["sparrow", "gpt2", None, 3, ["opt"]])
def test_a_family_without_a_row_is_refused(model_type):
    assert "sparrow" not in FAMILIES
    with pytest.raises(ValueError, match=r"unsupported model_type=.*: use one of opt$"):
        parse_config({**CONFIG_JSON, "model_type": model_type})
