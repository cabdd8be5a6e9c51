"""The rules, alerts and dashboard of deploy/monitoring, by a real Prometheus that reads a server."""

import json
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from tests.serve.test_serve_command import command  # noqa: F401  (a fixture)
from tests.support.fake_engine import CharTokenizer, FakeEngine

FOLDER = Path(__file__).parents[2] / "deploy" / "monitoring"
pytestmark = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="Prometheus is not installed (Debian: apt-get install prometheus)"
)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def promtool(*arguments):
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_configuration_and_the_rules_are_valid_and_do_what_they_say():
    promtool("check", "config", FOLDER / "prometheus.yaml")
    promtool("check", "rules", FOLDER / "rules.yaml")
    promtool("test", "rules", FOLDER / "rules-test.yaml")


def expressions():
    """Of every panel of the dashboard, for the model that is served."""
    board = json.loads((FOLDER / "grafana.json").read_text())
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"].replace("$model_name", "apt-jax-demo")
            yield panel["title"], expression.replace("$__rate_interval", "10s")


def test_it_reads_a_server_records_attainment_and_knows_every_expression(command, tmp_path):  # noqa: F811
    found = {}

    def visit(url):
        port, target = free_port(), url.removeprefix("http://")
        rules = (FOLDER / "rules.yaml").read_text().replace("[5m]", "[10s]")
        (tmp_path / "rules.yaml").write_text(rules)
        (tmp_path / "prometheus.yaml").write_text(
            "global: { scrape_interval: 500ms, evaluation_interval: 500ms }\n"
            'rule_files: ["rules.yaml"]\n'
            f"scrape_configs: [{{ job_name: apt-jax, static_configs: [{{ targets: ['{target}'] }}] }}]\n"
        )
        process = subprocess.Popen(
            [
                *("prometheus", f"--config.file={tmp_path / 'prometheus.yaml'}"),
                *(f"--storage.tsdb.path={tmp_path / 'data'}", f"--web.listen-address=127.0.0.1:{port}"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

        def ask(expression):
            answer = httpx.get(f"http://127.0.0.1:{port}/api/v1/query", params={"query": expression})
            if answer.status_code == 503:  # it answers so, without JSON, until it has started
                answer.raise_for_status()
            reply = answer.json()
            assert reply["status"] == "success", (expression, reply)
            return reply["data"]["result"]

        try:
            limit = time.monotonic() + 30
            while True:
                try:
                    httpx.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 3})
                    share = ask('apt:slo_attainment:ratio_rate5m{slo="strict"}')
                    if share and share[0]["value"][1] == "1":
                        break
                except httpx.HTTPError:
                    pass
                assert time.monotonic() < limit, "nothing was recorded"
                time.sleep(0.1)
            for title, expression in expressions():
                found[title, expression] = ask(expression)
            alerts = httpx.get(f"http://127.0.0.1:{port}/api/v1/rules").json()["data"]["groups"]
            found["health"] = {rule["name"]: rule["health"] for group in alerts for rule in group["rules"]}
            found["firing"] = httpx.get(f"http://127.0.0.1:{port}/api/v1/alerts").json()["data"]["alerts"]
        finally:
            process.terminate()
            process.wait()

    assert command(FakeEngine(tokenizer=CharTokenizer()), visit, snapshot_file=None) == 0
    health, firing = found.pop("health"), found.pop("firing")
    named = re.findall("- (?:record|alert): (.+)", (FOLDER / "rules.yaml").read_text())
    assert health == dict.fromkeys(named, "ok")
    assert firing == []
    assert len(found) > 20 and all(found.values()), [key for key, value in found.items() if not value]
