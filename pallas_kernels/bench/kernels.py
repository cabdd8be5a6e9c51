"""`apt-jax bench kernels`: counts where there is no accelerator, measurements where there is one."""

import json
import platform
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from apt_jax.files import EVERYBODY, check_writable, replace_file
from apt_jax.flags.lists import listed_counts, listed_names
from apt_jax.ranges import check_block_size

MOST_TOKENS = 10**9
Chip = Literal["auto", "h200", "h100", "a100", "v5e", "v5p", "v6e", "tpu7x"]


@dataclass(frozen=True)
class BenchKernels:
    """Measure attention kernels on the local accelerator, or count their work where there is none."""

    device: Chip = "auto"
    """auto: measure on the local accelerator, or count for every chip if there is none; a name: count for that chip."""
    model: str = "opt-13b,opt-30b"
    """OPT sizes, separated by commas."""
    batch: str = "8,32,128"
    """Requests in a step, separated by commas."""
    context: str = "256,512,1024,2048"
    """Cached tokens of each request, separated by commas."""
    block_size: int = 16
    """Tokens per cache block."""
    end_to_end: bool = False
    """Measure whole decode steps of the first model with random weights instead."""
    chunks: bool = False
    """Measure the attention of a prefill chunk to its own --context tokens, and to as many cached ones, instead."""
    writes: bool = False
    """Measure how keys and values are written to the cache instead: one token for each row of a --batch, and chunks of
    --context tokens."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Data type of --end-to-end; the kernels are measured in bfloat16."""
    quantization: Literal["none", "int8", "int8-dynamic"] = "none"
    """Number type of the weights of --end-to-end; none: that of --dtype."""
    all: bool = False
    """Measure all of these one after the other, each in its own process; -o names a folder."""
    allow_cpu: bool = False
    """Measure on a CPU too, to try the command; its figures say nothing about speed."""
    output: Annotated[Path | None, arg(aliases=["-o"])] = None
    """JSON file for all results; a folder with --all."""

    def __post_init__(self) -> None:
        check_block_size(self.block_size)
        chosen = [name for name in ("end_to_end", "chunks", "writes", "all") if getattr(self, name)]
        if len(chosen) > 1:
            flags = " and ".join(f"--{name.replace('_', '-')}" for name in chosen)
            raise ValueError(f"{flags} measure different things; give one of them")


def run(args: BenchKernels) -> int:
    """Run the command; 1 if nothing could be measured that should be.

    Raises:
        ValueError: a flag has an unknown or impossible value.
    """
    from apt_jax.pallas_kernels.bench.kernel_counts import CHIPS, WAYS, Shape, count, counted_table
    from apt_jax.scheduling.costs.hardware import MODELS

    check_writable(args.output, "--output")
    models = listed_names("model", args.model, MODELS)
    batches, contexts = listed_counts("batch", args.batch, 1), listed_counts("context", args.context, 1)
    if max(batches) * max(contexts) > MOST_TOKENS:
        raise ValueError(
            f"batch={args.batch!r} and context={args.context!r} are more than {MOST_TOKENS:,} tokens; lower one"
        )
    if args.all:
        return _run_parts(args)
    shapes = [Shape(model, batch, context) for model in models for batch in batches for context in contexts]
    device = _accelerator(args)
    if device is None:
        if flag := next((flag for flag in ("end_to_end", "chunks", "writes") if getattr(args, flag)), None):
            raise ValueError(f"--{flag.replace('_', '-')} needs an accelerator; --allow-cpu tries it on the CPU")
        chips = list(CHIPS) if args.device == "auto" else [args.device]
        print(counted_table(shapes, chips))
        static = _report_static(args, [chip for chip in chips if CHIPS[chip].startswith("tpu")], models)
        counts = [{**asdict(shape), "way": way, **asdict(count(shape, way))} for shape in shapes for way in WAYS]
        _write(args, {"counts": counts, "static": [asdict(result) for result in static]})
        return 0
    if args.end_to_end:
        return _measure_steps(args, device, models[0], batches, contexts)
    if args.writes:
        return _measure_writes(args, device, models, batches, contexts)
    return _measure_chunks(args, device, models, contexts) if args.chunks else _measure(args, device, shapes)


def _report_static(args: BenchKernels, chips: list[str], models: list[str]) -> list[Any]:
    """Print the compiler's figures for the TPU kernels, one line and half a minute each, where there is a compiler."""
    from apt_jax.pallas_kernels.bench.kernel_cycles import HEADER, WAYS, compile_static

    if chips:
        print("\ncompiled for TPUs, bfloat16: cycles per cached token, and those that HBM needs for its bytes alone")
        print(HEADER)
    results = []
    for chip, model, way in product(chips, models, WAYS):
        results.append(compile_static(chip, model, way, args.block_size))
        print(results[-1].line(), flush=True)
    return results


