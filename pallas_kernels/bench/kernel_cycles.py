"""Static cycles, VMEM and spills of the TPU decode kernels, from the compiler's output: no TPU needed, only libtpu.

A kernel is compiled in a process of its own, which makes libtpu write its final program: one line for each bundle of
instructions, which takes a cycle if nothing waits. Counted is the loop over chunks of cached tokens: its own bundles,
and for each page of a chunk those of the shortest loop inside it, which waits for a page to arrive. All branches of the
loop count, so it is a little more than a full chunk takes; waiting for memory is not in it.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from apt_jax.cache import CacheKind
from apt_jax.pallas_kernels.bench.kernel_counts import CHIPS
from apt_jax.scheduling.costs.hardware import HARDWARE, MODELS

WAYS = ("kv", "hidden")
CLOCK_HZ = {"v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9, "tpu7x": 1.91e9}
CORES = {"v5p": 2, "tpu7x": 2}  # of a chip, which share its bandwidth; 1 else
_ROWS, _CONTEXT_TOKENS, _POOL_TOKENS = 128, 2048, 131_072
_TIMEOUT_S = 300
_BUNDLE = re.compile(r"\s*0(?:x[0-9a-f]+)?\s+(\w\w)?\s*:\s*(>*)\s*\{")
_SPILL = re.compile(r"vst \[vmem:\[#allocation\d+_spill")
_VMEM = re.compile(
    r'tpu_custom_call.*"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"'
)


@dataclass(frozen=True)
class Static:
    """What the compiler made of a kernel; `error` says why figures are missing."""

    chip: str
    model: str
    way: str
    chunk_tokens: int | None = None
    cycles_per_token: float | None = None
    hbm_cycles_per_token: float | None = None  # that the bytes alone take at the chip's bandwidth
    vmem_bytes: int | None = None
    spills: int | None = None  # vector registers spilled to VMEM, in the whole program
    error: str | None = None

    def line(self) -> str:
        """For the table."""
        head = f"{self.chip:<6} {self.model:<9} {self.way:<7}"
        vmem = "-" if self.vmem_bytes is None else f"{self.vmem_bytes / 2**20:.1f}"
        if self.cycles_per_token is None or self.hbm_cycles_per_token is None:
            return f"{head} {'-':>6} {'-':>8} {'-':>8} {vmem:>9} {'-':>6}  not known: {self.error}"
        bound = "HBM" if self.hbm_cycles_per_token > self.cycles_per_token else "compute"
        return (
            f"{head} {self.chunk_tokens:>6} {self.cycles_per_token:>8.1f} {self.hbm_cycles_per_token:>8.1f} {vmem:>9}"
            f" {self.spills:>6}  {bound}"
        )


HEADER = (
    f"{'chip':<6} {'model':<9} {'way':<7} {'chunk':>6} {'cycles':>8} {'HBM':>8} {'VMEM MiB':>9} {'spills':>6}  bound by"
)


def compile_static(chip: str, model: str, way: str, block_size: int) -> Static:
    """Compile one kernel in bfloat16 in another process and read libtpu's output; failures there are in the result.

    Args:
        chip: a TPU of `kernel_counts.CHIPS`.
        way: of `WAYS`.
    """
    from apt_jax.pallas_kernels.bench.tpu_compiler import MISSING

    static = partial(Static, chip, model, way)
    if MISSING:
        return static(error=f"{MISSING}; pip install 'jax[tpu]'")
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true",
        }
        command = [
            sys.executable,
            "-m",
            "apt_jax.pallas_kernels.bench.kernel_cycles",
            chip,
            model,
            way,
            str(block_size),
        ]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return static(error=f"compiling took more than {_TIMEOUT_S} s")
        if done.returncode:
            return static(error=(done.stderr.strip().splitlines() or ["the compiler failed"])[-1][:200])
        found = json.loads(done.stdout.splitlines()[-1])
        programs = [path for path in Path(folder).glob(f"*{way}_decode_attention*final_bundles.txt")]
        programs = [path for path in programs if "schedule" not in path.name]
        try:
            if len(programs) != 1:
                raise ValueError(f"libtpu wrote {len(programs)} final programs of the kernel, not one")
            program = programs[0].read_text()
            cycles = loop_cycles(program, found["chunk_tokens"] // block_size)
        except ValueError as error:
            return static(vmem_bytes=found["vmem_bytes"], error=str(error))
    bytes_per_token = MODELS[model].hidden_size * 2 * CacheKind.named(way).blocks_per_page
    bandwidth = HARDWARE[CHIPS[chip]].bytes_per_s / CORES.get(chip, 1)
    return static(
        **found, cycles_per_token=cycles / found["chunk_tokens"],
        hbm_cycles_per_token=bytes_per_token / bandwidth * CLOCK_HZ[chip], spills=spills(program),
    )  # fmt: skip


def loop_cycles(program: str, pages: int) -> int:
    """Bundles of one pass of the loop over chunks, from the text of a final program.

    Args:
        pages: of a chunk.

    Raises:
        ValueError: the program does not have the loops that the kernels have.
    """
    counts: list[int] = []  # loop by loop, bundles of its own
    depths: list[int] = []
    parents: list[int | None] = []
    open_loops: list[int] = []  # from the outermost to that of the current line
    for line in program.splitlines():
        if not (match := _BUNDLE.match(line)):
            continue
        if line[match.end() :].lstrip().startswith("}"):  # waits, and does not say in which loop
            if open_loops:
                counts[open_loops[-1]] += 1
            continue
        depth = len(match[2])
        del open_loops[depth:]
        if match[1] == "LB":
            del open_loops[depth - 1 :]
            parents.append(open_loops[-1] if open_loops else None)
            open_loops.append(len(counts))
            counts.append(0)
            depths.append(depth)
        if len(open_loops) == depth and depth:
            counts[open_loops[-1]] += 1
    chunks = [loop for loop, depth in enumerate(depths) if depth == 2]
    if not chunks:
        raise ValueError("the final program has no loop inside the loop over rows")
    chunk = max(chunks, key=lambda loop: counts[loop])
    inner = [counts[loop] for loop, parent in enumerate(parents) if parent == chunk]
    if not inner:
        raise ValueError("the loop over chunks has no loop that waits for pages")
    return counts[chunk] + pages * min(inner)


def spills(program: str) -> int:
    """Vector registers that a final program stores to VMEM because it has too few, from its text."""
    return len(_SPILL.findall(program))


def used_vmem_bytes(program: str) -> int | None:
    """VMEM that a compiled program's one kernel uses, from its text; None where the compiler does not say."""
    sizes = _VMEM.findall(program)
    return int(sizes[0]) if len(sizes) == 1 else None


