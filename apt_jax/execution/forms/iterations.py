"""Decode iterations in one program, on a CPU: the host reads the results of one, and gives the next, during another.

So nothing of what the host does between two iterations lies between them on the device: planning, arrays, and the
start of programs take as long as a fifth of a step of one row (docs/log/2026-11-30-performance.md).
"""

import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from apt_jax.attention.pool import Pool
from apt_jax.batching.arrays import DecodeInput, Rows, Tokens
from apt_jax.cpu_kernels.relay import Relay, hand_over
from apt_jax.execution.sampling import Sampled, sampled_shapes
from apt_jax.execution.steps import StepOutput, run_sampling
from apt_jax.models.interface import Model

_LOOK_S = 1.0  # so long after the last iteration a call is looked at whether it failed
GRACE_S = 0.002  # so long a call waits for a host that is late; starting another one takes about half as long
_SPARE = 0.75  # of an iteration may pass until the next one is planned
_HOST_S = 0.001  # what planning takes at least


class IterationResults(NamedTuple):
    """What the host gets of an iteration."""

    sampled: Sampled
    outside: jax.Array | None  # see `StepOutput`


def run_iterations(
    step: Callable[[Pool, jax.Array, Tokens, Rows], StepOutput[jax.Array, Pool]],
    model: Model,
    pool: Pool,
    history: jax.Array,
    first: DecodeInput,
    allowed: jax.Array,
    relay: jax.Array,
) -> tuple[Pool, jax.Array, jax.Array]:
    """Iterations until the host gives no more; pool, history and their number. The first two are to be donated.

    Args:
        step: an iteration up to sampling, for which see `run_sampling`.
        first: of the first iteration.
        relay: see `hand_over`.
    """
    type Carry = tuple[jax.Array, jax.Array, DecodeInput, Pool, jax.Array]

    def iterate(carry: Carry) -> Carry:
        done, _, own, pool, history = carry
        output = step(pool, history, own.tokens, own.rows)
        sampled, history = run_sampling(
            model, output.history, output.last, own.sampling, own.sample_slot, own.sample_length, allowed
        )
        follows, following = hand_over(relay, IterationResults(sampled, output.outside), own)
        return done + 1, follows, following, output.pool, history

    start = jnp.int32(0), jnp.bool_(True), first, pool, history
    done, _, _, pool, history = jax.lax.while_loop(lambda carry: carry[1], iterate, start)
    return pool, history, done


class FollowedIterations:
    """See `RunningIterations`; the host's side of a call of `run_iterations`.

    Args:
        first: the first iteration's input.
        vocab_size: the model's.
        counts_outside: whether `IterationResults.outside` is there.

    Attributes:
        done: what the call returns last; to be set when it has been started.
        last: number of the iteration given last.
    """

    def __init__(self, first: DecodeInput, *, vocab_size: int, counts_outside: bool):
        outside = jax.ShapeDtypeStruct((), jnp.uint32) if counts_outside else None
        sampled = sampled_shapes(len(first.sample_slot), vocab_size)
        self._relay = Relay(first, IterationResults(sampled, outside), GRACE_S)  # type: ignore[arg-type]
        self.done: jax.Array
        self.last = 0
        self._num_read, self._read_s = 0, 0.0
        self._lengths_s: deque[float] = deque(maxlen=4)

    @property
    def relay(self) -> np.ndarray:
        """Argument of `run_iterations`."""
        return np.array([self._relay.number], np.int32)

    def goes_on(self, following: DecodeInput) -> bool:
        """Have an iteration more; False if the call has ended, or an iteration before the last one was not read."""
        if self._num_read < self.last or not self._relay.give(following):
            return False
        self.last += 1
        return True

    def end(self) -> None:
        """Nothing follows what was given."""
        self._relay.end()

    def read(self, number: int) -> IterationResults:
        """See `RunningIterations`.

        Raises:
            Exception: the call has failed.
        """
        while (found := self._relay.wait(number, _LOOK_S)) is None:
            if self.done.is_ready():  # type: ignore[attr-defined]
                assert number < int(self.done), f"iteration {number} never ran"
        now = time.monotonic()
        if number:
            self._lengths_s.append(now - self._read_s)
        self._num_read, self._read_s = number + 1, now
        return found

    def spare_s(self, number: int) -> float:
        """See `RunningIterations`: until shortly before the iteration ends, so that who arrives can be in the next one.

        If it is too late the call waits, or has ended.
        """
        if number != self._num_read or not self._lengths_s:
            return 0.0
        return max(self._read_s + _SPARE * min(self._lengths_s) - _HOST_S - time.monotonic(), 0.0)
