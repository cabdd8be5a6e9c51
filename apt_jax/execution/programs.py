"""All compiled programs of an engine, by what they are for; one that is missing is compiled when it is asked for."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.stages import Compiled
from tqdm import tqdm

from apt_jax.attention.pool import Pool
from apt_jax.batching.buckets import Bucket
from apt_jax.batching.sampling_rows import Sampling
from apt_jax.execution.arguments import Arguments
from apt_jax.execution.compiler import Compiler
from apt_jax.execution.forms.interface import Conversion, Form, Iterations, Step
from apt_jax.execution.forms.native import NativeForm
from apt_jax.execution.pool import (
    Block,
    abstract_block,
    abstract_encoded,
    decoded,
    encoded,
    read_blocks,
    write_blocks,
)
from apt_jax.execution.sampling import Sampled, Scored, score
from apt_jax.execution.steps import run_sampling
from apt_jax.execution.weights.layout import Weights
from apt_jax.models.sharding import POOL
from apt_jax.progress import is_hidden


class Key[Program]:
    """What a program is for; `Program` is the type of it."""


@dataclass(frozen=True)
class StepKey(Key[Step]):
    """A step of one bucket."""

    bucket: Bucket
    num_blocks: int


@dataclass(frozen=True)
class ConversionKey(Key[Conversion]):
    """The conversion of hidden blocks to KV, in a pool of P = `num_blocks`."""

    num_blocks: int


@dataclass(frozen=True)
class SaveKey(Key[Compiled]):
    """Takes `count` blocks out of a pool of P = `num_blocks`, for host memory; as int8 numbers if `codes`."""

    num_blocks: int
    count: int
    codes: bool = False


@dataclass(frozen=True)
class RestoreKey(Key[Compiled]):
    """Puts `count` blocks back into a pool of P = `num_blocks`; `codes`: they are int8 numbers."""

    num_blocks: int
    count: int
    codes: bool = False


@dataclass(frozen=True)
class SamplerKey(Key[Compiled]):
    """`run_sampling` of `rows` rows."""

    rows: int


@dataclass(frozen=True)
class IterationsKey(Key[Iterations]):
    """Decode iterations of one bucket with `rows` rows that sample."""

    bucket: Bucket
    num_blocks: int
    rows: int


@dataclass(frozen=True)
class HistoryKey(Key[Compiled]):
    """Writes a request's tokens to its slot of the history."""


@dataclass(frozen=True)
class GatherKey(Key[Compiled]):
    """Gathers the rows to score from a step's hidden states."""

    bucket: Bucket


@dataclass(frozen=True)
class ScorerKey(Key[Compiled]):
    """`score` of one chunk."""


@dataclass(frozen=True)
class PoolerKey(Key[Compiled]):
    """Hands out the hidden states after each row's last token, as float32."""


type AnyProgram = Step | Iterations | Conversion | Compiled
type AnyKey = Key[Any]


