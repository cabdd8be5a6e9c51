"""Compiles a function of weights and arguments to an executable, or loads that executable from disk.

This is the only file that calls `jax.jit`.
"""

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
from jax.sharding import PartitionSpec
from jax.stages import Compiled

from apt_jax.cpu_kernels.calls import KERNELS as CPU_KERNELS
from apt_jax.execution.arguments import Arguments
from apt_jax.execution.platform import Platform
from apt_jax.execution.program_store import ProgramStore, source_hash
from apt_jax.execution.steps import StepOutput
from apt_jax.model_config import Quantization
from apt_jax.models.sharding import EVERYWHERE

logger = logging.getLogger(__name__)

# XLA on a CPU leaves a sum of so many numbers or more, over all rows, to a library that adds them in another order. The
# last digits of a request's final layer norm and log-probabilities would depend on how many rows its program has.
_ONE_ORDER_BELOW = 4096
_ONE_ORDER = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}  # XLA's own sums only


class Compiler:
    """Compiles programs for the devices of one model; `attention` is the name of its attention kernels.

    `quantization` is that of the weights: int8 and int8-dynamic have the same shapes.
    """

    def __init__(self, arguments: Arguments, attention: str, quantization: Quantization = "none"):
        self._arguments, self._attention, self._quantization = arguments, attention, quantization
        self._options = one_order() if _has_small_sums(arguments, attention) else None
        # processes that run one program compile it together, so none of them may load it from disk
        alone, device = jax.process_count() == 1, arguments.device
        self._store = ProgramStore.in_compile_cache(device) if alone else ProgramStore(None, device)

    def compile(
        self,
        name: str,
        function: Callable[..., object],
        weights: Sequence[Any],
        *args: object,
        donate: tuple[int, ...] = (),
        outs: PartitionSpec | StepOutput[PartitionSpec, PartitionSpec] = EVERYWHERE,
    ) -> Compiled:
        """`function(weights, *args)` as an executable.

        Args:
            name: holds every static argument; the first word names the function in profiles.
            weights: only shapes, number types and layouts are used.
            args: trees of shapes.
            donate: positions of donated arguments; the weights are 0.
            outs: how results are split over several devices.
        """
        arguments, parallel = self._arguments, self._arguments.parallel
        custom_layouts = parallel is None and Platform.of(arguments.device).custom_layouts
        shapes_of = [
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.format if custom_layouts else leaf.sharding)
            for leaf in weights
        ]
        precision = "highest" if arguments.dtype == jnp.float32 else None
        # of this version of the code only: the store cannot keep what comes from JAX's own cache
        function.__name__ = f"{name.split()[0]}_{source_hash()[:8]}"
        if parallel is not None:
            function, args = parallel.split_program(function, shapes_of, args, outs)
            name = f"{name} over {[device.id for device in parallel.mesh.devices.flat]} {parallel.hidden}"

        def compile_program() -> Compiled:
            with jax.default_matmul_precision(precision):
                return jax.jit(function, donate_argnums=donate).lower(shapes_of, *args).compile(self._options)

        shapes = (
            shapes_of,
            jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), args),
            donate,
            precision,
            self._options,
        )
        # with the attention kernels' name: the sampler and the scorer call kernels too, and cannot run without them
        key = (name, self._attention, self._quantization, arguments.model_config, arguments.shapes, shapes)
        return self._store.get(repr(key), compile_program)


@cache
def one_order() -> dict[str, str] | None:
    """Options by which XLA adds all sums on a CPU in one order; None, with a warning, if it does not know them."""
    try:
        jax.jit(jnp.negative).lower(jax.ShapeDtypeStruct((1,), jnp.float32)).compile(_ONE_ORDER)
    except jax.errors.JaxRuntimeError as error:
        logger.warning(
            "XLA of jaxlib %s adds sums of few rows in another order than those of many (%s), so the last digits of "
            "log-probabilities depend on the batch; jaxlib 0.12 has the option",
            jaxlib.__version__, str(error).splitlines()[0],
        )  # fmt: skip
        return None
    return _ONE_ORDER


def _has_small_sums(arguments: Arguments, attention: str) -> bool:
    """Whether beside the C++ layers some program has sums of fewer numbers than `_ONE_ORDER_BELOW`.

    XLA's own sums take longer: a sampler with top_p 1.3 to 1.45 times over a vocabulary of 50,272, so not everywhere.
    """
    buckets, config = arguments.buckets, arguments.model_config
    rows = min(bucket.tokens for bucket in buckets.all)
    smallest = min(rows * config.hidden_size, buckets.sample_rows[0] * config.vocab_size)
    return attention == CPU_KERNELS.name and smallest < _ONE_ORDER_BELOW


def temporary_bytes(program: Compiled) -> int:
    """Bytes of temporaries of a compiled program; 0 where the backend does not say."""
    analysis = program.memory_analysis()
    return 0 if analysis is None else int(analysis.temp_size_in_bytes)
