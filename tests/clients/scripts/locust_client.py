"""locust: 8 users for 10 s, whole and streamed answers."""

import csv
import subprocess
import sys
import tempfile
from pathlib import Path

FILE = """
from locust import HttpUser, constant, task


class Reader(HttpUser):
    wait_time = constant(0.1)

    @task
    def whole(self):
        self.client.post("/v1/completions", json={"prompt": "def read(", "max_tokens": 16})

    @task
    def streamed(self):
        body = {"prompt": "def read(", "max_tokens": 16, "stream": True}
        with self.client.post("/v1/completions", json=body, stream=True, catch_response=True, name="stream") as reply:
            lines = [line for line in reply.iter_lines() if line]
            if lines[-1] != b"data: [DONE]":
                reply.failure(f"it ends with {lines[-1]!r}")
"""
with tempfile.TemporaryDirectory() as name:
    (Path(name) / "locustfile.py").write_text(FILE)
    command = [
        sys.executable, "-m", "locust", "-f", f"{name}/locustfile.py", "--headless", "-u", "8", "-r", "8", "-t", "10s",
        "--host", sys.argv[1], "--csv", f"{name}/found", "--only-summary",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with open(f"{name}/found_stats.csv", newline="") as file:
        (total,) = [row for row in csv.DictReader(file) if row["Name"] == "Aggregated"]
    assert int(total["Failure Count"]) == 0 and int(total["Request Count"]) > 20, total
print(f"8 users for 10 s, {total['Request Count']} requests, whole and streamed, none failed")
