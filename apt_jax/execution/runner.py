"""The only place that jits: compiled steps per bucket (`steps.py`), the donated pool, the read-back.

A program is compiled when it is first needed, or ahead of time by `compile_all`; after that nothing compiles, because
there is one program per shape and programs are called as executables. Device state that is carried from step to step
and donated: the cache pool `[L*P, S, D]` and the token history `[slots, max_model_len]`.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from tqdm import tqdm

from apt_jax.attention import xla as xla_attention
from apt_jax.attention.kinds import KindMix
from apt_jax.attention.selection import select_kernels
from apt_jax.batching.arrays import NUM_TABLES, Batch, Rows, Tokens
from apt_jax.batching.buckets import Bucket, Buckets
from apt_jax.batching.sampling_rows import Sampling, empty_sampling
from apt_jax.cache import BlockTable
from apt_jax.cpu_kernels.calls import KERNELS as CPU_KERNELS
from apt_jax.engine_config import AttentionBackend
from apt_jax.execution.forms.layer_weights import LayerWeights, OuterWeights
from apt_jax.execution.forms.native import are_native, run_native_step, scratch_bytes
from apt_jax.execution.interface import StepResults
from apt_jax.execution.platform import Platform
from apt_jax.execution.pool import convert_blocks, convert_layer, pool_shape
from apt_jax.execution.program_store import ProgramStore, source_hash
from apt_jax.execution.sampling import score
from apt_jax.execution.steps import end_step, run_layer, run_sampling, run_step, start_step
from apt_jax.execution.tpu_layouts import put_for_tpu
from apt_jax.model_config import ModelConfig
from apt_jax.models.opt import OPT
from apt_jax.models.sharding import EVERYWHERE, POOL, Parallel, local_config, zeros

CONVERT_TOKENS = 256  # cached tokens that one call of the conversion program handles


@dataclass(frozen=True)
class Shapes:
    """Sizes that all programs share."""

    num_slots: int
    max_model_len: int
    table_pages: int
    block_size: int
    kinds: KindMix


class Runner:
    """Runs batches on the device. Weights are shared, pool and history are replaced by every step.

    Args:
        donate_model: see `Engine`.
        call_per_layer: a step is a call per layer, with arrays of its own for each; None does so on a CPU.

    Raises:
        ValueError: the Pallas kernels were asked for and do not work here.
    """

    def __init__(
        self,
        model: OPT,
        model_config: ModelConfig,
        shapes: Shapes,
        buckets: Buckets,
        attention_backend: AttentionBackend = "xla",
        *,
        donate_model: bool = False,
        call_per_layer: bool | None = None,
    ):
        self.model_config = model_config
        self.shapes = shapes
        self._graphdef, state = nnx.split(model)
        self._weights, self._weights_tree = jax.tree.flatten(state)
        self.parallel = Parallel.of(model)
        self.platform = Platform.of(self.device)
        if self.platform.own_layouts and self.parallel is None:
            self._weights = put_for_tpu(jax.tree.leaves_with_path(state))
            nnx.update(model, jax.tree.unflatten(self._weights_tree, self._weights))  # or the old ones would stay
        self.dtype = jnp.dtype(model.embed_tokens.embedding[...].dtype)
        # Where each layer has arrays of its own, it is a call of one program, which also compiles once and not once per
        # layer; the other programs get arrays without elements in the layers' places.
        self._layers: LayerWeights | None = None
        if call_per_layer is None:
            call_per_layer = self.platform.call_per_layer and self.parallel is None
        self.kernels = select_kernels(
            attention_backend, local_config(model_config, self.num_devices), block_size=shapes.block_size,
            dtype=self.dtype, device=self.device, cpp_kernels=self.platform.cpp_kernels, num_devices=self.num_devices,
        )  # fmt: skip
        self._outer: OuterWeights | None = None
        self._all_weights: list[jax.Array] | None = None  # if all layers of a step are one call
        if call_per_layer:
            packs = self.kernels is CPU_KERNELS
            self._layers = LayerWeights.of(model, donate=donate_model, packs=packs)
            self._outer = OuterWeights.of(model, donate=donate_model, packs=packs)
            self._weights = self._outer.arrays
            if are_native(model, self._layers):
                self._all_weights = [*self._weights, *(array for own in self._layers.arrays for array in own)]
        self.buckets = buckets if self.pads else buckets.largest()
        self.num_blocks = 0
        # processes that run one program must compile it together, so none may find it on its disk
        alone = jax.process_count() == 1
        self._store = ProgramStore.beside_compile_cache(self.device) if alone else ProgramStore(None, self.device)
        self._steps: dict[Bucket, Any] = {}
        self._samplers: dict[int, Any] = {}
        self._gathers: dict[Bucket, Any] = {}
        self._scorer: Any = None
        self._convert: Any = None
        self._pool: jax.Array
        self._history: jax.Array

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights on each device."""
        layers = 0 if self._layers is None else self._layers.nbytes
        return layers + sum(leaf.addressable_shards[0].data.nbytes for leaf in self._weights)

    @property
    def device(self) -> jax.Device:
        """The device that holds the weights, or the first of this process that do."""
        return self._weights[0].addressable_shards[0].device

    @property
    def num_devices(self) -> int:
        """Devices that the model is split over."""
        return 1 if self.parallel is None else self.parallel.num_devices

    @property
    def num_local_devices(self) -> int:
        """Those of them in this process."""
        return 1 if self.parallel is None else len(self.parallel.mesh.local_devices)

    @property
    def pads(self) -> bool:
        """Whether padding of a step takes time."""
        return self._all_weights is None

    @property
    def attention(self) -> str:
        """Which implementation of attention runs: the kernels' name, or xla."""
        return self.kernels.name if self.kernels else "xla"

    @property
    def num_programs(self) -> int:
        """Compiled programs at hand."""
        singles = (self._scorer is not None) + (self._convert is not None)
        return len(self._steps) + len(self._samplers) + len(self._gathers) + singles

    def measure_activations(self, num_blocks: int) -> int:
        """Bytes of temporaries of the largest programs, as the compiler reports them, and of what they hand on.

        They do not depend on `num_blocks`, since there is no copy of the pool; a good guess saves compiling again.
        """
        self._fit(num_blocks)
        largest = self.buckets.prefill[-1]
        programs = (self._step(largest), self._sampler(self.buckets.sample_rows[-1]), self._score_program())
        hidden_bytes = largest.tokens * self.model_config.word_embed_proj_dim * self.dtype.itemsize
        return max(map(temporary_bytes, programs)) + hidden_bytes

    def allocate(self, num_blocks: int) -> None:
        """Make pool and history; forgets programs compiled for another size."""
        self._fit(num_blocks)
        self.reset()

    def _fit(self, num_blocks: int) -> None:
        if num_blocks != self.num_blocks:
            self._steps.clear()
            self._convert = None
        self.num_blocks = num_blocks

    def reset(self) -> None:
        """Fresh pool and history, for instance after a step failed and took the donated ones with it.

        Waits for the device, so that one which is lost raises here.
        """
        self.__dict__.pop("_pool", None)  # two do not fit
        shape = pool_shape(self.model_config, self.num_blocks, self.shapes.block_size)
        self._pool = zeros(shape, self.dtype, self._sharding(POOL))
        slots, length = self.shapes.num_slots, self.shapes.max_model_len
        self._history = zeros((slots, length), jnp.int32, self._sharding(EVERYWHERE))
        jax.block_until_ready((self._pool, self._history))

    def compile_all(self, progress: bool = False) -> None:
        """Compile every bucket and the conversion; two at a time, since XLA compiles without the interpreter lock."""
        jobs: dict[Any, Callable[[Any], None]] = {}

        def keep(where: dict, key: Any) -> Callable[[Any], None]:
            return lambda program: where.__setitem__(key, program)

        with ThreadPoolExecutor(2) as threads:
            for bucket in (bucket for bucket in self.buckets.all if bucket not in self._steps):
                jobs[threads.submit(self._compile_step, bucket, self.num_blocks)] = keep(self._steps, bucket)
            for size in self.buckets.sample_rows:
                if size not in self._samplers:
                    jobs[threads.submit(self._compile_sampler, size)] = keep(self._samplers, size)
            for bucket in (bucket for bucket in self.buckets.prefill if bucket not in self._gathers):
                jobs[threads.submit(self._compile_gather, bucket)] = keep(self._gathers, bucket)
            if self._scorer is None:
                jobs[threads.submit(self._compile_scorer)] = partial(setattr, self, "_scorer")
            if self.shapes.kinds.converts and self._convert is None:
                jobs[threads.submit(self._compile_convert, self.num_blocks)] = partial(setattr, self, "_convert")
            for job in tqdm(as_completed(jobs), total=len(jobs), desc="compiling", disable=not progress):
                jobs[job](job.result())

    def dispatch(self, batch: Batch) -> StepResults:
        """Start one step and the scoring that its `chunks` ask for; returns at once, arrays are still being computed.

        Replaces pool and history.
        """
        hidden, self._pool, self._history, every = self._step(batch.bucket)(
            self._weights, self._pool, self._history, batch.tokens, batch.rows
        )
        sampled = None
        if batch.requests:
            sampled, self._history = self._sampler(len(batch.sample_slot))(
                self._weights, self._history, hidden, batch.sampling, batch.sample_slot, batch.sample_length
            )
        scores = []
        for chunk in batch.chunks:
            wanted = self._gather(batch.bucket)([], every, chunk.index)
            scores.append(self._score_program()(self._weights, wanted, chunk.target))
        return StepResults(sampled, tuple(scores))

    def read[Results](self, results: Results) -> Results:
        """Wait for a step and bring its results to the host as numpy arrays: the one read-back of an iteration."""
        return jax.device_get(results)

    def convert(self, tables: Sequence[BlockTable]) -> None:
        """Compute keys and values for tables that have just become KV; keys sit where hidden vectors were."""
        if self._convert is None:
            self._convert = self._compile_convert(self.num_blocks)
        first, second = ([block for table in tables for block in table.blocks[v]] for v in (0, 1))
        size = self._convert_pages
        for at in range(0, len(first), size):
            blocks = np.full((2, size), self.num_blocks, np.int32)
            part = slice(at, at + size)
            blocks[0, : len(first[part])] = first[part]
            blocks[1, : len(second[part])] = second[part]
            self._pool = self._convert(self._weights, self._pool, blocks[0], blocks[1])

    def _step(self, bucket: Bucket) -> Any:
        if bucket not in self._steps:
            self._steps[bucket] = self._compile_step(bucket, self.num_blocks)
        return self._steps[bucket]

    def _sampler(self, size: int) -> Any:
        if size not in self._samplers:
            self._samplers[size] = self._compile_sampler(size)
        return self._samplers[size]

    def _gather(self, bucket: Bucket) -> Any:
        if bucket not in self._gathers:
            self._gathers[bucket] = self._compile_gather(bucket)
        return self._gathers[bucket]

    def _score_program(self) -> Any:
        if self._scorer is None:
            self._scorer = self._compile_scorer()
        return self._scorer

    @property
    def _convert_pages(self) -> int:
        return max(CONVERT_TOKENS // self.shapes.block_size, 1)

    def _model(self, weights: list[jax.Array]) -> OPT:
        leaves = weights if self._outer is None else self._outer.leaves(weights)
        return nnx.merge(self._graphdef, jax.tree.unflatten(self._weights_tree, leaves))

    def _compile_step(self, bucket: Bucket, num_blocks: int) -> Any:
        T, R = bucket.tokens, bucket.rows
        tokens = Tokens(*(_abstract((T,), dtype) for dtype in (np.int32, np.bool_, np.int32, np.int32)))
        number = _abstract((R,), np.int32)
        table = _abstract((R, self.shapes.table_pages), np.int32)
        rows = Rows(number, number, number, number, number, number, (table,) * NUM_TABLES)
        name = f"{bucket} {num_blocks}"
        pool, history = self._abstract_pool(num_blocks), self._abstract_history()
        if self._layers is not None and self._all_weights is not None:
            return self._compile_native(
                name, bucket, num_blocks, self._layers, self._all_weights, pool, history, tokens, rows
            )
        if self._layers is not None:
            return self._compile_layers(name, bucket, num_blocks, self._layers, pool, history, tokens, rows)

        def step(weights, pool, history, tokens, rows):  # type: ignore[no-untyped-def]
            return run_step(
                self._model(weights), self.shapes.kinds, num_blocks, bucket.decode_only, self.buckets.max_rows,
                pool, history, tokens, rows, self.kernels, unroll=bucket.decode_only and self.platform.unrolls_decode,
                by_kind=bucket.decode_only and self.platform.branches_by_kind,
                slice_lazily=not bucket.decode_only and self.platform.slices_lazily and self.parallel is None,
            )  # fmt: skip

        outs = (EVERYWHERE, POOL, EVERYWHERE, EVERYWHERE)
        return self._compile(f"step {name}", step, pool, history, tokens, rows, donate=(1, 2), outs=outs)

    def _compile_layers(
        self, name: str, bucket: Bucket, num_blocks: int, layers: LayerWeights, pool: Any, history: Any, tokens: Tokens,
        rows: Rows,
    ) -> "LayeredStep":  # fmt: skip
        def start(weights, history, tokens, rows):  # type: ignore[no-untyped-def]
            return start_step(self._model(weights), history, tokens, rows)

        def layer(leaves, pool, x, index, tokens, rows):  # type: ignore[no-untyped-def]
            return run_layer(
                layers.layer(leaves), self.shapes.kinds, num_blocks, bucket.decode_only,
                pool, x, index, tokens, rows, self.kernels,
            )  # fmt: skip

        def end(weights, x, rows):  # type: ignore[no-untyped-def]
            return end_step(self._model(weights), bucket.decode_only, self.buckets.max_rows, x, rows)

        x, index = _abstract((bucket.tokens, self.model_config.hidden_size), self.dtype), _abstract((), np.int32)
        return LayeredStep(
            self._compile(f"start {bucket}", start, history, tokens, rows, donate=(1,)),
            self._compile(
                f"layer {name}", layer, pool, x, index, tokens, rows, donate=(1, 2), weights=layers.arrays[0]
            ),
            self._compile(f"end {bucket}", end, x, rows, donate=()),
            layers,
        )

    def _compile_native(
        self, name: str, bucket: Bucket, num_blocks: int, layers: LayerWeights, weights: list[jax.Array], pool: Any,
        history: Any, tokens: Tokens, rows: Rows,
    ) -> "NativeStep":  # fmt: skip
        outer, of_layer = len(self._weights), len(layers.arrays[0])

        def native(weights, pool, history, tokens, rows):  # type: ignore[no-untyped-def]
            modules = [layers.layer(weights[i : i + of_layer]) for i in range(outer, len(weights), of_layer)]
            model = self._model(weights[:outer])
            return run_native_step(
                model, modules, num_blocks, bucket.decode_only, self.buckets.max_rows, pool, history, tokens, rows
            )

        name = f"native {name}"
        program = self._compile(name, native, pool, history, tokens, rows, donate=(1, 2), weights=weights)
        return NativeStep(program, weights, scratch_bytes(self.model_config, bucket.tokens, bucket.rows))

    def _compile_sampler(self, size: int) -> Any:
        def sampler(weights, history, hidden, sampling, slot, length):  # type: ignore[no-untyped-def]
            return run_sampling(self._model(weights), history, hidden, sampling, slot, length)

        sampling = Sampling(*(_abstract((size, *a.shape[1:]), a.dtype) for a in empty_sampling(1)))
        hidden = self._abstract_hidden(self.buckets.max_rows)
        number = _abstract((size,), np.int32)
        return self._compile(
            "sampler", sampler, self._abstract_history(), hidden, sampling, number, number, donate=(1,)
        )

    def _compile_gather(self, bucket: Bucket) -> Any:
        def gather(weights, hidden, index):  # type: ignore[no-untyped-def]
            return hidden[index]

        index = _abstract((self.buckets.score_rows,), np.int32)
        return self._compile("gather", gather, self._abstract_hidden(bucket.tokens), index, donate=(), weights=[])

    def _compile_scorer(self) -> Any:
        def scorer(weights, hidden, target):  # type: ignore[no-untyped-def]
            return score(self._model(weights).logits(hidden), target)

        rows = self.buckets.score_rows
        return self._compile("scorer", scorer, self._abstract_hidden(rows), _abstract((rows,), np.int32), donate=())

    def _compile_convert(self, num_blocks: int) -> Any:
        def convert(weights, pool, hidden_blocks, value_blocks):  # type: ignore[no-untyped-def]
            return convert_blocks(self._model(weights), pool, hidden_blocks, value_blocks, num_blocks)

        blocks = _abstract((self._convert_pages,), np.int32)
        name, pool, layers = f"convert {num_blocks}", self._abstract_pool(num_blocks), self._layers
        if layers is None:
            return self._compile(name, convert, pool, blocks, blocks, donate=(1,), outs=POOL)

        def layer(arrays, pool, index, hidden_blocks, value_blocks):  # type: ignore[no-untyped-def]
            module = layers.layer(arrays)
            return convert_layer(module, pool, index, hidden_blocks, value_blocks, num_blocks)

        index, weights = _abstract((), np.int32), layers.arrays[0]
        program = self._compile(f"{name} layer", layer, pool, index, blocks, blocks, donate=(1,), weights=weights)
        return LayeredConvert(program, layers)

    def _compile(
        self, name: str, function: Any, *args: Any, donate: tuple[int, ...], weights: list[jax.Array] | None = None,
        outs: Any = EVERYWHERE,
    ) -> Any:  # fmt: skip
        """Compile `function(weights, *args)`, or take it from the store; `name` holds every static argument.

        `weights` are all of the model's unless given; `outs` is how results lie on several devices.
        """
        leaves: list[Any] = self._weights if weights is None else weights
        own_layouts = self.platform.own_layouts and self.parallel is None
        shapes_of = [
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.format if own_layouts else leaf.sharding)
            for leaf in leaves
        ]
        precision = "highest" if self.dtype == jnp.float32 else None
        # of this version of the code only: the store cannot keep what comes from JAX's own cache
        function.__name__ = f"{name.split()[0]}_{source_hash()[:8]}"
        if self.parallel is not None:
            function, args = self.parallel.split_program(function, shapes_of, args, outs)
            name = f"{name} over {[device.id for device in self.parallel.mesh.devices.flat]} {self.parallel.hidden}"

        def compile_program() -> Any:
            with jax.default_matmul_precision(precision):
                return jax.jit(function, donate_argnums=donate).lower(shapes_of, *args).compile()

        shapes = (shapes_of, jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), args), donate, precision)
        # the sampler and the scorer call kernels too: whoever has none cannot run a program that does
        key = (name, self.attention, self.model_config, self.shapes, shapes)
        return self._store.get(repr(key), compile_program)

    def _abstract_pool(self, num_blocks: int) -> jax.ShapeDtypeStruct:
        shape = pool_shape(self.model_config, num_blocks, self.shapes.block_size)
        sharding = None if self.parallel is None else self._sharding(POOL)
        return jax.ShapeDtypeStruct(shape, self.dtype, sharding=sharding)

    def _sharding(self, spec: PartitionSpec) -> Sharding:
        mesh = self.parallel
        return SingleDeviceSharding(self.device) if mesh is None else NamedSharding(mesh.mesh, spec)

    def _abstract_hidden(self, rows: int) -> jax.ShapeDtypeStruct:
        return _abstract((rows, self.model_config.word_embed_proj_dim), self.dtype)

    def _abstract_history(self) -> jax.ShapeDtypeStruct:
        return _abstract((self.shapes.num_slots, self.shapes.max_model_len), np.int32)


