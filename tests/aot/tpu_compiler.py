"""For tests that compile for TPUs: every OPT size, and why there is no compiler, if there is none."""

from apt_jax.pallas_kernels.bench.tpu_compiler import MISSING as NO_LIBTPU
from apt_jax.pallas_kernels.bench.tpu_compiler import TOPOLOGIES, abstract_mesh, compile_for, device

__all__ = ["MISSING", "OPT_SIZES", "TOPOLOGIES", "abstract_mesh", "compile_for", "device"]

MISSING = NO_LIBTPU and f"{NO_LIBTPU}; run make test-aot"
OPT_SIZES = {  # heads, head_dim
    "125M": (12, 64), "350M": (16, 64), "1.3B": (32, 64), "2.7B": (32, 80),
    "6.7B": (32, 128), "13B": (40, 128), "30B": (56, 128), "66B": (72, 128),
}  # fmt: skip
