"""A tiny random model with a real tokenizer, and a real server around it, for tests of the whole path."""

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import jax

from apt_jax.checkpoints.demo_training.tokenizer import save_tokenizer, train_tokenizer
from apt_jax.engine.engine import Engine
from apt_jax.engine_config import EngineConfig
from apt_jax.serve.http.resume import Resumption
from apt_jax.serve.http.service import Service
from apt_jax.serve.options import ServerOptions
from apt_jax.serve.runtime.build import build_engine
from apt_jax.serve.runtime.engine_thread import EngineThread
from tests.support.live_server import live

NAME = "tiny"
CONFIG = {
    "model_type": "opt",
    "vocab_size": 320,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "ffn_dim": 64,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "word_embed_proj_dim": 32,
}
CHAT_TEMPLATE = "{{ eos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
# few shapes, so that it compiles quickly; a pool that a few requests fill
OPTIONS = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "num_blocks": 48}


def engine_options() -> dict[str, Any]:
    """Keywords of the engine: `OPTIONS`, and the compile cache that all tests share."""
    return {**OPTIONS, "compilation_cache_dir": jax.config.jax_compilation_cache_dir}


def flags() -> list[str]:
    """`engine_options()` for the command line."""
    return [text for name, value in engine_options().items() for text in (f"--{name.replace('_', '-')}", str(value))]


def write_folder(folder: Path) -> Path:
    """A Hugging Face folder with config, tokenizer and chat template, for `load_format="dummy"`."""
    texts = ["the quick brown fox jumps over the lazy dog " * 3, "def add(left, right):\n    return left + right\n"]
    save_tokenizer(train_tokenizer(texts, CONFIG["vocab_size"]), folder, CONFIG["max_position_embeddings"])
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


@dataclass
class Server:
    url: str
    thread: EngineThread
    service: Service

    @property
    def engine(self) -> Engine:
        return self.thread.ready_engine()

    @property
    def is_idle(self) -> bool:
        """Nothing waits or runs, and every block is free."""
        state = self.engine.state
        return state.num_unfinished == 0 and state.pool.num_free == state.pool.num_blocks


@contextlib.contextmanager
def serving(
    folder: Path, options: ServerOptions | None = None, resumption: Resumption | None = None, **engine: Any
) -> Iterator[Server]:
    """The real application, engine and uvicorn on a free port, in threads of this process."""
    config = EngineConfig(**engine_options(), **engine)
    thread = EngineThread(lambda: build_engine(str(folder), engine_config=config, load_format="dummy"))
    service = Service.of_engine(thread, NAME, options or ServerOptions())
    with live(service, resumption) as url:
        yield Server(url, thread, service)


def is_ready(url: str) -> bool:
    """Whether /ready answers 200."""
    try:
        return httpx.get(f"{url}/ready", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def start_server(folder: Path, *more: str) -> tuple[subprocess.Popen[str], str]:
    """`apt-jax serve` in a process of its own on a free port; returns it and its address."""
    command = [sys.executable, "-m", "apt_jax.serve.cli", "serve", str(folder), "--port", "0", "--load-format", "dummy"]
    process = subprocess.Popen([*command, *flags(), *more], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while (found := re.search(r"listening on (http://\S+),", line := process.stderr.readline())) is None:
        assert line, "it ended without listening"
    return process, found[1]
