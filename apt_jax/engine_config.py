"""Frozen configuration: the model's shape, and (see EngineConfig) how it is served."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

ACTIVATIONS = (
    "relu", "relu6", "silu", "swish", "tanh", "quick_gelu",
    "gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh",
)  # fmt: skip
AttentionBackend = Literal["auto", "xla", "pallas", "native"]
CHECKPOINT_DTYPES = ("float32", "float16", "bfloat16")
# Hidden vectors of a device's slice that `hidden_slices.py` takes at once: v5e and v6e have 128 MiB of VMEM, an H200
# 50 MB of L2 cache. Here because the cost model counts with it too.
GROUP_BYTES = 48 * 2**20
POSITION_OFFSET = 2  # OPT's embedding table has two unused rows before position 0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of an OPT decoder, in the field names of Hugging Face's `OPTConfig`.

    Source: transformers `configuration_opt.py`.
    """

    vocab_size: int = 50272
    hidden_size: int = 768
    num_hidden_layers: int = 12
    ffn_dim: int = 3072
    max_position_embeddings: int = 2048
    num_attention_heads: int = 12
    word_embed_proj_dim: int = 768
    do_layer_norm_before: bool = True
    remove_final_layer_norm: bool = False
    activation_function: str = "relu"
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 2
    eos_token_ids: tuple[int, ...] = (2,)
    pad_token_id: int | None = 1
    checkpoint_dtype: str = "float32"

    @property
    def head_dim(self) -> int:
        """Numbers per attention head, H."""
        return self.hidden_size // self.num_attention_heads

    @property
    def has_final_layer_norm(self) -> bool:
        """Whether a layer norm follows the last layer (pre-norm models only)."""
        return self.do_layer_norm_before and not self.remove_final_layer_norm

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> "ModelConfig":
        """Read the mapping of a Hugging Face `config.json`.

        Raises:
            ValueError: a field has a value that this model cannot honour; the message names both.
        """
        fields = dict(raw)
        _require(fields, "model_type", fields.get("model_type") == "opt", "only 'opt' is supported")
        for name in ("quantization_config", "rope_scaling", "sliding_window"):
            _require(fields, name, fields.get(name) is None, "it is not supported; remove it")
        integers = {
            name: _positive_int(fields, name, getattr(cls, name))
            for name in (
                "vocab_size",
                "hidden_size",
                "num_hidden_layers",
                "ffn_dim",
                "max_position_embeddings",
                "num_attention_heads",
            )
        }
        fields |= integers
        heads = integers["num_attention_heads"]
        _require(
            fields,
            "num_attention_heads",
            integers["hidden_size"] % heads == 0,
            f"it must divide hidden_size={integers['hidden_size']}",
        )
        _require(
            fields,
            "num_key_value_heads",
            fields.get("num_key_value_heads") in (None, heads),
            f"only multi-head attention (num_attention_heads={heads}) is supported",
        )
        activation = fields.get("activation_function", "relu")
        _require(fields, "activation_function", activation in ACTIVATIONS, f"use one of {', '.join(ACTIVATIONS)}")
        width = "word_embed_proj_dim"
        word_dim = integers["hidden_size"] if fields.get(width) is None else _positive_int(fields, width, 0)
        flags = {
            name: _boolean(fields, key, default)
            for name, key, default in (
                ("do_layer_norm_before", "do_layer_norm_before", True),
                ("remove_final_layer_norm", "_remove_final_layer_norm", False),
                ("enable_bias", "enable_bias", True),
                ("layer_norm_elementwise_affine", "layer_norm_elementwise_affine", True),
                ("tie_word_embeddings", "tie_word_embeddings", True),
            )
        }
        values: dict[str, Any] = {**integers, **flags, **_special_ids(fields, integers["vocab_size"])}
        return cls(
            **values,
            word_embed_proj_dim=word_dim,
            activation_function=activation,
            checkpoint_dtype=_checkpoint_dtype(fields),
        )

    def to_hf(self) -> dict[str, Any]:
        """The mapping of a Hugging Face `config.json`, which `from_hf` reads back."""
        raw = {"architectures": ["OPTForCausalLM"], "model_type": "opt", **dataclasses.asdict(self)}
        raw["eos_token_id"] = list(raw.pop("eos_token_ids"))
        raw["dtype"] = raw.pop("checkpoint_dtype")
        raw["_remove_final_layer_norm"] = raw.pop("remove_final_layer_norm")
        return raw

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelConfig":
        """Read `config.json` in `folder`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not JSON, or `from_hf` refuses it.
        """
        path = folder / "config.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(raw, dict):
            raise ValueError(f"{path} holds a JSON {type(raw).__name__}, not an object")
        try:
            return cls.from_hf(raw)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """How a model is served; each field is also a command-line flag (`--max-num-seqs`) and a keyword of `LLM`."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number type of weights and cache; auto takes the checkpoint's, except float32 on a CPU."""
    max_model_len: int | None = None
    """Longest context in tokens, prompt and output together; default: what the model was trained for."""
    max_num_seqs: int | None = None
    """Most requests in one iteration; default: 64 on a CPU, 256 on TPU and GPU."""
    max_num_batched_tokens: int | None = None
    """Most tokens in one iteration; longer prompts are prefilled in chunks; default: 512 on a CPU, else 2048."""
    block_size: int = 16
    """Tokens per cache block."""
    num_blocks: int | None = None
    """Cache blocks; default: as many as the memory left over holds."""
    cache_memory_bytes: int | None = None
    """Bytes of each device for the cache; default: what weights and activations leave of its memory."""
    device_memory_utilization: float = 0.9
    """Share of the device's memory (on a CPU: of the free memory) that the engine may take."""
    cache_mode: Literal["hybrid", "kv", "hidden"] = "hybrid"
    """What requests may cache: KV pairs, hidden vectors at half the memory, or either."""
    scheduling_policy: str = "apt"
    """Name of the scheduling policy, with options as NAME:option=value; docs/scheduling tells them."""
    ttft_slo_ms: float = 1000.0
    """Default promise for the time to the first token."""
    tbt_slo_ms: float = 1000.0
    """Default promise for the 99th percentile of a request's gaps between tokens."""
    max_num_queued_reqs: int = 1024
    """Most requests waiting; more are refused with 503."""
    tensor_parallel_size: int = 1
    """Devices that one model is split over; must divide its heads. docs/tensor_parallelism.md."""
    calibrate: bool = True
    """Measure the device at start-up for policies that predict iteration times; seconds, once per device and model."""
    attention_backend: AttentionBackend = "auto"
    """Implementation of decode attention; auto: Pallas on TPU and GPU, C++ on a CPU that has a compiler, if it passes a
    check there, else XLA."""
    async_scheduling: bool | None = None
    """Plan the next iteration while the device runs this one; default: on for TPU and GPU, off on a CPU."""
    compilation_cache_dir: str | None = None
    """Folder for compiled programs, reused by the next start; default: ~/.cache/apt-jax/xla."""
    seed: int = 0
    """Seed for requests that bring none, and for dummy weights."""

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "num_blocks", "cache_memory_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        for name in ("block_size", "tensor_parallel_size", "max_num_queued_reqs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.block_size & (self.block_size - 1) or self.block_size > 128:
            raise ValueError(f"block_size={self.block_size} must be a power of two, at most 128")
        for name in ("ttft_slo_ms", "tbt_slo_ms"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be greater than 0")
        if not 0 < self.device_memory_utilization <= 1:
            raise ValueError(
                f"device_memory_utilization={self.device_memory_utilization} must be greater than 0 and at most 1"
            )


def _require(fields: Mapping[str, Any], name: str, ok: bool, cure: str) -> None:
    if not ok:
        raise ValueError(f"unsupported {name}={fields.get(name)!r}: {cure}")


def _positive_int(fields: Mapping[str, Any], name: str, default: int) -> int:
    value = fields.get(name, default)
    _require(
        fields,
        name,
        isinstance(value, int) and not isinstance(value, bool) and value > 0,
        "must be an integer > 0",
    )
    return value


def _special_ids(fields: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """Read bos, eos (one id, several or none) and pad, each an id of the vocabulary."""
    eos = fields.get("eos_token_id", 2)
    eos_ids = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    special = {"bos_token_id": fields.get("bos_token_id", 2), "pad_token_id": fields.get("pad_token_id", 1)}
    for name, ids in (("eos_token_id", eos_ids), *((k, (v,)) for k, v in special.items() if v is not None)):
        ok = all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < vocab_size for i in ids)
        _require(fields, name, ok, f"ids must lie in 0..vocab_size-1={vocab_size - 1}")
    return {**special, "eos_token_ids": eos_ids}


def _checkpoint_dtype(fields: Mapping[str, Any]) -> str:
    """Read `dtype`, which transformers 5 writes, or `torch_dtype`, which older files have."""
    name = "torch_dtype" if fields.get("dtype") is None else "dtype"
    value = fields.get(name)
    dtype = "float32" if value is None else str(value).removeprefix("torch.")
    _require(fields, name, dtype in CHECKPOINT_DTYPES, f"use one of {', '.join(CHECKPOINT_DTYPES)}")
    return dtype


def _boolean(fields: Mapping[str, Any], name: str, default: bool) -> bool:
    value = fields.get(name, default)
    _require(fields, name, isinstance(value, bool), "must be true or false")
    return value
