"""What the device sees of an iteration: arrays of a bucket's shape. `builder.py` fills them.

Shape letters: T token slots of the bucket, R row slots, W pages per table.
"""

from collections.abc import Sequence
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

from apt_jax.batching.allowed_tokens import AllowedTokens
from apt_jax.batching.buckets import Bucket
from apt_jax.batching.sampling_rows import Sampling
from apt_jax.cache import KINDS, CacheKind, Vector
from apt_jax.request import Request
from apt_jax.scheduling.state import Span

NUM_TABLES = max(kind.blocks_per_page for kind in KINDS)

type Array = Any  # numpy on the host, jax inside a compiled step


class Tokens(NamedTuple):
    """Tokens that run in this iteration, packed; a padding token has row R."""

    ids: Array  # int32 [T]
    on_device: Array  # bool [T]: the id is in the device's history, not in `ids`
    row: Array  # int32 [T]
    position: Array  # int32 [T]


class Rows(NamedTuple):
    """The requests of this iteration; a padding row has slot max_num_seqs and length 0."""

    slot: Array  # int32 [R]
    start: Array  # int32 [R]: tokens already cached
    length: Array  # int32 [R]: tokens that run now
    prompt: Array  # int32 [R]: of these, the first ones that are of its prompt; the others were generated
    last: Array  # int32 [R]: index in Tokens of the row's last token
    wanted: Array  # int32 [R]: of its tokens, the last ones after which hidden states are wanted
    kind: Array  # int32 [R]: `CacheKind.index`
    tables: tuple[Array, ...]  # NUM_TABLES of int32 [R, W]: number v has the blocks of vector v of the row's kind

    def of_kind(self, kind: CacheKind) -> Array:
        """bool `[R]`: rows of that kind."""
        return self.kind == kind.index

    def keep(self, vector: Vector) -> Array:
        """bool `[R]`: rows whose kind keeps that vector of each token."""
        return reduce(or_, (self.of_kind(kind) for kind in KINDS if vector in kind.spec.vectors))

    def table_of(self, vector: Vector) -> Array:
        """Block table `[R, W]` of that vector, in rows that keep it; it is at the same place in every such kind."""
        (place,) = {kind.spec.vectors.index(vector) for kind in KINDS if vector in kind.spec.vectors}
        return self.tables[place]

    def from_block(self, base: Array) -> "Rows":
        """The same with block `base` of the pool as the tables' block 0: a layer's."""
        return self._replace(tables=tuple(table + base for table in self.tables))


class ScoreChunk(NamedTuple):
    """Prompt positions after which the log-probability of the token that followed is wanted."""

    index: Array  # int32 [C]: index in Tokens; padding 0
    target: Array  # int32 [C]: the token that followed; padding 0
    requests: tuple[Request, ...]  # whose positions these are, without padding


class Known(NamedTuple):
    """The first tokens of a request that its slot of the device's history lacks, since they came from the cache."""

    slot: int
    ids: Sequence[int]


class DecodeInput(NamedTuple):
    """All that the device is given for an iteration in which every row has one token and samples."""

    tokens: Tokens
    rows: Rows
    sampling: Sampling
    sample_slot: Array  # int32 [sample_rows]
    sample_length: Array  # int32 [sample_rows]


class Batch(NamedTuple):
    """One iteration's device input, and which request each row that samples is; these rows come first."""

    bucket: Bucket
    tokens: Tokens
    rows: Rows
    sampling: Sampling  # of sample_rows rows
    sample_slot: Array  # int32 [sample_rows]: padding is max_num_seqs
    sample_length: Array  # int32 [sample_rows]: tokens before the one to sample
    requests: tuple[Request, ...]
    spans: tuple[Span, ...]  # row by row
    chunks: tuple[ScoreChunk, ...] = ()
    pools: bool = False  # whether hidden states of the rows that sample are wanted
    allowed: AllowedTokens | None = None  # the tokens that may be sampled; None: all
    known: tuple[Known, ...] = ()  # of requests with penalties, which count them

    @property
    def decode_input(self) -> DecodeInput | None:
        """None unless every row has one token and samples, and nothing else is asked for or to be known before."""
        decodes = self.bucket.decode_only and len(self.requests) == len(self.spans)
        if not decodes or self.pools or self.known or self.allowed is not None:
            return None
        return DecodeInput(self.tokens, self.rows, self.sampling, self.sample_slot, self.sample_length)