def _compile(chip: str, model: str, way: str, block_size: int) -> None:
    """In the other process: compile, and print the figures."""
    import jax
    import jax.numpy as jnp

    from apt_jax.pallas_kernels.bench.tpu_compiler import compile_for, device
    from apt_jax.pallas_kernels.tpu import hidden_decode as tpu_hidden_decode
    from apt_jax.pallas_kernels.tpu import kv_decode as tpu_kv_decode
    from apt_jax.pallas_kernels.tpu import paging as tpu_paging

    config = MODELS[model]
    N, D = config.num_attention_heads, config.hidden_size
    cores = device(chip).num_cores

    def shape(*sizes: int, dtype: object = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    pool = shape(_POOL_TOKENS // block_size, block_size, D, dtype=jnp.bfloat16)
    table, length = shape(_ROWS, _CONTEXT_TOKENS // block_size), shape(_ROWS)
    if way == "kv":
        q = shape(_ROWS, N, D // N, dtype=jnp.bfloat16)
        program = compile_for(
            chip, lambda *args: tpu_kv_decode.kv_decode_attention(*args, cores=cores), q, pool, table, table, length
        )
    else:
        q = shape(_ROWS, N, D, dtype=jnp.bfloat16)
        program = compile_for(
            chip,
            lambda *args: tpu_hidden_decode.hidden_decode_attention(*args, cores=cores, out_dtype=jnp.bfloat16),
            q, pool, table, length,
        )  # fmt: skip
    chunk = tpu_paging.chunk_tokens(D, block_size, 2, num_sources=CacheKind.named(way).blocks_per_page)
    print(json.dumps({"chunk_tokens": chunk, "vmem_bytes": used_vmem_bytes(program.as_text())}))


if __name__ == "__main__":
    _compile(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
