"""Shapes of the arrays that programs take, without the weights: what a program is compiled for."""

from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from apt_jax.attention import xla as xla_attention
from apt_jax.attention.kinds import KindMix
from apt_jax.attention.pool import Pool
from apt_jax.batching.allowed_tokens import num_words
from apt_jax.batching.arrays import NUM_TABLES, DecodeInput, Rows, Tokens
from apt_jax.batching.buckets import Bucket, Buckets
from apt_jax.batching.sampling_rows import Sampling, empty_sampling
from apt_jax.cache import CacheDtype, Vector
from apt_jax.execution.pool import abstract_pool
from apt_jax.model_config import ModelConfig
from apt_jax.models.sharding import POOL, Parallel

CONVERT_TOKENS = 256  # cached tokens that one call of the conversion program handles


@dataclass(frozen=True)
class Shapes:
    """Sizes that all programs share."""

    num_slots: int
    max_model_len: int
    table_pages: int
    block_size: int
    kinds: KindMix
    cache_dtype: CacheDtype = "auto"


@dataclass(frozen=True)
class Arguments:
    """The programs' arguments without the weights: shapes, number types and placement.

    Attributes:
        device: where everything lies if the model is not split.
    """

    model_config: ModelConfig
    shapes: Shapes
    buckets: Buckets
    dtype: np.dtype
    device: jax.Device
    parallel: Parallel | None

    def sharding(self, spec: PartitionSpec) -> Sharding:
        """Where an array lies that is split over the mesh as `spec` says; on one device, there."""
        return SingleDeviceSharding(self.device) if self.parallel is None else NamedSharding(self.parallel.mesh, spec)

    def pool(self, num_blocks: int) -> Pool:
        """The cache pool of P = `num_blocks`."""
        return abstract_pool(
            self.model_config, num_blocks, self.shapes.block_size, self.dtype,
            is_coded=self.shapes.cache_dtype == "int8", keeps_hidden=self.shapes.kinds.keep(Vector.HIDDEN),
            num_devices=1 if self.parallel is None else self.parallel.num_devices,
            sharding=None if self.parallel is None else self.sharding(POOL),
        )  # fmt: skip

    def history(self) -> jax.ShapeDtypeStruct:
        """Token ids of the requests, `[slots, max_model_len]`."""
        return abstract((self.shapes.num_slots, self.shapes.max_model_len), np.int32)

    def tokens(self, bucket: Bucket) -> Tokens:
        """The token arrays of a step, `[T]` each, T = `bucket.tokens`."""
        return Tokens(*(abstract((bucket.tokens,), dtype) for dtype in (np.int32, np.bool_, np.int32, np.int32)))

    def rows(self, bucket: Bucket) -> Rows:
        """The row arrays of a step, `[R]` each, and block tables `[R, W]`; R = `bucket.rows`."""
        number = abstract((bucket.rows,), np.int32)
        table = abstract((bucket.rows, self.shapes.table_pages), np.int32)
        return Rows(*(number,) * 7, (table,) * NUM_TABLES)

    def sampling(self, rows: int) -> Sampling:
        """Sampling parameters of `rows` rows."""
        return Sampling(*(abstract((rows, *a.shape[1:]), a.dtype) for a in empty_sampling(1)))

    def decode_input(self, bucket: Bucket, rows: int) -> DecodeInput:
        """What an iteration of a decode bucket works on, `rows` rows that sample."""
        number = self.numbers(rows)
        return DecodeInput(self.tokens(bucket), self.rows(bucket), self.sampling(rows), number, number)

    def allowed(self, rows: int) -> jax.ShapeDtypeStruct:
        """Bits of the tokens that each row may sample."""
        return self.numbers(rows, num_words(self.model_config.vocab_size))

    def residual(self, tokens: int) -> jax.ShapeDtypeStruct:
        """The residual stream between layers, `[T, D]`."""
        return abstract((tokens, self.model_config.hidden_size), self.dtype)

    def hidden(self, rows: int) -> jax.ShapeDtypeStruct:
        """Hidden states after the last layer, `[rows, E]`."""
        return abstract((rows, self.model_config.word_embed_proj_dim), self.dtype)

    def numbers(self, *shape: int) -> jax.ShapeDtypeStruct:
        """An int32 array of this shape."""
        return abstract(shape, np.int32)

    @property
    def convert_pages(self) -> int:
        """Pages that one call of the conversion program handles."""
        return max(CONVERT_TOKENS // self.shapes.block_size, 1)


def abstract(shape: tuple[int, ...], dtype: DTypeLike) -> jax.ShapeDtypeStruct:
    """An array of any contents on the default device."""
    return jax.ShapeDtypeStruct(shape, dtype)


def pages_multiple(block_size: int) -> int:
    """Tables are padded to a multiple of this many pages, so that every chunk lies inside."""
    return max(xla_attention.CHUNK_TOKENS // block_size, 1)
