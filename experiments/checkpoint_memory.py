"""Measures the host memory that loading takes, in a fresh process for each format.

    python -m experiments.checkpoint_memory [--formats safetensors sharded flax orbax pt] [--dtypes auto float16]

Makes a folder shaped like OPT-1.3B (float16, 2.6 GB) in a temporary place, loads it and prints the peak of
resident memory over the size of the weights at the serving dtype, less what the interpreter and its imports
took before loading. Needs about 6 GB of disk and, for float32 on a CPU, 7 GB of memory.
"""

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from apt_jax.checkpoints.mapping import Layout
from apt_jax.checkpoints.mappings.opt import OPT_MAPPING
from apt_jax.model_config import ModelConfig

OPT_1_3B = ModelConfig(
    hidden_size=2048, num_hidden_layers=24, ffn_dim=8192, num_attention_heads=32, word_embed_proj_dim=2048
)
FORMATS = ("safetensors", "sharded", "flax", "orbax", "pt")
_SHARD_TENSORS = 100


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Bytes of one load."""

    weight_bytes: int  # of all parameters at the serving dtype
    before_bytes: int  # resident when loading began: the interpreter, its imports and the started backend
    peak_bytes: int  # the process's largest resident size
    load_seconds: float

    @property
    def ratio(self) -> float:
        """Peak divided by the weights' size, without the interpreter's share."""
        return (self.peak_bytes - self.before_bytes) / self.weight_bytes


def write_folder(config: ModelConfig, folder: Path, file_format: str) -> None:
    """Write a float16 checkpoint of `config` with synthetic numbers, and its config.json."""
    folder.mkdir(parents=True)
    fields = {
        name: getattr(config, name)
        for name in (
            "vocab_size", "hidden_size", "num_hidden_layers", "ffn_dim", "max_position_embeddings",
            "num_attention_heads", "word_embed_proj_dim",
        )
    }  # fmt: skip
    text = json.dumps({"model_type": "opt", "torch_dtype": "float16", **fields})
    (folder / "config.json").write_text(text, encoding="utf-8")
    pattern = np.random.default_rng(0).normal(size=2**20 + 7).astype(np.float16)  # odd, so that rows differ
    if file_format == "flax":
        _write_flax(config, folder, pattern)
        return
    shapes = list(OPT_MAPPING.hf_shapes(config).items())
    step = len(shapes) if file_format in ("safetensors", "pt") else _SHARD_TENSORS
    groups = [shapes[i : i + step] for i in range(0, len(shapes), step)]
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        tensors = {name: np.resize(pattern, shape) for name, shape in group}
        shard = f"model-{number:05}-of-{len(groups):05}.safetensors"
        weight_map |= dict.fromkeys(tensors, shard)
        if file_format == "pt":
            import torch

            torch.save({n: torch.from_numpy(t) for n, t in tensors.items()}, folder / "pytorch_model.bin")
        else:
            from safetensors.numpy import save_file

            save_file(tensors, folder / ("model.safetensors" if len(groups) == 1 else shard))
    if len(groups) > 1:
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


def _write_flax(config: ModelConfig, folder: Path, pattern: np.ndarray) -> None:
    from flax import serialization, traverse_util

    flat = {}
    for slot in OPT_MAPPING.slots(config).values():
        *parents, leaf = slot.name.split(".")
        if leaf == "weight":
            leaf = {Layout.TABLE: "embedding", Layout.LINEAR: "kernel", Layout.VECTOR: "scale"}[slot.layout]
        flat[(*parents, leaf)] = np.resize(pattern, slot.flax_shape)
    (folder / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize(traverse_util.unflatten_dict(flat)))


def measure(folder: Path, dtype: str) -> Measurement:
    """Load `folder` in a new process.

    Raises:
        subprocess.CalledProcessError: it could not be loaded.
    """
    command = [sys.executable, "-m", "experiments.checkpoint_memory", "--load", str(folder), "--dtypes", dtype]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return Measurement(**json.loads(done.stdout.splitlines()[-1]))


def _load_here(folder: str, dtype: str) -> Measurement:
    import jax

    from apt_jax.checkpoints.load import load_model

    jax.block_until_ready(jax.numpy.zeros(8) + 1)  # starts the backend and its threads
    before = _resident_bytes("VmRSS")
    loaded = load_model(folder, dtype=dtype)
    return Measurement(loaded.weight_bytes, before, _resident_bytes("VmHWM"), loaded.load_seconds)


def _resident_bytes(field: str) -> int:
    """Resident memory of this process now ("VmRSS") or at its largest ("VmHWM").

    Not `getrusage`: on Linux a new program inherits the `ru_maxrss` of the process that started it.
    """
    status = Path("/proc/self/status")
    if not status.exists():  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    line = next(line for line in status.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Print one line for each format and dtype."""
    parser = argparse.ArgumentParser(description="Measure the host memory that loading a checkpoint takes.")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS[:-1])
    parser.add_argument("--dtypes", nargs="+", default=["auto", "float16"])
    parser.add_argument("--temporary", type=Path, help="where to make the folders (default: the system's place)")
    parser.add_argument("--load", metavar="FOLDER", help="load this folder here and print its figures as JSON")
    options = parser.parse_args()
    if options.load:
        print(json.dumps(dataclasses.asdict(_load_here(options.load, options.dtypes[0]))))
        return
    print(f"{'format':12}{'dtype':10}{'weights MB':>12}{'before MB':>11}{'peak MB':>9}{'ratio':>7}{'seconds':>9}")
    for file_format in options.formats:
        with tempfile.TemporaryDirectory(dir=options.temporary) as made:
            folder = Path(made) / "model"
            write_folder(OPT_1_3B, folder, "safetensors" if file_format == "orbax" else file_format)
            if file_format == "orbax":
                _convert(folder, folder.with_name("converted"))
                folder = folder.with_name("converted")
            for dtype in options.dtypes:
                found = measure(folder, dtype)
                megabytes = [x / 1e6 for x in (found.weight_bytes, found.before_bytes, found.peak_bytes)]
                print(
                    f"{file_format:12}{dtype:10}{megabytes[0]:12.0f}{megabytes[1]:11.0f}{megabytes[2]:9.0f}"
                    f"{found.ratio:7.2f}{found.load_seconds:9.1f}",
                    flush=True,
                )


def _convert(source: Path, destination: Path) -> None:
    """Convert in a separate process, so that its memory is freed."""
    code = "import sys, pathlib, apt_jax.checkpoints.convert as c; c.convert(sys.argv[1], pathlib.Path(sys.argv[2]))"
    subprocess.run([sys.executable, "-c", code, str(source), str(destination)], check=True)


if __name__ == "__main__":
    main()