class LayeredStep:
    """A step as one call per layer, each with that layer's own weights; called like the program of a whole step.

    `start`, `layer` and `end` are compiled from the functions of those names in `steps.py`.
    """

    def __init__(self, start: Any, layer: Any, end: Any, layers: LayerWeights):
        self.programs = (start, layer, end)
        self._layers = layers

    def __call__(
        self, weights: list[jax.Array], pool: jax.Array, history: jax.Array, tokens: Tokens, rows: Rows
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
        """As `run_step`; pool and history are donated."""
        start, layer, end = self.programs
        tokens, rows = jax.device_put((tokens, rows))
        x, history = start(weights, history, tokens, rows)
        for arrays, number in zip(self._layers.arrays, self._layers.numbers, strict=True):
            x, pool = layer(arrays, pool, x, number, tokens, rows)
        last, every = end(weights, x, rows)
        return last, pool, history, every


class NativeStep:
    """A step of one program with every layer's own arrays; called like that of a model with stacked ones."""

    def __init__(self, program: Any, weights: list[jax.Array], scratch_bytes: int):
        self.program, self._weights, self.scratch_bytes = program, weights, scratch_bytes

    def __call__(
        self, weights: list[jax.Array], pool: jax.Array, history: jax.Array, tokens: Tokens, rows: Rows
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
        """As `run_step`; pool and history are donated."""
        found: tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]
        found = self.program(self._weights, pool, history, tokens, rows)
        return found


class LayeredConvert:
    """A conversion as one call per layer; called like the program of all layers. See `LayeredStep`."""

    def __init__(self, program: Any, layers: LayerWeights):
        self.program, self._layers = program, layers

    def __call__(
        self, weights: list[jax.Array], pool: jax.Array, hidden_blocks: np.ndarray, value_blocks: np.ndarray
    ) -> jax.Array:
        """As `convert_blocks`; the pool is donated."""
        blocks = jax.device_put((hidden_blocks, value_blocks))
        for arrays, number in zip(self._layers.arrays, self._layers.numbers, strict=True):
            pool = self.program(arrays, pool, number, *blocks)
        return pool


def temporary_bytes(program: Any) -> int:
    """Bytes of temporaries of a compiled program or step; 0 where the backend does not say."""
    if isinstance(program, LayeredStep):
        return max(map(temporary_bytes, program.programs))
    if isinstance(program, NativeStep):
        return temporary_bytes(program.program) + program.scratch_bytes
    analysis = program.memory_analysis()
    return 0 if analysis is None else int(analysis.temp_size_in_bytes)


def pages_multiple(block_size: int) -> int:
    """Tables are padded to a multiple of this many pages, so that every chunk lies inside."""
    return max(xla_attention.CHUNK_TOKENS // block_size, 1)


def _abstract(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)
