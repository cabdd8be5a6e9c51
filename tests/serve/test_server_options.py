"""Limits and defaults of the server's flags, and what the command does with a signal and an error."""

import json
import logging
import sys

import pytest

import apt_jax.serve.cli
from apt_jax.ranges import check_at_most, check_block_size
from apt_jax.serve.cli import main
from apt_jax.serve.errors import EngineFailure
from apt_jax.serve.logs import JsonFormatter, TextFormatter, set_up_logs
from apt_jax.serve.options import DistributedOptions, ServerOptions, listed


def test_defaults_that_the_guides_state():
    options = ServerOptions()
    assert (options.host, options.port, options.max_body_bytes) == ("127.0.0.1", 8000, 4_194_304)
    assert (options.max_header_bytes, options.request_read_timeout, options.response_write_timeout) == (32768, 60, 300)
    assert (options.shutdown_timeout, options.max_failed_steps, options.request_timeout) == (30, 10, None)
    assert (options.log_requests, options.enable_profiler, options.reject_predicted_late) == (False, False, False)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("port", (0, 65535), (-1, 65536)),
        ("max_body_bytes", (1,), (0, -1)),
        ("max_header_bytes", (1024,), (1023, 0)),
        ("request_read_timeout", (1e-3, 999_999.0), (0.0, 1e6, 1.5e6, -1.0)),
        ("response_write_timeout", (1e-3, 999_999.0), (0.0, 1e6, 1.5e6)),
        ("request_timeout", (1e-3, 1e9), (0.0, -1.0)),
        ("shutdown_timeout", (0.0, 999_999.0), (1e6, 1.5e6, -1.0)),
        ("max_failed_steps", (1,), (0,)),
        ("max_step_seconds", (1e-3,), (0.0,)),
    ],
)
def test_limits_are_exact(name, good, bad):
    for value in good:
        assert getattr(ServerOptions(**{name: value}), name) == value
    for value in bad:
        with pytest.raises(ValueError, match=f"^{name}={value} must be "):
            ServerOptions(**{name: value})


@pytest.mark.parametrize(
    ("flags", "is_checked"),
    [
        ({}, True),
        ({"host": "0.0.0.0"}, False),
        ({"host": "::"}, False),
        ({"host": ""}, False),
        ({"host": "0.0.0.0", "allowed_hosts": ("a",)}, True),
        ({"host": "box.example"}, True),
    ],
)
def test_where_the_host_header_is_checked(flags, is_checked):
    assert ServerOptions(**flags).checks_host is is_checked
    assert ServerOptions(allowed_hosts=("a", "b"), host="c").own_hosts == ("a", "b", "c")


def test_values_of_a_repeated_flag():
    assert listed("f", ("a , b", '["c,d"]')) == ("a", "b", "c,d") and listed("f", ()) == ()
    assert listed("f", ("[::1]",)) == ("[::1]",), "an address in brackets is no JSON"
    for given in (("a,",), ("[1]", '["a", 1]'), ('["a"',), ('[""]',)):
        with pytest.raises(ValueError, match="f="):
            listed("f", given)
    with pytest.raises(ValueError, match="api_key has an empty key"):
        ServerOptions(api_key=("a", ""))


def test_the_host_of_the_leader():
    for address, host in ((None, None), ("auto", None), ("tpu-0:1234", "tpu-0"), ("[::1]:1234", "[::1]"), (":1", None)):
        assert DistributedOptions(coordinator_address=address).leader_host == host


def test_a_block_has_a_power_of_two_tokens_up_to_128():
    for size in (1, 2, 64, 128):
        check_block_size(size)
    for size in (-16, 0, 3, 129, 256):
        with pytest.raises(ValueError, match=f"block_size={size} must be a power of two, at most 128"):
            check_block_size(size)


def test_a_limit_itself_is_within_it():
    options = ServerOptions(port=7)
    check_at_most(options, 7, ("port", "request_timeout"))
    with pytest.raises(ValueError, match="port=7 must be at most 6"):
        check_at_most(options, 6, ("request_timeout", "port"))


def code_of(error, monkeypatch, *flags):
    """Exit code of a `serve` that ends so."""

    def run(self):
        raise error

    monkeypatch.setattr(apt_jax.serve.cli.Serve, "run", run)
    with pytest.raises(SystemExit) as caught:
        main(["serve", *flags])
    return caught.value.code


def test_exit_codes(monkeypatch, capsys):
    assert code_of(KeyboardInterrupt(), monkeypatch) == 130 and capsys.readouterr().err == ""
    for error in (ValueError("no"), OSError(13, "Permission denied", "f"), EngineFailure("no")):
        assert code_of(error, monkeypatch) == 1 and capsys.readouterr().err.startswith("error: ")
    with pytest.raises(ZeroDivisionError):
        code_of(ZeroDivisionError(), monkeypatch)


def without_handlers(monkeypatch):
    """The root logger as it is when a command begins."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    return root


@pytest.mark.parametrize(("flags", "formatter"), [([], TextFormatter), (["--log-format", "json"], JsonFormatter)])
def test_logs_have_the_format_asked_for(flags, formatter, monkeypatch, capsys):
    logs = without_handlers(monkeypatch)
    monkeypatch.setattr("apt_jax.serve.logs.turn_off", lambda: None)
    monkeypatch.setattr("logging.captureWarnings", lambda capture: None)
    assert code_of(ValueError("too 'much'"), monkeypatch, *flags) == 1
    (handler,) = logs.handlers
    assert type(handler.formatter) is formatter and handler.stream is sys.stderr
    assert logs.level == logging.WARNING and logging.getLogger("apt_jax").level == logging.INFO
    err = capsys.readouterr().err
    assert json.loads(err)["message"] == "too 'much'" if flags else err == "error: too 'much'\n"


def record(message, fields=None, error=None):
    made = logging.LogRecord(
        "n", logging.INFO, "f", 1, message, (), None if error is None else (type(error), error, None)
    )
    made.fields = fields or {}
    return made


def test_a_record_of_each_format():
    found = json.loads(JsonFormatter().format(record("a\nb", {"path": "/x"})))
    assert (found["level"], found["logger"], found["message"], found["path"]) == ("INFO", "n", "a\nb", "/x")
    assert "traceback" not in found
    assert "ValueError: no" in json.loads(JsonFormatter().format(record("a", error=ValueError("no"))))["traceback"]
    text = TextFormatter().format(record("a\nb", {"path": "/x", "text": 'c "d', "n": 3}))
    assert text.endswith(' INFO n: a\n    b path=/x text="c \\"d" n=3')


def test_text_logs_are_set_up_once(monkeypatch):
    logs = without_handlers(monkeypatch)
    set_up_logs()
    set_up_logs()
    assert len(logs.handlers) == 1
