"""The catalogue of clients, their scripts, and what docs/clients.md says of them. `make test-clients` uses them."""

import re
import sys

import pytest

from tests.clients.__main__ import SCRIPTS, NotInstalled, python_of, use
from tests.clients.catalogue import CLIENTS, Client
from tests.unit.test_docs import ROOT


def test_every_client_has_a_script_and_a_row_in_the_docs():
    rows = re.findall(r"^\| ([\w-]+) \| ([\d.]+) \| ", (ROOT / "docs/clients.md").read_text("utf-8"), re.MULTILINE)
    assert [name for name, _ in rows] == [client.name for client in CLIENTS]
    for client in CLIENTS:
        compile((SCRIPTS / client.script).read_text("utf-8"), client.script, "exec")


def test_one_that_cannot_be_installed_is_told_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.clients.__main__.FOLDER", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    client = Client("none", ("there-is-no-such-package-here",), "none", "openai_client.py")
    with pytest.raises(NotInstalled, match=r"^it cannot be installed here: ERROR: .*; see .*none\.log$"):
        python_of(client)


def test_a_script_that_fails_is_told_with_its_end(tmp_path, monkeypatch):
    (tmp_path / "bad.py").write_text("print('some'); raise SystemExit('the reason')")
    monkeypatch.setattr("tests.clients.__main__.SCRIPTS", tmp_path)
    with pytest.raises(AssertionError, match="the reason"):
        use(Client("bad", (), "bad", "bad.py"), sys.executable, ("a", "b"))
