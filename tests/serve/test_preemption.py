"""Notices of preemption: from a fake metadata server, a file and a signal; and what a real server does then."""

import json
import os
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from apt_jax.serve.options import ServerOptions
from apt_jax.serve.replicas.leaving.notice import PreemptionNotice, PreemptionWatch
from tests.support.live_server import until
from tests.support.served_model import is_ready, start_server, write_folder


class Metadata:
    """A metadata server on loopback: answers at once if the version differs, else when a value changes."""

    def __init__(self):
        self.values = {"instance/preempted": "FALSE", "instance/maintenance-event": "NONE"}
        self.version, self.asked, self.refuses = 1, [], 0
        self.changed = threading.Condition()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                url = urlsplit(self.path)
                name, query = url.path.removeprefix("/computeMetadata/v1/"), parse_qs(url.query)
                with outer.changed:
                    outer.asked.append((name, self.headers["Metadata-Flavor"], query["wait_for_change"]))
                    if outer.refuses:
                        outer.refuses -= 1
                        self.send_error(503)
                        return
                    outer.changed.wait_for(lambda: str(outer.version) != query["last_etag"][0], 10)
                    body = outer.values[name].encode()
                    self.send_response(200)
                    self.send_header("etag", str(outer.version))
                    self.send_header("content-length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"127.0.0.1:{self.server.server_address[1]}"

    def set(self, name, value):
        with self.changed:
            self.values[name], self.version = value, self.version + 1
            self.changed.notify_all()


@pytest.fixture
def metadata(monkeypatch):
    made = Metadata()
    monkeypatch.setenv("GCE_METADATA_HOST", made.address)
    thread = threading.Thread(target=made.server.serve_forever)
    thread.start()
    yield made
    made.set("instance/preempted", "FALSE")  # whoever still waits is answered
    made.server.shutdown()
    thread.join()
    made.server.server_close()


@pytest.mark.parametrize(
    ("name", "value"),
    [("instance/preempted", "TRUE"), ("instance/maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")],
)
def test_the_metadata_server_is_asked_until_it_says_so(metadata, name, value):
    told: list[str] = []
    metadata.refuses = 1
    watch = PreemptionWatch(PreemptionNotice.parse("gce"), told.append)
    watch.start()
    until(lambda: {asked for asked, _, _ in metadata.asked} == set(metadata.values))
    metadata.set("instance/maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE")  # the machine goes on elsewhere
    assert told == []
    metadata.set(name, value)
    until(lambda: told)
    assert told == [f"{name} of {metadata.address} is {value}"]
    assert {(flavor, *wait) for _, flavor, wait in metadata.asked} == {("Google", "true")}
    watch.stop()


def test_a_server_that_cannot_be_reached_is_told_once_and_asked_again(metadata, monkeypatch, caplog):
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:1")
    monkeypatch.setattr("apt_jax.serve.replicas.leaving.notice.RETRY_S", 0.01)
    watch = PreemptionWatch(PreemptionNotice.parse("gce"), lambda why: None)
    watch.start()
    until(lambda: "no notice of preemption can be had from 127.0.0.1:1" in caplog.text)
    time.sleep(0.1)
    watch.stop()
    assert caplog.text.count("no notice of preemption") == 2, "one for each of two values"


def test_a_file_and_a_signal_are_told_once(tmp_path):
    told: list[str] = []
    for text, act in (
        (f"file:{tmp_path / 'go'}", (tmp_path / "go").touch),
        ("signal", lambda: os.kill(os.getpid(), signal.SIGUSR1)),
    ):
        watch = PreemptionWatch(PreemptionNotice.parse(text), told.append)
        watch.start()
        act()
        until(lambda: told)
        watch._tell("again")
        watch.stop()
        assert len(told) == 1 and ("is there" in told[0] or "SIGUSR1" in told[0])
        told.clear()
    for text in ("aws", "file", "file:", "gce:x"):
        with pytest.raises(ValueError, match="must be gce, file:PATH or signal"):
            PreemptionNotice.parse(text)
    with pytest.raises(ValueError, match="preemption_grace=-1"):
        ServerOptions(preemption_grace=-1)


def test_a_server_that_will_be_taken_away_keeps_what_it_cannot_finish(tmp_path):
    """With 6 s left it decodes for one, hands over what is unfinished, and is gone before the machine."""
    folder, notice, left = write_folder(tmp_path / "model"), tmp_path / "notice", tmp_path / "left.jsonl"
    process, url = start_server(
        folder, "--preemption-notice", f"file:{notice}", "--preemption-grace", "6", "--snapshot-file", str(left),
        "--scheduling-policy", "wait:force_after_s=0.5",  # soon two iterations a second
    )  # fmt: skip
    body = {"prompt": [5, 6, 7], "max_tokens": 124, "ignore_eos": True, "temperature": 0, "return_token_ids": True}
    try:
        until(lambda: is_ready(url), 120)
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(httpx.post, f"{url}/v1/completions", json=body, timeout=60)
            until(lambda: re.search(r"vllm:num_requests_running\S* 1.0", httpx.get(f"{url}/metrics").text))
            notice.touch()
            began = time.monotonic()
            reply = asked.result()
            assert process.wait(20) == 0 and time.monotonic() - began < 15
        choice = reply.json()["choices"][0]
        assert choice["finish_reason"] == "abort", (choice["finish_reason"], len(choice["token_ids"]))
        (record,) = map(json.loads, left.read_text().splitlines())
        assert choice["finish_reason"] == "abort" and record["prompts"] == [[5, 6, 7]]
        assert "the machine will be taken away in 6 s" in process.stderr.read()
    finally:
        process.kill()
        process.communicate()
