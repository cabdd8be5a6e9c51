"""The model and the parts of engines that the stages "steps" and "serving" share, and so their compiled programs."""

import dataclasses
import tempfile
from functools import partial
from pathlib import Path

from apt_jax.batching.buckets import Buckets
from apt_jax.cache import CacheMode
from apt_jax.checkpoints.load import Loaded, load_model
from apt_jax.engine.setup import EngineSetup, set_up
from apt_jax.execution.weights.choice import serving_layout
from apt_jax.model_config import Quantization
from apt_jax.scheduling.costs.hardware import MODELS, by_name
from experiments.device_check.session import Session
from experiments.preset_model import write_config


def load(session: Session, layers: int, quantization: Quantization = "none") -> Loaded:
    """Random weights of the form's model with so many layers, laid out for serving."""
    options = session.sizes.options
    layout = partial(serving_layout, backend=session.backend, block_size=options.block_size)
    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(by_name(MODELS, session.sizes.model, "model"), num_hidden_layers=layers)
        write_config(Path(folder), config)
        return load_model(
            folder, load_format="dummy", dtype=options.dtype, layout=layout, quantization=quantization
        )  # fmt: skip


def parts(session: Session, loaded: Loaded, mode: CacheMode, policy: str) -> EngineSetup:
    """Parts of an engine for one cache mode, with few padded shapes: nothing is compiled but the largest prefill."""
    sizes = session.sizes
    options = dataclasses.replace(
        sizes.options, cache_mode=mode, scheduling_policy=policy, attention_backend=session.backend
    )
    assert options.max_num_seqs is not None and options.max_num_batched_tokens is not None
    buckets = Buckets(max_num_seqs=options.max_num_seqs, max_num_batched_tokens=options.max_num_batched_tokens)
    few = buckets.few(sizes.decode_rows, sizes.prefill_tokens)
    return set_up(loaded.weights, loaded.config, options, buckets=few)