class Programs:
    """Compiles and keeps programs; each is called as an executable, so that nothing else compiles."""

    def __init__(self, form: Form, weights: Weights, arguments: Arguments, compiler: Compiler):
        self._form, self._weights, self._arguments, self._compiler = form, weights, arguments, compiler
        self._programs: dict[AnyKey, AnyProgram] = {}

    def __len__(self) -> int:
        return len(self._programs)

    def __iter__(self) -> Iterator[AnyKey]:
        return iter(self._programs)

    def __getitem__[Program](self, key: Key[Program]) -> Program:
        """The program of `key`, which is compiled if it is missing."""
        if key not in self._programs:
            self._programs[key] = self._compile(key)
        return cast(Program, self._programs[key])

    @property
    def steps(self) -> list[Step]:
        """The steps that are compiled."""
        return [self[key] for key in self._programs if isinstance(key, StepKey)]

    def compile_all(self, keys: Iterable[AnyKey], progress: bool = False) -> None:
        """Compile those that are missing, two at a time, since XLA compiles without the interpreter lock."""
        with ThreadPoolExecutor(2) as threads:
            jobs = {threads.submit(self._compile, key): key for key in keys if key not in self._programs}
            for job in tqdm(as_completed(jobs), total=len(jobs), desc="compiling", disable=is_hidden(progress)):
                self._programs[jobs[job]] = job.result()

    def forget_other_pools(self, num_blocks: int) -> None:
        """Forget programs for a pool of another size."""
        self._programs = {
            key: program
            for key, program in self._programs.items()
            if getattr(key, "num_blocks", num_blocks) == num_blocks
        }

    def _compile(self, key: AnyKey) -> AnyProgram:
        match key:
            case StepKey():
                return self._form.compile_step(key.bucket, key.num_blocks)
            case IterationsKey():
                assert isinstance(self._form, NativeForm)
                return self._form.compile_iterations(key.bucket, key.num_blocks, key.rows)
            case ConversionKey():
                return self._form.compile_conversion(key.num_blocks)
            case SaveKey():
                return self._compile_save(key)
            case RestoreKey():
                return self._compile_restore(key)
            case SamplerKey():
                return self._compile_sampler(key.rows)
            case HistoryKey():
                return self._compile_history()
            case GatherKey():
                return self._compile_gather(key.bucket)
            case ScorerKey():
                return self._compile_scorer()
            case PoolerKey():
                return self._compile_pooler()
        raise TypeError(f"{key=} is of no program")

    def _compile_save(self, key: SaveKey) -> Compiled:
        head_dim, name = (
            self._arguments.model_config.head_dim,
            f"save {key.num_blocks} {key.count}{' int8' * key.codes}",
        )

        def save(_: list[jax.Array], pool: Pool, blocks: jax.Array) -> tuple[Block, ...]:
            found = read_blocks(pool, blocks, key.num_blocks)
            return tuple(encoded(block, head_dim) for block in found) if key.codes else found

        pool, blocks = self._arguments.pool(key.num_blocks), self._arguments.numbers(key.count)
        return self._compiler.compile(name, save, [], pool, blocks, outs=POOL)

    def _compile_restore(self, key: RestoreKey) -> Compiled:
        heads, name = self._arguments.model_config.num_attention_heads, f"restore {key.num_blocks} {key.count}"

        def restore(_: list[jax.Array], pool: Pool, blocks: jax.Array, found: tuple[Block, ...]) -> Pool:
            if key.codes:
                found = tuple(decoded(block, pool.numbers.dtype) for block in found)
            return write_blocks(pool, blocks, found, key.num_blocks)

        pool, blocks = self._arguments.pool(key.num_blocks), self._arguments.numbers(key.count)
        one = abstract_block(pool, key.num_blocks)
        found = (abstract_encoded(one, heads) if key.codes else one,) * key.count
        return self._compiler.compile(
            f"{name}{' int8' * key.codes}", restore, [], pool, blocks, found, donate=(1,), outs=POOL
        )

    def _compile_sampler(self, rows: int) -> Compiled:
        weights, arguments = self._weights, self._arguments

        def sampler(
            arrays: list[jax.Array], history: jax.Array, hidden: jax.Array, sampling: Sampling, slot: jax.Array,
            length: jax.Array, allowed: jax.Array,
        ) -> tuple[Sampled, jax.Array]:  # fmt: skip
            return run_sampling(weights.model(arrays), history, hidden, sampling, slot, length, allowed)

        return self._compiler.compile(
            "sampler", sampler, weights.outer.arrays, arguments.history(), arguments.hidden(arguments.buckets.max_rows),
            arguments.sampling(rows), arguments.numbers(rows), arguments.numbers(rows),
            arguments.allowed(rows), donate=(1,),
        )  # fmt: skip

    def _compile_history(self) -> Compiled:
        def history(_: list[jax.Array], known: jax.Array, slot: jax.Array, ids: jax.Array) -> jax.Array:
            return known.at[slot[0]].set(ids)

        arguments = self._arguments
        ids = arguments.numbers(arguments.shapes.max_model_len)
        return self._compiler.compile(
            "history", history, [], arguments.history(), arguments.numbers(1), ids, donate=(1,)
        )

    def _compile_gather(self, bucket: Bucket) -> Compiled:
        def gather(_: list[jax.Array], hidden: jax.Array, index: jax.Array) -> jax.Array:
            return hidden[index]

        arguments = self._arguments
        index = arguments.numbers(arguments.buckets.score_rows)
        return self._compiler.compile("gather", gather, [], arguments.hidden(bucket.tokens), index)

    def _compile_pooler(self) -> Compiled:
        def pooler(_: list[jax.Array], hidden: jax.Array) -> jax.Array:
            return hidden.astype(jnp.float32)

        return self._compiler.compile("pooler", pooler, [], self._arguments.hidden(self._arguments.buckets.max_rows))

    def _compile_scorer(self) -> Compiled:
        weights, arguments = self._weights, self._arguments

        def scorer(arrays: list[jax.Array], hidden: jax.Array, target: jax.Array) -> Scored:
            return score(weights.model(arrays).logits(hidden), target)

        rows = arguments.buckets.score_rows
        return self._compiler.compile(
            "scorer", scorer, weights.outer.arrays, arguments.hidden(rows), arguments.numbers(rows)
        )
