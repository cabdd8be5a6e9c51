"""Refusal of checkpoints that other tools have quantised: none of their formats is read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# by `quant_method`, as transformers' `QuantizationMethod` spells it
_NAMES = {
    "aqlm": "AQLM",
    "auto-round": "AutoRound",
    "awq": "AWQ",
    "bitnet": "BitNet",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "eetq": "EETQ",
    "fbgemm_fp8": "FBGEMM fp8",
    "fp8": "fp8",
    "gptq": "GPTQ",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "modelopt": "ModelOpt",
    "mxfp4": "MXFP4",
    "quanto": "Quanto",
    "spqr": "SpQR",
    "torchao": "torchao",
    "vptq": "VPTQ",
}
_FILES = {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ"}  # of older releases of these tools
CURE = "name the checkpoint that it was made from, in 16 or 32 bits, with --quantization int8 if need be"


def refuse_quantized_config(raw: Mapping[str, Any]) -> None:
    """Refuse a config.json with a `quantization_config`.

    Raises:
        ValueError: names the method, and what to do.
    """
    found = raw.get("quantization_config")
    if found is None:
        return
    raise ValueError(f"unsupported quantization_config: the weights are quantised by {_method(found)}; {CURE}")


def refuse_quantized_folder(folder: Path) -> None:
    """Refuse a folder that an older quantiser has written, which left config.json as it was.

    Raises:
        ValueError: names the file, and what to do.
    """
    for name, method in _FILES.items():
        if (folder / name).is_file():
            raise ValueError(f"unsupported {name}: the weights are quantised by {method}; {CURE}")


def _method(found: Any) -> str:
    if not isinstance(found, Mapping):
        return f"an unknown method ({found!r})"
    method = found.get("quant_method")
    if method is None and (found.get("load_in_8bit") or found.get("load_in_4bit")):
        method = "bitsandbytes"  # older files have only these
    bits = found.get("bits", found.get("w_bit"))
    name = _NAMES.get(method, repr(method)) if isinstance(method, str) else "an unknown method"
    return f"{name} ({bits} bits)" if isinstance(bits, int) else name
