"""`--snapshot-cache` where there is nothing to keep, nowhere to keep it, or an engine that does not answer."""

import os
import threading

import pytest

from apt_jax.engine_config import EngineConfig
from apt_jax.serve.cli import Serve
from apt_jax.serve.http import server
from apt_jax.serve.http.server import keep_caches
from apt_jax.serve.http.service import Service
from apt_jax.serve.http.snapshot_cache import SnapshotCache
from apt_jax.serve.options import DistributedOptions, ServerOptions, ShutdownOptions
from apt_jax.serve.replicas.options import ReplicaOptions
from apt_jax.serve.runtime.engine_thread import EngineThread
from apt_jax.serve.runtime.status import EngineStatus
from tests.model.test_saved_pages import COUNT, PROMPT, resumed, stopped
from tests.support.asgi_service import run, until
from tests.support.fake_engine import FakeEngine

RECORD = {
    "samples": [
        {
            "request_id": "r", "index": 0, "prompt_token_ids": PROMPT, "params": {"max_tokens": COUNT}, "slo": None,
            "priority": 0, "token_ids": [], "finish_reason": None,
        }
    ]
}  # fmt: skip


def test_an_engine_that_does_not_answer_is_not_waited_for(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(server, "KEEP_BEGINS_S", 0.05)

    async def main():
        engine = FakeEngine(paced=True)
        thread = EngineThread(lambda: engine)
        service = Service.of_engine(thread, "tiny", ServerOptions())
        thread.start()
        await until(lambda: thread.status is EngineStatus.READY)
        held, done = threading.Event(), []
        thread.call(lambda engine: held.wait(10))
        keep_caches(service, tmp_path / "left", [RECORD])
        held.set()
        thread.call(lambda engine: done.append(1)).result(5)
        assert done == [1] and thread.stop(5)
        keep_caches(service, tmp_path / "left", [RECORD])

    run(main)
    lost = [text for text in caplog.messages if "are lost" in text]
    assert len(lost) == 2 and lost[0].endswith("lost: the engine does not answer") and "not ready" in lost[1]
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_no_half_file(tmp_path, monkeypatch):
    engine, sample = stopped("kv")
    cache = SnapshotCache(tmp_path / "left.jsonl")

    def full(header, number, page):
        if number:
            raise OSError(28, "No space left on device")
        return bytes(32)

    monkeypatch.setattr("apt_jax.serve.http.snapshot_cache._digest", full)
    with pytest.raises(OSError, match="No space"):
        cache.keep(engine, [sample])
    assert not list(cache.folder.iterdir())
    monkeypatch.undo()
    assert cache.restore(engine, [sample]) == 0 and resumed(engine, sample) > 0  # from its own cache


@pytest.mark.parametrize("made", ["folder", "pipe"])
def test_what_is_no_file_is_left_alone(tmp_path, made, caplog):
    engine, sample = stopped("kv")
    cache = SnapshotCache(tmp_path / "left.jsonl")
    cache.keep(engine, [sample])
    (path,) = cache.folder.iterdir()
    path.unlink()
    path.mkdir() if made == "folder" else os.mkfifo(path)
    engine.reset_prefix_cache()
    assert cache.restore(engine, [sample]) == 0 and f"{path} is a" in caplog.text
    cache.drop(["r"])
    assert made == "pipe" or "remove it by hand" in caplog.text


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"engine": EngineConfig(enable_prefix_caching=False)}, "which is off; use --enable-prefix-caching too"),
        ({"replicas": ReplicaOptions(replicas=2)}, "leave out --replicas"),
        ({"distributed": DistributedOptions("host:1", 2, 0)}, "leave out --replicas and --coordinator-address"),
    ],
)
def test_where_there_are_no_pages_to_keep(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Serve(shutdown=ShutdownOptions(snapshot_cache=True), **options).run()
    with pytest.raises(ValueError, match="use --snapshot-file too"):
        ServerOptions(snapshot_cache=True, snapshot_file=None)
