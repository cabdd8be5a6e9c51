"""A runner without a model, whose cache holds token ids: the next token is a hash of what the tables lead to.

So a wrong page, one that was overwritten, or one read before it was written, changes the tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from apt_jax.batching.arrays import Batch
from apt_jax.batching.buckets import Buckets
from apt_jax.batching.builder import BatchBuilder, table_pages
from apt_jax.cache import KINDS, CacheKind, Projection
from apt_jax.engine.engine import Engine
from apt_jax.engine.setup import EngineSetup
from apt_jax.engine_config import EngineConfig
from apt_jax.execution.interface import StepResults
from apt_jax.execution.pool import Block
from apt_jax.execution.sampling import Sampled
from apt_jax.model_config import ModelConfig
from apt_jax.scheduling.costs.cost_model import CostModel
from apt_jax.scheduling.costs.hardware import HARDWARE, MODELS
from apt_jax.scheduling.host_tier import HostTier
from apt_jax.scheduling.prefix_pool import make_pool
from apt_jax.scheduling.state import Limits, SchedulerState

VOCABULARY = 97
KEY, VALUE, HIDDEN = 1_000, 2_000, 3_000  # a cell is one of these plus the token's id
VECTORS = {CacheKind.KV: (KEY, VALUE), CacheKind.HIDDEN: (HIDDEN,)}


def next_token(token_ids: Sequence[int]) -> int:
    """What follows these tokens."""
    found = 7
    for token_id in token_ids:
        found = (31 * found + token_id + 1) % 1_000_003
    return found % VOCABULARY


def answer(prompt: Sequence[int], count: int) -> list[int]:
    """The tokens of an answer."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class TokenRunner:
    """A `StepRunner`; `pool` is int `[blocks, block_size]`. A row that reads what it should not is not finite."""

    num_programs = 1
    num_outside = 0
    moves_blocks = False
    block_form: ClassVar[dict[str, Any]] = {"dtype": "token ids"}

    def __init__(self, num_blocks: int, block_size: int, slots: int, context: int):
        self._pool_shape, self._history_shape = (num_blocks, block_size), (slots + 1, context + 1)
        self.host = {}  # cells of a block, by slot
        self.num_fetched = 0
        self.failing_copies: Callable[[], bool] = lambda: False
        self.reset()

    def reset(self) -> None:
        self.fetched = []  # blocks, and the cells that come to them
        self.pool, self.history = np.zeros(self._pool_shape, int), np.zeros(self._history_shape, int)

    def compile_all(self, progress: bool = False) -> None:
        pass

    def dispatch(self, batch: Batch) -> StepResults:
        size, (tokens, rows) = self.pool.shape[1], (batch.tokens, batch.rows)
        for slot, ids in batch.known:
            self.history[slot, : len(ids)] = ids
        for row, number, on_device, position in zip(
            tokens.row, tokens.ids, tokens.on_device, tokens.position, strict=True
        ):
            if row < len(batch.spans):
                number = self.history[rows.slot[row], position] if on_device else number
                self.history[rows.slot[row], position] = number
                for v, mark in enumerate(VECTORS[KINDS[rows.kind[row]]]):
                    self.pool[rows.tables[v][row, position // size], position % size] = mark + number
        count = len(batch.sample_slot)
        token, finite = np.zeros(count, np.int32), np.ones(count, bool)
        for row in range(len(batch.requests)):
            length = int(batch.sample_length[row])
            where = np.arange(length)
            read = [
                self.pool[rows.tables[v][row, where // size], where % size] - mark
                for v, mark in enumerate(VECTORS[KINDS[rows.kind[row]]])
            ]
            finite[row] = all((cells >= 0).all() and (cells < VOCABULARY).all() for cells in read)
            finite[row] &= all((cells == read[0]).all() for cells in read)
            if batch.requests[row].params.has_penalties:  # which count the tokens of the history
                finite[row] &= (self.history[batch.sample_slot[row], :length] == read[0]).all()
            token[row] = next_token(read[0].tolist())
            self.history[batch.sample_slot[row], length] = token[row]
        nothing = np.zeros((count, 1))
        return StepResults(Sampled(token, finite, nothing[:, 0], nothing[:, 0], nothing, nothing), ())

    def read(self, results: StepResults) -> StepResults:
        return results

    def save(self, pairs: Sequence[tuple[int, int]]) -> None:
        for block, slot in pairs:
            self._may_fail()
            self.host[slot] = self.pool[block].copy()

    def restore(self, pairs: Sequence[tuple[int, int]]) -> None:
        for slot, block in pairs:
            self._may_fail()
            self.pool[block] = self.host[slot]

    def fetch(self, pairs: Sequence[tuple[int, int]]) -> None:
        self.fetched = []
        found = []
        for slot, block in pairs:
            self._may_fail()
            found.append((block, self.host[slot].copy()))
        self.fetched = found
        self.num_fetched += len(found)

    def land(self) -> None:
        for block, cells in self.fetched:
            self.pool[block] = cells
        self.fetched = []

    @property
    def block_shape(self) -> Block:
        return Block(self.pool[0])

    def read_blocks(self, blocks: Sequence[int]) -> list[Block]:
        return [Block(self.pool[block].copy()) for block in blocks]

    def write_blocks(self, blocks: Sequence[int], contents: Sequence[Block]) -> None:
        for block, content in zip(blocks, contents, strict=True):
            self.pool[block] = content.numbers

    def _may_fail(self) -> None:
        if self.failing_copies():
            raise MemoryError("no memory for a copy")

    def project(self, projections: Sequence[Projection]) -> None:
        for sources, (keys, values) in projections:
            hidden = self.pool[sources].copy()  # all are read before any is written
            self.pool[keys], self.pool[values] = hidden - HIDDEN + KEY, hidden - HIDDEN + VALUE


def make_engine(num_blocks: int, **options) -> Engine:
    """An engine whose model is `next_token`; `options` are the configuration's, a block of host memory is one byte."""
    config = EngineConfig(
        **{
            "max_model_len": 96, "max_num_seqs": 4, "max_num_batched_tokens": 16, "block_size": 4,
            "scheduling_policy": "fcfs", "async_scheduling": False, "calibrate": False, **options,
        }
    )  # fmt: skip
    limits = Limits(config.max_num_seqs, config.max_num_batched_tokens, config.cache_mode)
    buckets = Buckets(max_num_seqs=limits.max_num_seqs, max_num_batched_tokens=limits.max_num_batched_tokens)
    runner = TokenRunner(num_blocks, config.block_size, limits.max_num_seqs, config.max_model_len)
    pages = table_pages(config.max_model_len, config.block_size, 1)
    host = HostTier(config.host_cache_bytes) if config.host_cache_bytes else None
    pool = make_pool(num_blocks, config.block_size, prefix_caching=config.enable_prefix_caching, host=host)
    setup = EngineSetup(
        model_config=ModelConfig(vocab_size=VOCABULARY, max_position_embeddings=96, eos_token_ids=()), config=config,
        runner=runner, builder=BatchBuilder(buckets, num_slots=limits.max_num_seqs, table_pages=pages),
        state=SchedulerState(pool, limits), memory=None, cost_model=CostModel(MODELS["opt-125m"], HARDWARE["h200"]),
        calibration_file=None, attention="none", dtype=np.dtype(np.float32),
    )  # fmt: skip
    return Engine(setup, fingerprint=f"{VOCABULARY} tokens")