def _measure(args: BenchKernels, device: Any, shapes: list[Any]) -> int:
    from apt_jax.pallas_kernels.bench.kernel_runs import HEADER, run_all
    from apt_jax.pallas_kernels.bench.timing import copy_bytes_per_s

    copy = _report_copy(device, copy_bytes_per_s(device))
    print("us: median of repeated runs, one layer; GB/s: bytes that must be moved over time; share: of the copy")
    print(HEADER)
    results = run_all(shapes, device, args.block_size, copy, lambda result: print(result.line(), flush=True))
    _write(args, {"copy_bytes_per_s": copy, "kernels": [asdict(result) for result in results]}, device)
    return int(all(result.times is None for result in results))


def _measure_chunks(args: BenchKernels, device: Any, models: list[str], contexts: list[int]) -> int:
    from apt_jax.pallas_kernels.bench.chunk_runs import HEADER, run_chunks
    from apt_jax.pallas_kernels.bench.timing import copy_bytes_per_s

    copy = _report_copy(device, copy_bytes_per_s(device))
    print("us: median of repeated runs, one layer; TFLOP/s: of the pairs of tokens that see each other")
    print("cached: tokens before the chunk that it attends to; with 0 it attends to its own")
    print(HEADER)
    results = run_chunks(models, contexts, device, lambda result: print(result.line(), flush=True))
    _write(args, {"copy_bytes_per_s": copy, "chunks": [asdict(result) for result in results]}, device)
    return int(all(result.times is None for result in results))


def _measure_writes(args: BenchKernels, device: Any, models: list[str], batches: list[int], contexts: list[int]) -> int:
    from apt_jax.pallas_kernels.bench.timing import copy_bytes_per_s
    from apt_jax.pallas_kernels.bench.write_runs import HEADER, run_writes

    copy = _report_copy(device, copy_bytes_per_s(device))
    print("us: median of repeated runs, one layer; GB/s: keys and values read once and written once")
    print(HEADER)
    results = run_writes(
        models, batches, contexts, args.block_size, device, lambda result: print(result.line(), flush=True)
    )
    _write(args, {"copy_bytes_per_s": copy, "writes": [asdict(result) for result in results]}, device)
    return int(all(result.times is None for result in results))


def _run_parts(args: BenchKernels) -> int:
    """Run the parts; this process must not hold the accelerator."""
    from apt_jax.pallas_kernels.bench.kernel_parts import run_parts

    if args.output is None:
        raise ValueError("--all needs a folder for its results: -o FOLDER")
    names = ("device", "model", "batch", "context", "block_size", "dtype", "quantization")
    flags = [text for name in names for text in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    return run_parts(flags + ["--allow-cpu"] * args.allow_cpu, args.output)


def _measure_steps(args: BenchKernels, device: Any, model: str, batches: list[int], contexts: list[int]) -> int:
    from apt_jax.pallas_kernels.bench.decode_steps import HEADER, make_engine, measure_steps, rho_s
    from apt_jax.pallas_kernels.bench.timing import copy_bytes_per_s
    from apt_jax.scheduling.costs.hardware import MODELS

    copy = _report_copy(device, copy_bytes_per_s(device))
    started = time.perf_counter()
    engine = make_engine(
        MODELS[model], dtype=args.dtype, batch=max(batches), context_tokens=max(contexts), block_size=args.block_size,
        quantization=args.quantization,
    )  # fmt: skip
    backend = "XLA" if engine.setup.attention == "xla" else f"kernels for {engine.setup.attention}"
    weights = args.dtype if args.quantization == "none" else f"{args.dtype}, {args.quantization} weights"
    print(f"{model}, {weights}, attention by {backend}, ready after {time.perf_counter() - started:.0f} s")
    print(HEADER)
    results = measure_steps(engine, batches, contexts, copy, lambda result: print(result.line(), flush=True))
    rho = rho_s(results)
    for shape, seconds in rho.items():
        print(f"rho at {shape}: {seconds * 1e9:+.3f} ns per hidden token and step, against KV")
    found = {
        "model": model,
        "attention": backend,
        "quantization": args.quantization,
        "steps": [asdict(result) for result in results],
        "rho_s": rho,
    }
    _write(args, {"copy_bytes_per_s": copy, "end_to_end": found}, device)
    return int(all(result.times is None for result in results))


def _accelerator(args: BenchKernels) -> Any:
    """The device to measure on, or None to count."""
    if args.device != "auto":
        return None
    import jax

    device = jax.devices()[0]
    return device if device.platform != "cpu" or args.allow_cpu else None


def _report_copy(device: Any, copy_bytes_per_s: float) -> float:
    import jax

    print(f"{device.device_kind} ({device.platform}), jax {jax.__version__}: copies {copy_bytes_per_s / 1e9:.0f} GB/s")
    return copy_bytes_per_s


def _write(args: BenchKernels, found: dict[str, Any], device: Any = None) -> None:
    if args.output is None:
        return
    versions = {name: version(name) for name in ("jax", "jaxlib", "flax")}
    versions["python"] = platform.python_version()
    if device is not None:
        versions |= {
            "device": device.device_kind,
            "platform": device.platform,
            "driver": device.client.platform_version,
        }
    flags = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(args).items()}
    text = json.dumps({"versions": versions, "flags": flags, **found}, indent=1) + "\n"
    replace_file(args.output, text.encode(), mode=EVERYBODY)
    print(f"wrote {args.output}", file=sys.stderr)
