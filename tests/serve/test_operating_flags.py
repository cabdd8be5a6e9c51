"""Names, paths, certificates and log lines of a server, set by flags; the engine is the one without a model."""

import logging
import re
import shutil
import ssl
import subprocess
import sys

import httpx
import pytest

from apt_jax.serve.http.server import http_config, open_store
from apt_jax.serve.logs import JsonFormatter, TextFormatter
from apt_jax.serve.options import ServerOptions
from tests.serve.test_serve_command import BODY, command  # noqa: F401  (a fixture)
from tests.support.asgi_service import run, serving
from tests.support.fake_engine import CharTokenizer, FakeEngine

ZONE = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d"


def test_several_names_of_one_model(command):  # noqa: F811
    def visit(url):
        models = httpx.get(f"{url}/v1/models").json()["data"]
        assert [model["id"] for model in models] == ["first", "second"]
        assert httpx.get(f"{url}/v1/models/second").json()["id"] == "second"
        for name in ("first", "second"):
            assert httpx.post(f"{url}/v1/completions", json={**BODY, "model": name}).json()["model"] == "first"
            assert httpx.post(f"{url}/tokenize", json={"prompt": "a", "model": name}).status_code == 200
        other = httpx.post(f"{url}/v1/completions", json={**BODY, "model": "third"})
        assert other.status_code == 404 and "use 'first' or 'second'" in other.json()["error"]["message"]

    engine = FakeEngine(tokenizer=CharTokenizer())
    assert command(engine, visit, served_model_name="first,second", snapshot_file=None) == 0


def test_below_a_path_of_a_proxy(command):  # noqa: F811
    """A proxy takes /llm away, or leaves it: both are served."""

    def visit(url):
        for path in ("", "/llm"):
            assert httpx.get(f"{url}{path}/health").status_code == 200
            assert httpx.post(f"{url}{path}/v1/completions", json=BODY).status_code == 401
            reply = httpx.post(f"{url}{path}/v1/completions", json=BODY, headers={"authorization": "Bearer k"})
            assert reply.json()["choices"][0]["text"] == "bc"
            document = httpx.get(f"{url}{path}/openapi.json", headers={"authorization": "Bearer k"}).json()
            assert document["servers"] == [{"url": "/llm"}]

    engine = FakeEngine(tokenizer=CharTokenizer())
    assert command(engine, visit, root_path="/llm", api_key=("k",), snapshot_file=None) == 0


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl, which makes the certificate, is not installed")
def test_https(command, tmp_path):  # noqa: F811
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-days", "2", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    trust = ssl.create_default_context(cafile=str(certificate))

    def visit(url):
        assert url.startswith("https://")
        assert httpx.post(f"{url}/v1/completions", json=BODY, verify=trust).json()["choices"][0]["text"] == "bc"
        streamed = httpx.post(f"{url}/v1/completions", json={**BODY, "stream": True}, verify=trust)
        assert streamed.text.endswith("data: [DONE]\n\n")
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"{url}/health")

    engine = FakeEngine(tokenizer=CharTokenizer())
    options = {"ssl_keyfile": str(key), "ssl_certfile": str(certificate)}
    assert command(engine, visit, snapshot_file=None, **options) == 0


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"ssl_keyfile": "k"}, "ssl_keyfile and ssl_ca_certs need --ssl-certfile"),
        ({"ssl_certfile": "c", "ssl_cert_reqs": 2}, "ssl_cert_reqs=2 needs --ssl-ca-certs"),
        ({"root_path": "llm"}, "root_path='llm' must begin with /"),
        ({"root_path": "/llm/"}, "root_path='/llm/' must begin with / and not end with it"),
        ({"root_path": "/a b"}, "root_path='/a b' must begin with / and not end with it, and have what URLs may have"),
        ({"root_path": "//"}, "root_path='//' must begin with /"),
        ({"stream_interval": 0}, "stream_interval=0 must be at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused(fields, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        ServerOptions(**fields)


def test_a_batch_folder_that_cannot_be_used_names_the_flag(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--batch-dir .*/file/batches cannot be used: .*; give another one"):
        open_store(tmp_path / "file" / "batches")


@pytest.mark.parametrize("wanted", [True, False])
def test_access_logs_may_be_quiet(caplog, wanted):
    caplog.set_level(logging.INFO, "apt_jax.access")

    async def main():
        async with serving(FakeEngine(), access_log=wanted) as client:
            assert (await client.get("/v1/models")).status_code == 200

    run(main)
    assert bool([record for record in caplog.records if record.name == "apt_jax.access"]) is wanted


def test_log_lines_say_the_time_zone():
    record = logging.LogRecord("apt_jax.serve", logging.INFO, "f", 1, "text", None, None)
    assert re.fullmatch(rf"{ZONE} INFO apt_jax\.serve: text", TextFormatter().format(record))
    assert re.match(rf'{{"time": "{ZONE}", "level": "INFO"', JsonFormatter().format(record))


@pytest.mark.parametrize(("level", "shown"), [("debug", "d i w"), ("info", "i w"), ("warning", "w"), ("error", "")])
def test_the_level_of_log_lines(level, shown):
    code = (
        "import logging, sys; from apt_jax.serve.logs import set_up_logs; set_up_logs('text', sys.argv[1]);"
        "logger = logging.getLogger('apt_jax.x'); logger.debug('d'); logger.info('i'); logger.warning('w');"
        "logging.getLogger('other').info('never')"
    )
    done = subprocess.run([sys.executable, "-c", code, level], capture_output=True, text=True, check=True)
    assert " ".join(line.rpartition(": ")[2] for line in done.stderr.splitlines()) == shown


def test_a_script_that_completes_flags():
    asked = [sys.executable, "-m", "apt_jax", "--tyro-print-completion", "bash"]
    done = subprocess.run(asked, capture_output=True, text=True, check=True)
    assert "--scheduling-policy" in done.stdout
    script = subprocess.run(["bash", "-n"], input=done.stdout, capture_output=True, text=True, check=True)
    assert script.stderr == ""


def test_a_certificate_that_is_not_there_is_named(tmp_path):
    """The error was "no such file or directory" alone."""
    missing = str(tmp_path / "missing.pem")
    with pytest.raises(ValueError, match=rf"--ssl-certfile {missing} cannot be read: .*; give another one"):
        http_config(lambda *args: None, ServerOptions(ssl_certfile=missing))
