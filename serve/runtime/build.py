"""From a model's name to an engine: compile cache, checkpoint, tokenizer, engine, in that order."""

import dataclasses
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax

from apt_jax.attention.selection import compile_kernels
from apt_jax.cache import as_cache_dtype, keeps_hidden
from apt_jax.checkpoints.families import read_config
from apt_jax.checkpoints.formats.weight_files import LoadFormat
from apt_jax.checkpoints.generation_config import AUTO, GenerationConfig, read_generation_config
from apt_jax.checkpoints.load import Loaded, load_model, parse_format
from apt_jax.checkpoints.source import check_revision, resolve
from apt_jax.engine.engine import Engine
from apt_jax.engine.memory import check_longest_request
from apt_jax.engine.setup import set_up, without_gaps
from apt_jax.engine_config import EngineConfig
from apt_jax.execution.multihost import follow, lead
from apt_jax.execution.platform import Platform
from apt_jax.execution.weights.choice import serving_layout
from apt_jax.model_config import ModelConfig, as_quantization
from apt_jax.models.sharding import Parallel
from apt_jax.scheduling.policies.catalogue import make_policy
from apt_jax.serve.runtime.starting.compile_cache import use_compile_cache
from apt_jax.tokenization.tokenizer import Tokenizer, TokenizerNotFound
from apt_jax.tokenization.tokenizer_store import TokenizerStore

logger = logging.getLogger("apt_jax.serve")


def build_engine(
    model: str | None,
    *,
    engine_config: EngineConfig,
    load_format: str = "auto",
    tokenizer: str | None = None,
    revision: str | None = None,
    generation_config: str = AUTO,
    on_phase: Callable[[str], None] = lambda phase: None,
    leader_host: str | None = None,
    moves_pages: bool = False,
) -> Engine:
    """Load a model (None: the bundled demo) and its tokenizer and make an engine of them; compiles nothing.

    A model folder without a tokenizer gives an engine that takes token ids only. `on_phase` is called with each phase
    that has ended: "kernels", "weights", "tokenizer", "memory". Of several processes (`jax.distributed`) only process
    0 gets an engine; in the others this runs what process 0 runs, and exits when that ends. `leader_host` is where
    they reach process 0; default: the address of its route to other machines. With `moves_pages` `Engine.saved_pages`
    will be used, and `warm_up` compiles what that needs.

    Raises:
        ValueError: model or tokenizer cannot be loaded, or do not fit; one sentence with the file, value or flag.
    """
    cache = use_compile_cache(engine_config.compilation_cache_dir)
    devices, processes = engine_config.tensor_parallel_size, jax.process_count()
    split = devices > 1 or processes > 1
    parallel = Parallel.over(devices, hidden=keeps_hidden(engine_config.cache_mode)) if split else None
    platform = Platform.of(jax.local_devices()[0])
    make_policy(engine_config.scheduling_policy)
    check_revision(model, revision)
    folder = resolve(model, revision=revision, load_format=parse_format(load_format))
    model_config = read_config(folder)
    without_gaps(engine_config, model_config, platform)
    check_longest_request(engine_config, model_config)
    store = TokenizerStore(cache / "tokenizers")
    named = None if tokenizer is None else load_tokenizer(folder, tokenizer, revision, store)  # it may not be there
    generation = read_generation_config(folder, generation_config)
    compile_kernels(engine_config.attention_backend, cpp_kernels=platform.cpp_kernels, num_devices=devices)
    on_phase("kernels")
    loaded = load_model(
        str(folder), load_format=load_format, dtype=engine_config.dtype, revision=revision, seed=engine_config.seed,
        parallel=parallel,
        quantization=None if engine_config.quantization is None else as_quantization(engine_config.quantization),
        layout=partial(
            serving_layout, backend=engine_config.attention_backend, block_size=engine_config.block_size,
            cache_dtype=as_cache_dtype(engine_config.cache_dtype),
        ),
    )  # fmt: skip
    engine_config = dataclasses.replace(engine_config, quantization=loaded.weights.quantization)
    logger.info("%s: %s weights from %s", model or "demo model", _number_type(loaded), loaded.folder)
    on_phase("weights")
    text = named or load_tokenizer(loaded.folder, None, revision, store)
    on_phase("tokenizer")
    ends = with_end_ids(loaded.config, generation, text)
    setup = set_up(loaded.weights, ends, engine_config, text, loaded.fingerprint, channels=loaded.channels)
    on_phase("memory")
    if processes > 1:
        if jax.process_index() > 0:
            follow(setup.runner)
            raise SystemExit(0)
        setup = dataclasses.replace(setup, runner=lead(setup.runner, leader_host))
    if generation.sampling:
        given = ", ".join(f"{name}={value}" for name, value in generation.sampling.items())
        logger.info("requests that do not say otherwise get %s, of its generation_config.json; none of it with "
                    "--generation-config none", given)  # fmt: skip
    engine = Engine(setup, text, sampling_defaults=generation.sampling, fingerprint=loaded.fingerprint)
    if moves_pages and engine.saved_pages is not None:
        engine.saved_pages.prepare()
    return engine


def _number_type(loaded: Loaded) -> str:
    """What the weights are, for the log."""
    dtype = loaded.dtype.name
    match loaded.weights.quantization:
        case "none":
            return dtype
        case "int8":
            return f"int8 (multiplied in {dtype}; biases, norms and positions {dtype})"
    return f"int8 (multiplied by int8 activations, keys and values in {dtype}; biases, norms and positions {dtype})"


def with_end_ids(config: ModelConfig, generation: GenerationConfig, tokenizer: Tokenizer | None) -> ModelConfig:
    """The config with all ids that end a text: of generation_config.json, else its own, and the tokenizer's."""
    ids = list(config.eos_token_ids if generation.eos_token_ids is None else generation.eos_token_ids)
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    found = tuple(token_id for token_id in dict.fromkeys(ids) if token_id < config.vocab_size)
    if set(found) != set(config.eos_token_ids):
        logger.info("a text ends with token %s", " or ".join(map(str, found)) or "of no kind")
    return dataclasses.replace(config, eos_token_ids=found)


def load_tokenizer(folder: Path, name: str | None, revision: str | None, store: TokenizerStore) -> Tokenizer | None:
    """The tokenizer called `name` (folder or hub id), else the one in the model's `folder`; None if there is none.

    Raises:
        ValueError: `name` has no tokenizer, or the files are damaged.
    """
    if name is not None:
        return Tokenizer.from_folder(resolve(name, revision=revision, load_format=LoadFormat.DUMMY), store)
    try:
        return Tokenizer.from_folder(folder, store)
    except TokenizerNotFound as error:
        logger.warning("%s", error)
        return None
