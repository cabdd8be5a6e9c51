"""Runs batches on the device: the donated arrays that are carried from step to step, and the read-back.

A program is compiled when it is first needed, or ahead of time by `compile_all`; after that nothing compiles, because
there is one program per shape. Carried and donated: the cache pool and the token history
`[slots, max_model_len]`.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from itertools import batched, product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from apt_jax.attention.pool import Pool
from apt_jax.batching.arrays import Batch, DecodeInput
from apt_jax.batching.buckets import Buckets
from apt_jax.cache import Projection
from apt_jax.cpu_kernels.calls import KERNELS as CPU_KERNELS
from apt_jax.execution.arguments import Arguments, Shapes
from apt_jax.execution.cache.host_memory import HostMemory
from apt_jax.execution.cache.saved_pages import digest_of
from apt_jax.execution.compiler import Compiler, temporary_bytes
from apt_jax.execution.forms.interface import Form
from apt_jax.execution.forms.iterations import FollowedIterations
from apt_jax.execution.forms.layered import LayeredForm
from apt_jax.execution.forms.native import NativeForm
from apt_jax.execution.forms.stacked import StackedForm
from apt_jax.execution.interface import StepResults
from apt_jax.execution.pool import Block, abstract_block, block_bytes, empty_pool
from apt_jax.execution.programs import (
    AnyKey,
    ConversionKey,
    GatherKey,
    HistoryKey,
    IterationsKey,
    PoolerKey,
    Programs,
    RestoreKey,
    SamplerKey,
    SaveKey,
    ScorerKey,
    StepKey,
)
from apt_jax.execution.weights.layout import Weights
from apt_jax.model_config import ModelConfig
from apt_jax.models.sharding import EVERYWHERE, POOL, zeros
from apt_jax.progress import is_hidden
from apt_jax.tokenization.restriction import EVERY

MOVED_AT_ONCE = 8  # blocks that one program takes out of the pool or puts back, for host memory

logger = logging.getLogger(__name__)


class Runner:
    """Runs batches on the devices that hold the weights, with the attention kernels that they are laid out for.

    Pool and history are replaced by every step.
    """

    def __init__(self, weights: Weights, model_config: ModelConfig, shapes: Shapes, buckets: Buckets):
        self.model_config, self.shapes, self.weights = model_config, shapes, weights
        form: type[StackedForm] | type[LayeredForm] = StackedForm
        if weights.layers is not None:
            form = NativeForm if NativeForm.takes(weights) else LayeredForm
        self._is_native = self._iterates = form is NativeForm
        if form is LayeredForm and self.attention == CPU_KERNELS.name:
            logger.info(
                "layers: XLA one by one, around attention in C++: the C++ layers take activation_function='relu', "
                "a head_dim that is a multiple of 16, a hidden_size that is one of 32, and float32 or bfloat16; "
                "here activation_function=%r, head_dim=%d, hidden_size=%d, dtype=%s",
                model_config.activation_function, model_config.head_dim, model_config.hidden_size, weights.dtype,
            )  # fmt: skip
        self.pads = form.pads
        self.buckets = buckets if self.pads else buckets.largest()
        self.arguments = Arguments(model_config, shapes, self.buckets, weights.dtype, weights.device, weights.parallel)
        compiler = Compiler(self.arguments, self.attention, weights.quantization)
        self._form: Form = form(weights, self.arguments, weights.kernels, compiler)
        self.programs = Programs(self._form, weights, self.arguments, compiler)
        self.num_blocks = 0
        self.num_outside = 0
        self._last_outside = 0
        self._channels: np.ndarray | None = None
        self._host: HostMemory | None = None
        self._codes_host = False  # whether blocks there are int8 numbers, and those of the pool are not
        self._fetched: list[tuple[np.ndarray, tuple[Block, ...]]] = []  # blocks of the pool, and what comes to them
        self.moves_blocks = False  # whether blocks are read and written, besides those of host memory
        self._every: dict[int, jax.Array] = {}
        self._running: FollowedIterations | None = None  # nothing else that takes the pool was started after it
        self._running_key: IterationsKey | None = None
        self._pool: Pool
        self._history: jax.Array

    @property
    def dtype(self) -> np.dtype:
        """Number type that the model computes in, and of the cache unless that is int8."""
        return self.weights.dtype

    @property
    def device(self) -> jax.Device:
        """The device that holds the weights, or the first of this process that do."""
        return self.weights.device

    @property
    def num_devices(self) -> int:
        """Devices that the model is split over."""
        return 1 if self.weights.parallel is None else self.weights.parallel.num_devices

    @property
    def num_local_devices(self) -> int:
        """Those of them in this process."""
        return 1 if self.weights.parallel is None else len(self.weights.parallel.mesh.local_devices)

    @property
    def attention(self) -> str:
        """Which implementation of attention runs: the kernels' name, or xla."""
        if self._is_native:
            return CPU_KERNELS.name
        return self.weights.kernels.name if self.weights.kernels else "xla"

    @property
    def num_programs(self) -> int:
        """Number of compiled programs."""
        return len(self.programs)

    def measure_activations(self, num_blocks: int) -> int:
        """Bytes of the largest programs' temporaries, as the compiler reports them, and of the arrays they pass on.

        They do not depend on `num_blocks`, since there is no copy of the pool; a good guess saves compiling again.
        """
        self._fit(num_blocks)
        largest = self.buckets.prefill[-1]
        others = SamplerKey(self.buckets.sample_rows[-1]), ScorerKey()
        hidden_bytes = largest.tokens * self.model_config.word_embed_proj_dim * self.dtype.itemsize
        step = self.programs[StepKey(largest, num_blocks)].temporary_bytes
        return max(step, *(temporary_bytes(self.programs[key]) for key in others)) + hidden_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers, on each device."""
        return block_bytes(self.arguments.pool(1), 1) // self.num_devices

    def measure_ranges(self, sequences: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Least and greatest number of every channel of the hidden vectors over sequences of ids, `[L, D]` each."""
        longest = max(map(len, sequences))
        program, found = self._form.compile_ranges(longest), []
        for ids in tqdm(sequences, desc="measuring ranges for the int8 cache", disable=is_hidden()):
            padded = np.pad(np.array(ids, np.int32), (0, longest - len(ids)))
            found.append(jax.device_get(program(padded, np.array(len(ids), np.int32))))
        ranges = np.stack(found)
        return ranges[:, 0].min(0), ranges[:, 1].max(0)

    def allocate(self, num_blocks: int, channels: np.ndarray | None = None) -> None:
        """Make pool and history; forgets programs compiled for another size.

        Args:
            channels: `[2, L, D]`, of an int8 pool that may keep hidden vectors: see `Pool`.
        """
        self._channels = channels
        self._fit(num_blocks)
        self.reset()

    def _fit(self, num_blocks: int) -> None:
        self.programs.forget_other_pools(num_blocks)
        self.num_blocks = num_blocks

    def reset(self) -> None:
        """Fresh pool and history, for instance after a step failed and took the donated ones with it.

        Waits for the device, so that one which is lost raises here.
        """
        self._end_iterations()
        self._fetched = []
        self.__dict__.pop("_pool", None)  # two do not fit
        self._last_outside = 0
        shapes = self.arguments.pool(self.num_blocks)
        self._pool = empty_pool(shapes, self._channels, self.arguments.sharding(POOL))
        history = self.arguments.history()
        self._history = zeros(history.shape, jnp.int32, self.arguments.sharding(EVERYWHERE))
        jax.block_until_ready((self._pool, self._history))

    def use_host(self, num_slots: int, *, codes: bool = False) -> None:
        """Have `num_slots` slots of host memory, after `allocate`; with `codes` blocks are int8 numbers there."""
        self._host, self._codes_host = HostMemory(num_slots, self.arguments.sharding(POOL)), codes

    def host_block_bytes(self, *, codes: bool) -> int:
        """Bytes of one block in the memory of this process's host."""
        own = self.block_bytes * self.num_local_devices
        if not codes:
            return own
        numbers = own // self.dtype.itemsize
        return numbers + numbers // self.model_config.head_dim * 4  # a float32 scale for each head

    def compile_all(self, progress: bool = False) -> None:
        """Compile every bucket and the conversion."""
        self.programs.compile_all(self._keys(), progress)

    def dispatch(self, batch: Batch) -> StepResults:
        """Start one step and the scoring that its `chunks` ask for; returns at once, arrays are still being computed.

        Replaces pool and history.
        """
        arrays = self.weights.outer.arrays
        for slot, ids in batch.known:
            row = np.zeros(self.shapes.max_model_len, np.int32)
            row[: len(ids)] = ids
            self._history = self.programs[HistoryKey()]([], self._history, np.array([slot], np.int32), row)
        if self._iterates and (own := batch.decode_input) is not None:
            return self._iterate(batch, own)
        self._end_iterations()
        step = self.programs[StepKey(batch.bucket, self.num_blocks)]
        last, self._pool, self._history, every, outside = step(self._pool, self._history, batch.tokens, batch.rows)
        sampled = None
        if batch.requests:
            rows = len(batch.sample_slot)
            allowed = self._every_token(rows) if batch.allowed is None else batch.allowed.words()  # during the step
            sampled, self._history = self.programs[SamplerKey(rows)](
                arrays, self._history, last, batch.sampling, batch.sample_slot, batch.sample_length, allowed
            )
        scores = []
        for chunk in batch.chunks:
            wanted = self.programs[GatherKey(batch.bucket)]([], every, chunk.index)
            scores.append(self.programs[ScorerKey()](arrays, wanted, chunk.target))
        pooled = self.programs[PoolerKey()]([], last) if batch.pools else None
        return StepResults(sampled, tuple(scores), outside, pooled)

    def _iterate(self, batch: Batch, own: DecodeInput) -> StepResults:
        """An iteration more of the call that is running, or the first one of another."""
        rows, running = len(batch.sample_slot), self._running
        key = IterationsKey(batch.bucket, self.num_blocks, rows)
        if running is None or self._running_key != key or not running.goes_on(own):
            self._end_iterations()
            running = FollowedIterations(
                own, vocab_size=self.model_config.vocab_size, counts_outside=self._pool.outside is not None
            )
            self._pool, self._history, running.done = self.programs[key](
                self._pool, self._history, own, self._every_token(rows), running.relay
            )
            self._running, self._running_key = running, key  # only what has been started
        return StepResults(None, (), running=running, number=running.last)

    def _end_iterations(self) -> None:
        """Before anything else takes the pool."""
        if self._running is not None:
            self._running.end()
        self._running = None

    def _every_token(self, rows: int) -> jax.Array:
        """Bits that allow every token: on the device, since most steps need them."""
        if rows not in self._every:
            shape, everywhere = self.arguments.allowed(rows).shape, self.arguments.sharding(EVERYWHERE)
            found = np.full(shape, EVERY, np.int32)
            self._every[rows] = jax.make_array_from_callback(shape, everywhere, found.__getitem__)
        return self._every[rows]

    def read(self, results: StepResults) -> StepResults:
        """Wait for a step and bring its results to the host as numpy arrays: the one read-back of an iteration."""
        if results.running is not None:
            sampled, outside = results.running.read(results.number)
            found = StepResults(sampled, (), outside)
        else:
            found = jax.device_get(results)
        if found.outside is not None:
            count = int(found.outside)
            self.num_outside += (count - self._last_outside) % 2**32
            self._last_outside = count
        return found

    def project(self, projections: Sequence[Projection]) -> None:
        """Compute keys and values of cached hidden vectors, in this order; keys may replace the vectors."""
        if not projections:
            return
        self._end_iterations()
        convert = self.programs[ConversionKey(self.num_blocks)]
        blocks = np.concatenate([[sources, *targets] for sources, targets in projections], axis=1)
        size = self.arguments.convert_pages
        for at in range(0, blocks.shape[1], size):
            part = blocks[:, at : at + size]
            padded = np.full((3, size), self.num_blocks, np.int32)
            padded[:, : part.shape[1]] = part
            self._pool = convert(self._pool, *padded)

    @property
    def block_shape(self) -> Block:
        """See `BlockStore`."""
        return abstract_block(self.arguments.pool(self.num_blocks), self.num_blocks)

    @property
    def block_form(self) -> dict[str, Any]:
        """See `BlockStore`: an int8 pool's channels are measured, and its scales lie as its devices do."""
        return {
            "dtype": self.dtype.name, "attention": self.attention, "quantization": self.weights.quantization,
            "devices": self.num_devices, "channels": digest_of(self._channels),
        }  # fmt: skip

    def read_blocks(self, blocks: Sequence[int]) -> list[Block]:
        """See `BlockStore`."""
        self._end_iterations()
        found: list[Block] = []
        for part, _ in _in_parts([(block, 0) for block in blocks]):
            found += jax.device_get(self.programs[SaveKey(self.num_blocks, len(part))]([], self._pool, part))
        return found

    def write_blocks(self, blocks: Sequence[int], contents: Sequence[Block]) -> None:
        """See `BlockStore`."""
        self._end_iterations()
        for part, places in _in_parts([(block, place) for place, block in enumerate(blocks)]):
            found = tuple(jax.device_put(contents[place], self.arguments.sharding(POOL)) for place in places)
            self._pool = self.programs[RestoreKey(self.num_blocks, len(part))]([], self._pool, part, found)

    def save(self, pairs: Sequence[tuple[int, int]]) -> None:
        """See `StepRunner`."""
        assert self._host is not None
        self._end_iterations()
        for blocks, slots in _in_parts(pairs):
            found = self.programs[SaveKey(self.num_blocks, len(blocks), self._codes_host)]([], self._pool, blocks)
            self._host.put(slots.tolist(), found)

    def restore(self, pairs: Sequence[tuple[int, int]]) -> None:
        """See `StepRunner`."""
        assert self._host is not None
        self._end_iterations()
        for slots, blocks in _in_parts(pairs):
            found = tuple(self._host.get(slots.tolist()))
            self._pool = self.programs[RestoreKey(self.num_blocks, len(blocks), self._codes_host)](
                [], self._pool, blocks, found
            )

    def fetch(self, pairs: Sequence[tuple[int, int]]) -> None:
        """See `StepRunner`: into arrays of their own, to which devices copy while they compute."""
        assert self._host is not None
        self._fetched = []
        self._fetched = [(blocks, tuple(self._host.get(slots.tolist()))) for slots, blocks in _in_parts(pairs)]

    def land(self) -> None:
        """See `StepRunner`."""
        fetched, self._fetched = self._fetched, []
        if fetched:
            self._end_iterations()
        for blocks, found in fetched:
            self._pool = self.programs[RestoreKey(self.num_blocks, len(blocks), self._codes_host)](
                [], self._pool, blocks, found
            )

    def measure_copies(self, rounds: int = 3) -> tuple[float, float]:
        """Seconds to save a block and to restore one, the best of some rounds; before anything is in host memory."""
        assert self._host is not None
        count = min(MOVED_AT_ONCE, self.num_blocks, self._host.num_slots)
        pairs, times = [(i, i) for i in range(count)], []
        for _ in range(rounds + 1):  # the first one compiles
            started = time.perf_counter()
            self.save(pairs)
            self._host.wait()
            saved = time.perf_counter()
            self.restore(pairs)
            jax.block_until_ready(self._pool)
            times.append((saved - started, time.perf_counter() - saved))
        best = [min(column) / count for column in zip(*times[1:], strict=True)]
        return best[0], best[1]

    def _keys(self) -> Iterator[AnyKey]:
        """All programs that serving needs."""
        yield from (StepKey(bucket, self.num_blocks) for bucket in self.buckets.all)
        if self._iterates:
            for rows in self.buckets.sample_rows:
                yield from (IterationsKey(bucket, self.num_blocks, rows) for bucket in self.buckets.decode)
        yield from map(SamplerKey, self.buckets.sample_rows)
        yield from map(GatherKey, self.buckets.prefill)
        yield ScorerKey()
        yield PoolerKey()
        yield HistoryKey()
        if self.shapes.kinds.converts:
            yield ConversionKey(self.num_blocks)
        if self._host is not None or self.moves_blocks:
            forms = {False} if self.moves_blocks else set()
            for count, codes in product((1, MOVED_AT_ONCE), forms | ({self._codes_host} if self._host else set())):
                yield from (SaveKey(self.num_blocks, count, codes), RestoreKey(self.num_blocks, count, codes))


def _in_parts(pairs: Sequence[tuple[int, int]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The two columns of pairs, `MOVED_AT_ONCE` at once and the rest one by one, for which programs are compiled."""
    for part in batched(pairs, MOVED_AT_ONCE):
        for group in [part] if len(part) == MOVED_AT_ONCE else [(pair,) for pair in part]:
            first, second = np.array(group, np.int32).T
            yield first, second
