"""Frozen description of a model: its shape and its special tokens."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, cast, get_args

ACTIVATIONS = (
    "relu", "relu6", "silu", "swish", "tanh", "quick_gelu",
    "gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh",
)  # fmt: skip
CHECKPOINT_DTYPES = ("float32", "float16", "bfloat16")
# Hidden vectors of a device's slice that `hidden_slices.py` takes at once: v5e and v6e have 128 MiB of VMEM, an H200
# 50 MB of L2 cache. Here because the cost model counts with it too.
GROUP_BYTES = 48 * 2**20
Quantization = Literal["none", "int8", "int8-dynamic"]  # of weights; dynamic: activations are multiplied as int8 too
POSITION_OFFSET = 2  # OPT's embedding table has two unused rows before position 0


def as_quantization(name: str) -> Quantization:
    """The quantisation of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in get_args(Quantization):
        raise ValueError(
            f"quantization={name!r} is not one of {', '.join(get_args(Quantization))}; weights that other tools have "
            "quantised are not read"
        )
    return cast(Quantization, name)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder, in the field names of Hugging Face's `OPTConfig`.

    Sizes, `tie_word_embeddings`, special tokens and `checkpoint_dtype` are what loader, scheduler and engine go by. The
    other flags and `activation_function` are options of OPT's layers, which only its module and its mapping of weights
    read. A family whose layers have other options adds them as fields of a subclass, and names its own `model_type`.

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
    model_type: str = "opt"  # of its family

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
        """Read the mapping of a Hugging Face `config.json` of OPT.

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

    def check_split(self, num_devices: int) -> None:
        """Refuse a number of devices over which the model cannot be split evenly.

        Raises:
            ValueError: heads or ffn_dim are not divisible; the message reports what is allowed.
        """
        heads, ffn = self.num_attention_heads, self.ffn_dim
        if heads % num_devices or ffn % num_devices:
            common = math.gcd(heads, ffn)
            allowed = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
            raise ValueError(
                f"tensor_parallel_size={num_devices} does not divide num_attention_heads={heads} and ffn_dim={ffn}; "
                f"--tensor-parallel-size may be {allowed}"
            )

    def to_hf(self) -> dict[str, Any]:
        """The mapping of a Hugging Face `config.json`, which `from_hf` reads back."""
        raw = {"architectures": ["OPTForCausalLM"], **dataclasses.asdict(self)}
        raw["eos_token_id"] = list(raw.pop("eos_token_ids"))
        raw["dtype"] = raw.pop("checkpoint_dtype")
        raw["_remove_final_layer_norm"] = raw.pop("remove_final_layer_norm")
        return raw


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
