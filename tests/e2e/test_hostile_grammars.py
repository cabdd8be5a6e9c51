"""Hostile grammars at a server: nobody else is denied, and it ends in order with one that is being compiled."""

import os
import signal
import threading
import time

import httpx
import pytest

from apt_jax.serve.batch.store import BatchStore
from tests.support.live_server import until
from tests.support.served_model import is_ready, start_server, write_folder
from tests.unit.test_grammar_limits import ENDLESS, processes_of

MANY = 45


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("tiny"))


def hostile(number: int) -> dict:
    return {"grammar": ENDLESS["grammar"].replace("101", str(200 + number))}


def test_the_server_ends_in_order_while_grammars_are_compiled(folder, tmp_path):
    """It went on after SIGTERM, with its lock of --batch-dir, and wrote tracebacks."""
    process, url = start_server(
        folder, "--batch-dir", str(tmp_path / "batches"), "--snapshot-file", str(tmp_path / "s")
    )
    replies: list[httpx.Response] = []

    def ask(asked, **fields) -> httpx.Response:
        body = {"prompt": "the", "max_tokens": 8, "structured_outputs": asked, **fields}
        return httpx.post(f"{url}/v1/completions", json=body, timeout=240)

    threads = [threading.Thread(target=lambda n=number: replies.append(ask(hostile(n)))) for number in range(MANY)]
    try:
        until(lambda: is_ready(url), 240)
        assert ask({"regex": "[a-f]{4}"}).status_code == 200
        refused = ask({"choice": ["yes"]}, bad_words=["yes"])
        assert refused.status_code == 400 and "structured_outputs and bad_words" in refused.json()["error"]["message"]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        assert ask({"regex": "[a-f]{5}"}).status_code == 200
        assert len(replies) < MANY, "the large ones are still being compiled"
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
        assert time.monotonic() - began < 15
        for thread in threads:
            thread.join()
    finally:
        process.kill()
    assert process.returncode == 0
    assert "stopped" in errors and "Traceback" not in errors and "CancelledError" not in errors
    assert {reply.status_code for reply in replies} <= {400, 503}
    BatchStore(tmp_path / "batches")  # nobody holds it any more


def test_a_request_whose_grammar_is_killed_from_outside_is_not_to_blame(folder):
    """It got 400, as if it were wrong, and so did every later request of that grammar."""
    process, url = start_server(folder)
    body = {"prompt": "the", "max_tokens": 8, "structured_outputs": {"regex": "[a-f]{9}"}}
    replies: list[httpx.Response] = []

    def ask() -> None:
        replies.append(httpx.post(f"{url}/v1/completions", json=body, timeout=240))

    try:
        until(lambda: is_ready(url), 240)
        ask()
        (forking,) = processes_of(process.pid)
        (follower,) = processes_of(forking)
        os.kill(follower, signal.SIGSTOP)  # it has told the first tokens, the second ones are waited for
        thread = threading.Thread(target=ask)
        thread.start()
        time.sleep(1)
        os.kill(follower, signal.SIGKILL)
        thread.join()
        ask()
    finally:
        process.terminate()
        process.communicate(timeout=120)
    assert [reply.status_code for reply in replies] == [200, 500, 200]
    assert replies[1].json()["error"]["message"].endswith("its process has ended; try again later")
