"""Which attention kernels a platform has, and whether they compute correctly on this device."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from apt_jax.pallas_kernels import reference
from apt_jax.pallas_kernels.reference import Partial

_TOLERANCE = {2: 2e-2, 4: 1e-3}  # by bytes of a query's number; float32 kernels may multiply in a shorter format
_LANES = 128  # what a block's row of scales is padded to


class Kernels(NamedTuple):
    """The kernels of a platform, with the signatures of `reference.py`; either both of prefix attention or none.

    Differences from the references: `hidden_decode` and `hidden_prefix` may give `out` in the pool's dtype, and
    `hidden_decode` anything in rows of length 0. Each may be None, and XLA does its part: `hidden_decode` where there
    is no kernel for hidden rows, prefix attention, `chunk` (a prefill chunk's own tokens), `cache_writer`, which may
    not handle every dtype, `scale_writer`, `scale_reader` (of blocks that are projected), and all that use the pool
    where it is int8 and they do not read it (`without_pool`).
    """

    name: str
    kv_decode: Callable[..., Partial] | None
    hidden_decode: Callable[..., Partial] | None
    kv_prefix: Callable[..., Partial] | None = None
    hidden_prefix: Callable[..., Partial] | None = None
    chunk: Callable[..., Partial] | None = None
    cache_writer: Callable[..., Callable[..., jax.Array]] | None = None
    scale_writer: Callable[..., Callable[..., jax.Array]] | None = None
    scale_reader: Callable[..., jax.Array] | None = None
    reads_int8: bool = False
    """Whether attention takes the `scales` of an int8 pool, and `cache_writer`, if there is one, its numbers."""
    hidden_prefix_reads: int = 0
    """How often `hidden_prefix` reads a row's vectors for each query; 0: once for many queries."""


def without_pool(kernels: Kernels) -> Kernels | None:
    """Those that neither read nor write the pool, for a pool of a form that no kernel takes; None if there are none."""
    if kernels.chunk is None:
        return None
    name = kernels.name if kernels.kv_decode is None else f"xla, chunks by {kernels.name}"
    return Kernels(name, None, None, chunk=kernels.chunk)


REFERENCES = Kernels(
    "reference",
    reference.kv_decode_attention,
    reference.hidden_decode_attention,
    reference.kv_prefix_attention,
    reference.hidden_prefix_attention,
    reference.chunk_attention,
    reference.cache_writer,
    reference.scale_writer,
    reference.scale_reader,
    reads_int8=True,
)


def kernels_for(device: jax.Device) -> Kernels:
    """The kernels for a device's platform; on a CPU those for TPU, interpreted.

    Raises:
        NotImplementedError: there are none for this platform, or this generation of GPUs.
    """
    if device.platform == "gpu":
        return gpu_kernels(device.compute_capability)
    if device.platform == "tpu":
        return tpu_kernels("tpu", cores=getattr(device, "num_cores", None) or 1, interpret=False)
    if device.platform == "cpu":
        return tpu_kernels("tpu-interpreted", cores=1, interpret=True)
    raise NotImplementedError(f"there are no Pallas kernels for platform {device.platform!r}; use tpu, gpu or cpu")


def gpu_kernels(compute_capability: str) -> Kernels:
    """The GPU kernels: Hopper (9.0) has all; later and Ampere and Ada (8.0 and up) KV decode, without tensor cores.

    Raises:
        NotImplementedError: an older GPU, or one of another maker.
    """
    from apt_jax.pallas_kernels.gpu import chunk as gpu_chunk
    from apt_jax.pallas_kernels.gpu import hidden_decode, hidden_prefix, kv_decode, kv_fma, kv_prefix

    generation, chunk = compute_capability.split(".")[0], gpu_chunk.chunk_attention
    if generation == "9":
        return Kernels(
            "gpu",
            kv_decode.kv_decode_attention,
            hidden_decode.hidden_decode_attention,
            kv_prefix.kv_prefix_attention,
            hidden_prefix.hidden_prefix_attention,
            chunk,
            reads_int8=True,
            hidden_prefix_reads=2,
        )
    if generation.isdecimal() and int(generation) >= 8:
        decode = functools.partial(kv_fma.kv_decode_attention, strides_at_once=1 if generation == "8" else 2)
        return Kernels("gpu-kv", decode, None, chunk=chunk, reads_int8=True)
    raise NotImplementedError(
        f"there are no Pallas kernels for GPUs of {compute_capability=}; they need 8.0 (KV) or 9.0 (KV and hidden)"
    )


def tpu_kernels(name: str, *, cores: int, interpret: Any) -> Kernels:
    """The TPU kernels with these options."""
    from apt_jax.pallas_kernels.tpu import cache_write as tpu_cache_write
    from apt_jax.pallas_kernels.tpu import chunk as tpu_chunk
    from apt_jax.pallas_kernels.tpu import hidden_decode as tpu_hidden_decode
    from apt_jax.pallas_kernels.tpu import hidden_prefix as tpu_hidden_prefix
    from apt_jax.pallas_kernels.tpu import kv_decode as tpu_kv_decode
    from apt_jax.pallas_kernels.tpu import kv_prefix as tpu_kv_prefix
    from apt_jax.pallas_kernels.tpu import scale_read as tpu_scale_read
    from apt_jax.pallas_kernels.tpu import scale_write as tpu_scale_write

    options = {"cores": cores, "interpret": interpret}

    def hidden_decode(q_wide: jax.Array, pool: jax.Array, *rows: jax.Array, scales: jax.Array | None = None) -> Partial:
        kernel = tpu_hidden_decode.hidden_decode_attention
        dtype = pool.dtype if scales is None else q_wide.dtype
        return kernel(q_wide, pool, *rows, scales=scales, out_dtype=dtype, clears=False, **options)

    def hidden_prefix(q_wide: jax.Array, pool: jax.Array, *rows: jax.Array, scales: jax.Array | None = None) -> Partial:
        kernel = tpu_hidden_prefix.hidden_prefix_attention
        dtype = pool.dtype if scales is None else q_wide.dtype
        return kernel(q_wide, pool, *rows, scales=scales, out_dtype=dtype, interpret=interpret)

    return Kernels(
        name,
        functools.partial(tpu_kv_decode.kv_decode_attention, **options),
        hidden_decode,
        functools.partial(tpu_kv_prefix.kv_prefix_attention, **options),
        hidden_prefix,
        functools.partial(tpu_chunk.chunk_attention, interpret=interpret),
        functools.partial(tpu_cache_write.cache_writer, **options),
        functools.partial(tpu_scale_write.scale_writer, interpret=interpret),
        functools.partial(tpu_scale_read.scale_reader, interpret=interpret),
        reads_int8=True,
    )


def self_check(
    kernels: Kernels, *, heads: int, head_dim: int, block_size: int, dtype: DTypeLike, is_coded: bool = False
) -> str | None:
    """Compare decode attention with the references on a few rows; the reason not to use the kernels, or None.

    On the default device. Rows have no token, one, a block and one more, and several hundred; blocks are shuffled and
    NaN beyond a row's length. Takes some seconds, most of it compiling.

    Args:
        is_coded: over an int8 pool, which the kernels must read.
    """
    case = _Case(heads, head_dim, block_size, dtype, is_coded)
    reason = _differs(kernels, "kv_decode", case)
    if reason is None and kernels.hidden_decode is not None:
        reason = _differs(kernels, "hidden_decode", case)
    return reason


def check_prefix(
    kernels: Kernels, *, heads: int, head_dim: int, block_size: int, dtype: DTypeLike, is_coded: bool = False
) -> str | None:
    """Compare prefix attention, which must exist, as `self_check` does decode attention; rows have a few queries."""
    case = _Case(heads, head_dim, block_size, dtype, is_coded)
    return _differs(kernels, "kv_prefix", case) or _differs(kernels, "hidden_prefix", case)


class Difference(NamedTuple):
    """How far a kernel is from its reference: of outputs relative to the largest, or of log-sum-exp; NaN is too far."""

    largest: float
    tolerance: float

    @property
    def is_small(self) -> bool:
        """Whether the kernel may be used."""
        return self.largest <= self.tolerance


def difference(
    kernels: Kernels, name: str, *, heads: int, head_dim: int, block_size: int, dtype: DTypeLike,
    is_coded: bool = False,
) -> Difference:  # fmt: skip
    """What `self_check`, `check_prefix` and `check_chunk` compare, of one kernel, which must exist.

    Args:
        name: of the attention kernel, a field of `Kernels`.
        is_coded: over an int8 pool; not of `chunk`, which reads none.

    Raises:
        Exception: what the kernel raises, NotImplementedError where it does not handle such a shape.
    """
    if name == "chunk":
        return _chunk_difference(kernels, heads, head_dim, dtype)
    return _difference(kernels, name, _Case(heads, head_dim, block_size, dtype, is_coded))


class _Case:
    """A small cache of random vectors: pool `[P, S, D]`, tables `[2, R, W]`, lengths `[R]`; scales if it is int8.

    Codes have no NaN beyond a row's length, but the scales there are NaN.
    """

    def __init__(self, heads: int, head_dim: int, block_size: int, dtype: DTypeLike, is_coded: bool) -> None:
        self.heads, self.head_dim, self.width, self.dtype = heads, head_dim, heads * head_dim, jnp.dtype(dtype)
        self.lengths = np.array([block_size + 1, 0, 1, 517], np.int32)
        pages = -(-self.lengths.max() // block_size)
        self._rng = np.random.default_rng(0)
        self.tables = self._rng.permutation(4 * 2 * pages).reshape(2, 4, pages).astype(np.int32)
        vectors = self._rng.standard_normal((8 * pages, block_size, self.width), np.float32)
        is_used = np.zeros((8 * pages, block_size), bool)
        for table in self.tables:
            for row, length in zip(table, self.lengths, strict=True):
                is_used[row] = np.arange(pages * block_size).reshape(pages, block_size) < length
        self.scales: jax.Array | None = None
        if not is_coded:
            self.pool = jnp.asarray(np.where(is_used[..., None], vectors, np.nan), self.dtype)
            return
        self.pool = jnp.asarray(np.clip(np.round(40 * vectors), -127, 127), jnp.int8)
        scales = self._rng.uniform(0.5, 1, (8 * pages, heads, block_size)) / 40
        rows = np.where(is_used[:, None], scales, np.nan).reshape(8 * pages, 1, -1)
        self.scales = jnp.asarray(np.pad(rows, ((0, 0), (0, 0), (0, -rows.shape[2] % _LANES))), jnp.float32)

    def arguments(self, name: str) -> tuple[Any, ...]:
        """Of the attention kernel `name`, without the scales."""
        queries = self.normal(4 if "decode" in name else 16, self.width if "hidden" in name else self.head_dim)
        tables = self.tables[:1] if "hidden" in name else self.tables
        if "decode" in name:
            return queries, self.pool, *tables, self.lengths
        count = np.array([5, 2, 1, 7], np.int32)  # one slot is left over
        return queries, self.pool, *tables, self.lengths, np.cumsum(count) - count, count

    def normal(self, rows: int, width: int) -> jax.Array:
        """Queries `[rows, N, width]`."""
        drawn = self._rng.standard_normal((rows, self.heads, width), np.float32)
        return jnp.asarray(drawn * width**-0.5, self.dtype)


def check_chunk(kernels: Kernels, *, heads: int, head_dim: int, dtype: DTypeLike) -> str | None:
    """Compare `chunk`, which must exist, on a few packed rows as `self_check` does decode attention."""
    return _reason("chunk", lambda: _chunk_difference(kernels, heads, head_dim, dtype))


def _chunk_difference(kernels: Kernels, heads: int, head_dim: int, dtype: DTypeLike) -> Difference:
    rng = np.random.default_rng(0)
    row = np.repeat(np.arange(5, dtype=np.int32), [130, 1, 2, 63, 60])
    q, k, v = (jnp.asarray(rng.standard_normal((len(row), heads, head_dim), np.float32), dtype) for _ in range(3))
    q = q * jnp.asarray(head_dim**-0.5, dtype)
    with jax.default_matmul_precision("highest" if jnp.dtype(dtype) == jnp.float32 else None):  # as `Runner` has it
        return _compare(kernels, "chunk", (q, k, v, row))


def check_cache_writer(
    kernels: Kernels, *, heads: int, head_dim: int, block_size: int, dtype: DTypeLike, is_coded: bool = False
) -> str | None:
    """Write tokens of three rows, one of them hidden, by `cache_writer`, which must exist, and by the reference.

    Rows begin and end inside blocks; some slots are of no row. Nothing else in the pool may change. Of an int8 pool
    `scale_writer` and `scale_reader` are checked likewise, if there are any.
    """
    rng = np.random.default_rng(0)
    starts, counts = np.array([3, block_size, 5]), np.array([2 * block_size + 70, 1, 9])
    pages = -(-int((starts + counts).max()) // block_size)
    blocks = rng.permutation(6 * pages).reshape(2, 3, pages)
    row = np.repeat(np.arange(3), counts)
    position = np.concatenate([start + np.arange(count) for start, count in zip(starts, counts, strict=True)])
    page, offset = position // block_size, position % block_size
    value_block = np.where(row == 2, -1, blocks[1, row, page])
    places = [np.pad(x, (0, 3), constant_values=-1) for x in (blocks[0, row, page], value_block, offset)]
    arrays = [jnp.asarray(x, jnp.int32) for x in places]

    def wrong(name: str, columns: int, *shapes: tuple[int, ...], dtype: DTypeLike, **options: int) -> str | None:
        drawn = (rng.standard_normal(shape, np.float32) * (40 if dtype == jnp.int8 else 1) for shape in shapes)
        vectors = [jnp.asarray(x, dtype) for x in drawn]

        def written(writer: Callable[..., Callable[..., jax.Array]]) -> jax.Array:
            def run(places: list[jax.Array], pool: jax.Array, *x: jax.Array) -> jax.Array:
                return writer(*places, **options)(pool, 2 * pages, *x)

            return jax.jit(run)(arrays, *vectors)[..., :columns]  # not what pads a row of scales

        try:
            count = int(jnp.sum(written(getattr(kernels, name)) != written(getattr(reference, name))))
        except Exception as error:
            return _failed(name, error)
        return f"{name} puts {count} numbers wrong" if count else None

    T, D = len(places[0]), heads * head_dim
    reason = wrong(
        "cache_writer", D, (8 * pages, block_size, D), (T, D), (T, D), dtype=jnp.int8 if is_coded else jnp.dtype(dtype)
    )
    lanes = -(-heads * block_size // _LANES) * _LANES
    if reason is None and is_coded and kernels.scale_writer is not None:
        shapes = (8 * pages, 1, lanes), (T, heads), (T, heads)
        reason = wrong("scale_writer", heads * block_size, *shapes, dtype=jnp.float32, block_size=block_size)
    if reason is None and is_coded and kernels.scale_reader is not None:
        reason = _reads_wrong(kernels, jnp.asarray(rng.random((8 * pages, 1, lanes)), jnp.float32), arrays[0])
    return reason


def _reads_wrong(kernels: Kernels, scales: jax.Array, blocks: jax.Array) -> str | None:
    """The reason not to use `scale_reader`, or None."""
    assert kernels.scale_reader is not None
    blocks = jnp.maximum(blocks, 0)
    try:
        count = int(jnp.sum(kernels.scale_reader(scales, blocks) != reference.scale_reader(scales, blocks)))
    except Exception as error:
        return _failed("scale_reader", error)
    return f"scale_reader gives {count} wrong numbers" if count else None


def _failed(name: str, error: Exception) -> str:
    return f"{name} failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _differs(kernels: Kernels, name: str, case: _Case) -> str | None:
    """The reason not to use the kernel `name`; None if it agrees with its reference."""
    return _reason(name, lambda: _difference(kernels, name, case))


def _reason(name: str, compare: Callable[[], Difference]) -> str | None:
    try:
        found = compare()
    except Exception as error:
        return _failed(name, error)
    if found.is_small:
        return None
    return f"{name} differs from its reference by {found.largest:.1e}, more than {found.tolerance:.0e}"


def _difference(kernels: Kernels, name: str, case: _Case) -> Difference:
    counted = case.lengths > 0 if name == "hidden_decode" else slice(None)
    return _compare(kernels, name, case.arguments(name), case.scales, counted)


def _compare(
    kernels: Kernels, name: str, args: tuple[Any, ...], scales: jax.Array | None = None, counted: Any = slice(None)
) -> Difference:
    """How far the kernel `name` is from its reference in the rows `counted`."""
    run = getattr(kernels, name), jax.jit(getattr(REFERENCES, name))  # each of a reference's operations would compile
    options = {} if scales is None else {"scales": scales}
    found, expected = (jax.device_get(function(*map(jnp.asarray, args), **options)) for function in run)
    wrong = np.abs(np.asarray(found.out, np.float32) - expected.out) / np.abs(expected.out).max()
    largest = np.maximum(wrong[counted].max(), np.abs(found.lse - expected.lse).max())
    return Difference(float(largest), _TOLERANCE[args[0].dtype.itemsize])
