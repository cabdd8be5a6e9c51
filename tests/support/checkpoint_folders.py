"""Tiny OPT configs of every variant, models with random parameters, and checkpoint folders of them."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from flax import nnx, serialization, traverse_util
from safetensors.numpy import save_file

from apt_jax.checkpoints.mapping import Layout
from apt_jax.checkpoints.mappings.opt import OPT_MAPPING
from apt_jax.checkpoints.skeleton import Skeleton
from apt_jax.model_config import ModelConfig
from apt_jax.models.opt import OPT

TINY = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=3,
    ffn_dim=48,
    max_position_embeddings=16,
    num_attention_heads=4,
    word_embed_proj_dim=32,
)
VARIANTS = {
    "plain": TINY,
    "post_norm": dataclasses.replace(TINY, do_layer_norm_before=False),
    "no_final_norm": dataclasses.replace(TINY, remove_final_layer_norm=True),
    "projected": dataclasses.replace(TINY, word_embed_proj_dim=24),
    "no_bias": dataclasses.replace(TINY, enable_bias=False),
    "no_affine": dataclasses.replace(TINY, layer_norm_elementwise_affine=False),
    "untied": dataclasses.replace(TINY, tie_word_embeddings=False, word_embed_proj_dim=24),
}


def random_model(config: ModelConfig, *, seed: int, dtype="float32") -> OPT:
    """A model with numpy's normal draws everywhere, biases and scales too; compiles nothing."""
    generator = np.random.default_rng(seed)
    skeleton = Skeleton.of(config, np.dtype(dtype))
    return skeleton.fill(
        {
            path: jax.device_put(generator.normal(size=abstract.shape).astype(abstract.dtype))
            for path, abstract in skeleton.shapes.items()
        }
    )


def assert_same_parameters(found: OPT, expected: OPT) -> None:
    """Same paths, dtypes and bits."""
    left, right = (dict(nnx.to_flat_state(nnx.state(model))) for model in (found, expected))
    assert left.keys() == right.keys()
    for path in left:
        a, b = np.asarray(left[path][...]), np.asarray(right[path][...])
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path
        assert a.tobytes() == b.tobytes(), path


def write_config(folder: Path, config: ModelConfig, **changes) -> None:
    """Write the config.json of `config`, as transformers spells it."""
    fields = dataclasses.asdict(config)
    fields["_remove_final_layer_norm"] = fields.pop("remove_final_layer_norm")
    fields["torch_dtype"] = fields.pop("checkpoint_dtype")
    fields["eos_token_id"] = fields.pop("eos_token_ids")[0]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**fields, **changes}))


def flax_tree(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> dict[tuple[str, ...], np.ndarray]:
    """Torch tensors by name as the flattened Flax tree of transformers' FlaxOPTForCausalLM."""
    result = {}
    for name, slot in OPT_MAPPING.slots(config).items():
        *parents, leaf = name.split(".")
        if leaf == "weight":
            leaf = {Layout.TABLE: "embedding", Layout.LINEAR: "kernel", Layout.VECTOR: "scale"}[slot.layout]
        tensor = tensors[name]
        result[(*parents, leaf)] = tensor.T if slot.layout is Layout.LINEAR else tensor
    return result


def write_safetensors(folder: Path, tensors: Mapping[str, np.ndarray], shards: int = 1) -> None:
    """Write `model.safetensors`, or `shards` of it and their index."""
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    for name, part in _shards(folder, "model", "safetensors", contiguous, shards, "."):
        save_file(part, folder / name)


def write_flax(folder: Path, flat: Mapping[tuple[str, ...], np.ndarray], shards: int = 1) -> None:
    """Write `flax_model.msgpack`, or `shards` of it and their index, with flax's own serialization."""
    joined = {"/".join(path): tensor for path, tensor in flat.items()}
    for name, part in _shards(folder, "flax_model", "msgpack", joined, shards, "/"):
        tree = traverse_util.unflatten_dict(part, sep="/")
        (folder / name).write_bytes(serialization.msgpack_serialize(tree))


def _shards(folder, stem, ending, tensors, shards, separator):
    if shards == 1:
        return [(f"{stem}.{ending}", dict(tensors))]
    parts: list[dict] = [{} for _ in range(shards)]
    for number, (name, tensor) in enumerate(tensors.items()):
        parts[number % shards][name] = tensor
    names = [f"{stem}-{i + 1:05}-of-{shards:05}.{ending}" for i in range(shards)]
    weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    index = folder / f"{stem}.{ending}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return list(zip(names, parts, strict=True))
