"""A tiny random model with a real tokenizer, and a real server around it, for tests of the whole path."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import uvicorn

from apt_jax.config import EngineConfig
from apt_jax.engine import Engine
from checkpoints.demo_training.tokenizer import save_tokenizer, train_tokenizer
from serve.app import Service, create_app
from serve.build import build_engine
from serve.engine_thread import EngineStatus, EngineThread
from serve.options import DEFAULT_MAX_BODY_BYTES
from serve.server import listen, url_of

NAME = "tiny"
CACHE = Path(__file__).parent.parent / ".cache" / "xla-tests"  # a second run of the tests compiles nothing anew
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
# few shapes, so that it compiles quickly; a pool that a few requests fill
OPTIONS = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 16,
    "num_blocks": 48,
    "compilation_cache_dir": str(CACHE),
}
FLAGS = [text for name, value in OPTIONS.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def write_folder(folder: Path) -> Path:
    """A Hugging Face folder with config and tokenizer, for `load_format="dummy"`."""
    texts = ["the quick brown fox jumps over the lazy dog " * 3, "def add(left, right):\n    return left + right\n"]
    save_tokenizer(train_tokenizer(texts, CONFIG["vocab_size"]), folder, CONFIG["max_position_embeddings"])
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@dataclass
class Server:
    url: str
    thread: EngineThread

    @property
    def engine(self) -> Engine:
        return self.thread.ready_engine()

    @property
    def is_idle(self) -> bool:
        """Nothing waits or runs, and every block is free."""
        state = self.engine.state
        return state.num_unfinished == 0 and state.pool.num_free == state.pool.num_blocks


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """The real application, engine and uvicorn on a free port, in threads of this process."""
    config = EngineConfig(**OPTIONS)
    thread = EngineThread(lambda: build_engine(str(folder), engine_config=config, load_format="dummy"))
    listener = listen("127.0.0.1", 0)
    app = create_app(Service(thread, NAME, DEFAULT_MAX_BODY_BYTES))
    http = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on", timeout_graceful_shutdown=5))
    runner = threading.Thread(target=http.run, kwargs={"sockets": [listener]})
    runner.start()
    try:
        until(lambda: thread.status not in (EngineStatus.LOADING, EngineStatus.WARMING), 200)
        yield Server(url_of(listener), thread)
    finally:
        http.should_exit = True
        runner.join(20)
        listener.close()
    assert not runner.is_alive() and thread.status is EngineStatus.STOPPED


def until(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    """Wait for a condition."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.005)


def is_ready(url: str) -> bool:
    """Whether /ready answers 200."""
    try:
        return httpx.get(f"{url}/ready", timeout=5).status_code == 200
    except httpx.TransportError:
        return False
