"""Interface of the forms of a step: how compiled programs make up one iteration on a device."""

from collections.abc import Sequence
from typing import Protocol

import jax
import numpy as np
from jax.stages import Compiled

from apt_jax.attention.pool import Pool
from apt_jax.batching.arrays import DecodeInput, Rows, Tokens
from apt_jax.batching.buckets import Bucket
from apt_jax.execution.compiler import temporary_bytes
from apt_jax.execution.steps import StepOutput


class Step(Protocol):
    """A compiled step of one bucket."""

    @property
    def programs(self) -> Sequence[Compiled]:
        """The executables that it consists of."""

    @property
    def temporary_bytes(self) -> int:
        """Bytes of temporaries while it runs."""

    def __call__(self, pool: Pool, history: jax.Array, tokens: Tokens, rows: Rows) -> StepOutput[jax.Array, Pool]:
        """Start it; pool and history are donated."""


class Conversion(Protocol):
    """A compiled conversion of some pages of hidden vectors to keys and values."""

    @property
    def programs(self) -> Sequence[Compiled]:
        """The executables that it consists of."""

    def __call__(self, pool: Pool, hidden_blocks: np.ndarray, key_blocks: np.ndarray, value_blocks: np.ndarray) -> Pool:
        """See `pool.convert_blocks`; the pool is donated."""


class Iterations(Protocol):
    """A compiled program that runs decode iterations one after the other, see `run_iterations`."""

    def __call__(
        self, pool: Pool, history: jax.Array, first: DecodeInput, allowed: jax.Array, relay: np.ndarray
    ) -> tuple[Pool, jax.Array, jax.Array]:
        """Start them; returns pool and history (donated) as the last iteration leaves them, and their number."""


class Ranges(Protocol):
    """A compiled measurement of hidden vectors' ranges."""

    def __call__(self, ids: np.ndarray, length: np.ndarray) -> jax.Array:
        """`[2, L, D]` least and greatest of every channel, see `attention/ranges.py`; ids are padded."""


class Form(Protocol):
    """Makes steps and conversions for a model's weights."""

    @property
    def pads(self) -> bool:
        """Whether padding tokens of a step take time."""

    def compile_step(self, bucket: Bucket, num_blocks: int) -> Step:
        """Compile the step of a bucket, with a pool of P = `num_blocks`."""

    def compile_conversion(self, num_blocks: int) -> Conversion:
        """Compile the conversion in a pool of P = `num_blocks`."""

    def compile_ranges(self, tokens: int) -> Ranges:
        """Compile the measurement of ranges over sequences of at most `tokens`."""


class WholeStep:
    """A step of one program."""

    def __init__(self, program: Compiled, weights: Sequence[jax.Array], scratch_bytes: int = 0):
        """`scratch_bytes` is memory that the program takes beyond the compiler's temporaries."""
        self.programs = (program,)
        self.temporary_bytes = temporary_bytes(program) + scratch_bytes
        self._program, self._weights = program, weights

    def __call__(self, pool: Pool, history: jax.Array, tokens: Tokens, rows: Rows) -> StepOutput[jax.Array, Pool]:
        """See `Step`."""
        output: StepOutput[jax.Array, Pool] = self._program(self._weights, pool, history, tokens, rows)
        return output


class WholeConversion:
    """A conversion of one program."""

    def __init__(self, program: Compiled, weights: Sequence[jax.Array]):
        self.programs = (program,)
        self._program, self._weights = program, weights

    def __call__(self, pool: Pool, hidden_blocks: np.ndarray, key_blocks: np.ndarray, value_blocks: np.ndarray) -> Pool:
        """See `Conversion`."""
        pool = self._program(self._weights, pool, hidden_blocks, key_blocks, value_blocks)
        return pool
