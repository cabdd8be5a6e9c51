"""A batch file over two engines by Ray Data: killed engines and killed jobs, and every line answered once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support import served_model

pytest.importorskip("ray", reason="Ray is not installed; `make test-ray` installs it and runs these")

LINES = 60
BAD = {7: "not json", 20: None}  # line 20 has the custom_id of line 1

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return served_model.write_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def requests(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("batch") / "in.jsonl"
    path.write_text("".join(f"{line_of(number)}\n" for number in range(1, LINES + 1)))
    return path


def line_of(number: int) -> str:
    if BAD.get(number, "") == "not json":
        return "this is no request"
    body = {"prompt": f"the fox {number}", "max_tokens": 80, "temperature": 0.7, "seed": number, "ignore_eos": True}
    custom_id = "c1" if number in BAD else f"c{number}"
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body})


def start(folder: Path, requests: Path, output: Path, *flags: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "apt_jax.serve.cli", "run-batch", "-i", requests, "-o", output, folder]
    more = ["--served-model-name", served_model.NAME, "--load-format", "dummy", *served_model.flags(), *flags]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    with output.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(list(map(str, [*command, *more])), env=environment, stdout=log, stderr=log)


def answers(output: Path) -> dict[int, object]:
    """Text, or code of the error, by line; no line twice."""
    found: dict[int, object] = {}
    for line in output.read_text().splitlines():
        result = json.loads(line)
        number = int(result["id"].split("_")[2])
        assert number not in found
        response = result["response"]
        found[number] = response["body"]["choices"][0]["text"] if response else result["error"]["code"]
    return found


def workers(job: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Processes of the job's engines."""
    found = []
    for process in psutil.Process(job.pid).children(recursive=True):
        try:
            if "LineWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            pass
    return found


def wait_for(condition, job: subprocess.Popen[bytes], timeout_s: float = 300) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end and job.poll() is None
        time.sleep(0.02)


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_engines_and_jobs_die_and_every_line_is_answered_once(folder, requests, tmp_path):
    alone, output = tmp_path / "alone.jsonl", tmp_path / "out.jsonl"
    assert start(folder, requests, alone).wait(300) == 0
    expected = answers(alone)
    assert expected.keys() == set(range(1, LINES + 1))
    assert expected[7] == "invalid_json" and expected[20] == "duplicate_custom_id"

    flags = ("--ray", "local", "--replicas", "2")
    job = start(folder, requests, output, *flags)
    wait_for(lambda: num_lines(output) > len(BAD), job)  # the first piece is answered
    engines = workers(job)
    assert len(engines) == 2
    engines[0].send_signal(signal.SIGKILL)
    done = num_lines(output)
    wait_for(lambda: num_lines(output) > done, job)
    if job.poll() is None:
        job.send_signal(signal.SIGKILL)  # the job itself, with all of Ray under it
    job.wait(30)

    job = start(folder, requests, output, *flags)
    try:
        assert job.wait(300) == 0, output.with_suffix(".log").read_text()[-3000:]
    finally:
        job.kill()
    assert answers(output) == expected

    text = output.read_bytes()
    again = start(folder, requests, output, *flags)
    assert again.wait(60) == 0 and output.read_bytes() == text
