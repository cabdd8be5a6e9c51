"""Every command of the guides: it is run here, or says above itself why it is not; its output is what it prints now.

A block of commands that cannot be run in a test has `<!-- not run: REASON -->` in the line above it.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import pytest

from tests.unit.test_docs import GUIDES, ROOT

BLOCK = re.compile(
    r"^(<!-- not run: (?P<why>[^\n]+) -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
PROGRAM = re.compile(
    r"(?:[A-Z_]+=\S+ )*(?:\.venv/bin/|~/\.local/bin/)?"
    r"(?:apt-jax|make|mkdir|curl|python[\d.]*|pip|uv|docker|git|gcloud|sudo|vllm|guidellm|lm_eval|aiperf|locust|cat) "
)
SERVER = "http://127.0.0.1:8000"
DEMO = ROOT / "checkpoints" / "demo"


@dataclass(frozen=True)
class Block:
    """A block of a page; `why` it is not run."""

    page: str
    kind: str
    text: str
    why: str | None

    @property
    def first(self) -> str:
        lines = [line for line in self.text.splitlines() if line.strip() and not line.startswith("#")]
        return lines[0].removeprefix("$ ") if lines else ""

    @property
    def is_commands(self) -> bool:
        return self.kind == "python" or (self.kind in ("", "bash", "sh") and PROGRAM.match(self.first) is not None)


def blocks() -> Iterator[Block]:
    for page in GUIDES:
        for found in BLOCK.finditer((ROOT / page).read_text("utf-8")):
            yield Block(page, found["kind"], found["text"], found["why"])


COMMANDS = [block for block in blocks() if block.is_commands]
RUN = [block for block in COMMANDS if block.why is None]
OF_A_SERVER = [block for block in RUN if SERVER in block.text]
OF_PYTHON = [block for block in RUN if block.kind == "python" and block not in OF_A_SERVER]
OTHERS = [block for block in RUN if block not in OF_A_SERVER and block not in OF_PYTHON]


def names(found: list[Block]) -> list[str]:
    return [f"{block.page}:{block.first[:30]}" for block in found]


def test_a_reason_stands_above_commands_only_and_most_pages_that_call_a_server_are_run():
    assert [f"{b.page}: {b.first}" for b in blocks() if b.why is not None and not b.is_commands] == []
    assert len(OF_A_SERVER) >= 7 and len(OF_PYTHON) >= 4 and len(OTHERS) >= 3
    text = "".join((ROOT / page).read_text("utf-8") for page in GUIDES)
    assert len(re.findall(r"^<!-- not run: ", text, re.MULTILINE)) == sum(
        block.why is not None for block in blocks()
    ), "one stands above no block"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Of a shell in which the package is installed, with the compiled programs that all tests share."""
    folder = jax.config.jax_compilation_cache_dir or tmp_path_factory.mktemp("xla")
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "APT_JAX_COMPILATION_CACHE_DIR": str(folder),
    }


@pytest.fixture(scope="module")
def server(environment, tmp_path_factory):
    """The demo model's, and its address."""
    command = [sys.executable, "-m", "apt_jax", "serve", "--port", "0", "--snapshot-file", "None"]
    command += ["--max-num-seqs", "8", "--max-num-batched-tokens", "64"]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stderr=file)
    try:
        while (found := re.search(r"answers at (\S+)/v1/completions", log.read_text())) is None:
            assert process.poll() is None, log.read_text()
        yield found[1]
    finally:
        process.terminate()
        process.wait()


def shell(text: str, cwd: Path, environment: dict[str, str]) -> str:
    """What commands print on standard output."""
    done = subprocess.run(
        ["bash", "-ec", text], cwd=cwd, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"
    return done.stdout


def parts(text: str) -> Iterator[tuple[str, str]]:
    """The commands of a block, each with the output that is shown for it."""
    if not text.lstrip().startswith("$ "):
        yield text, ""
        return
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        lines = part.splitlines()
        end = next(i for i, line in enumerate(lines) if not line.endswith("\\")) + 1
        yield "\n".join(lines[:end]), "\n".join(lines[end:])


def shape(value):
    """JSON without what differs from run to run: numbers, the answer's own id, and whether and how its SLO was kept."""
    if isinstance(value, dict):
        own = {"id": lambda entry: "", "slo": sorted}
        return {key: own.get(key, shape)(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [shape(entry) for entry in value]
    return 0 if isinstance(value, int | float) and not isinstance(value, bool) else value


@pytest.mark.parametrize("block", OF_A_SERVER, ids=names(OF_A_SERVER))
def test_what_asks_a_server(block, server, environment, tmp_path):
    text = block.text.replace(SERVER, server)
    if block.kind == "python":
        text = f"{shlex.quote(sys.executable)} -c {shlex.quote(text)}"
    for command, shown in parts(text):
        printed = shell(command.replace("curl -s ", "curl -sS "), tmp_path, environment)
        assert printed.strip()
        if "curl" in command:
            answer = json.loads(printed)
            assert ("error" in answer) == (block.page == "docs/api_errors.md"), printed
            if shown:
                assert shape(json.loads(shown)) == shape(answer), "the page shows another answer"


def test_what_calls_the_package(environment, tmp_path):
    """All in one process: importing jax takes longest. One that is on two pages is run once."""
    once = {block.text: block for block in OF_PYTHON if "Policy" not in block.text}.values()
    lines = [
        f"print({block.page!r}, flush=True)\nexec(compile({block.text!r}, {block.page!r}, 'exec'), {{}})"
        for block in once
    ]
    code = "\n".join(lines)
    printed = shell(f"{shlex.quote(sys.executable)} -c {shlex.quote(code)}", tmp_path, environment)
    assert "docs/python.md" in printed and "->" in printed


@pytest.mark.parametrize("block", OTHERS, ids=names(OTHERS))
def test_other_commands(block, environment, tmp_path):
    """SRC is the demo model, DST a new folder; what a page shows of a file is what is in it."""
    found = re.search(r"^\$ cat (\S+)\n(.*?)^\$ ", block.text, re.MULTILINE | re.DOTALL)
    if found is not None:
        (tmp_path / found[1]).write_text(found[2])
    lines = [line for command, _ in parts(block.text) for line in command.splitlines()]
    for number, line in enumerate(lines):
        text = line.replace("DST", f"dst{number}").replace("SRC", str(DEMO)).replace("~", str(tmp_path))
        shell(text, tmp_path, environment)
    if block.page == "docs/batch.md":
        shown = [b.text for b in blocks() if b.page == block.page and b.text.startswith('{"id": "batch_req')]
        made = (tmp_path / "answers.jsonl").read_text()
        ordered = [sorted(map(json.loads, text.splitlines()), key=lambda line: line["id"]) for text in (*shown, made)]
        assert shape(ordered[0]) == shape(ordered[1]), "the page shows other answers"
