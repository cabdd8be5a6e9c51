"""The Makefile's search for a Python and its stamps, with shell scripts in the place of Pythons."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ("make", "sh", "touch", "mkdir", "chmod", "cat", "cp")

BROKEN = "#!/bin/sh\nexit 127\n"
# answers the Makefile's questions as Python {version} would, and writes down what it is asked to do
PYTHON = """#!/bin/sh
case "$*" in
  *"sys.version_info[:2]"*) echo {version};;
  *"sys.version_info < (3, 12)"*) exit {too_old};;
  *"import ensurepip"*) exit {lacks_venv};;
  "-m venv --clear .venv") echo "{name} venv" >> "$LOG"; mkdir -p .venv/bin; cp "$0" .venv/bin/python
    printf '#!/bin/sh\\necho "apt-jax $*" >> "$LOG"\\n' > .venv/bin/apt-jax; chmod +x .venv/bin/apt-jax;;
  *) echo "$*" >> "$LOG";;
esac
"""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make to test the Makefile with")


class Machine:
    """A folder with the Makefile, and a PATH on which only what is put there is found."""

    def __init__(self, folder: Path):
        self.folder = folder / "project"
        self.bin = folder / "bin"
        self.log = folder / "log"
        self.folder.mkdir()
        self.bin.mkdir()
        shutil.copy(ROOT / "Makefile", self.folder)
        (self.folder / "pyproject.toml").write_text("")
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool) or "")

    def put(self, name: str, script: str) -> Path:
        path = self.bin / name
        path.write_text(script)
        path.chmod(0o755)
        return path

    def put_python(self, name: str, version: str, *, too_old: bool = False, lacks_venv: bool = False) -> Path:
        return self.put(
            name, PYTHON.format(name=name, version=version, too_old=int(too_old), lacks_venv=int(lacks_venv))
        )

    def make(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": str(self.bin), "LOG": str(self.log)}
        return subprocess.run(
            [str(self.bin / "make"), *arguments], cwd=self.folder, env=environment, capture_output=True, text=True
        )

    def did(self) -> list[str]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_without_any_python_there_is_one_sentence(machine):
    done = machine.make("serve")
    assert done.returncode != 0
    assert done.stderr.splitlines()[0] == (
        "error: Python 3.12 or newer is needed, and none was found on PATH: there is no Python at all; "
        "install it, or name it with PYTHON=/path/to/python"
    )
    assert machine.did() == []


def test_pythons_that_will_not_do_are_named_with_what_they_lack(machine):
    machine.put("python3", BROKEN)
    machine.put_python("python", "3.9", too_old=True)
    machine.put_python("python3.12", "3.12", lacks_venv=True)
    sentence = machine.make("test").stderr.splitlines()[0]
    assert "python is 3.9;" in sentence and "apt install python3.12-venv" in sentence and "python3 is" not in sentence
    assert machine.did() == []


def test_the_first_python_that_really_runs_is_taken_and_the_second_start_installs_nothing(machine):
    machine.put("python3", BROKEN)
    machine.put_python("python3.13", "3.13")
    install = "-m pip --disable-pip-version-check install --no-compile -e ."
    assert machine.make("serve").returncode == 0
    assert machine.did() == ["python3.13 venv", install, "apt-jax serve"]
    assert machine.make("serve", "ARGS=folder --port 0").returncode == 0
    assert machine.did() == ["apt-jax serve folder --port 0"]
    later = time.time() + 5
    os.utime(machine.folder / "pyproject.toml", (later, later))
    assert machine.make("serve").returncode == 0
    assert machine.did() == [install, "apt-jax serve"]


def test_a_named_python_goes_first(machine, tmp_path):
    machine.put_python("python3", "3.12")
    elsewhere = machine.put_python("own", "3.14")
    assert machine.make("serve", f"PYTHON={elsewhere}").returncode == 0
    assert machine.did()[0] == "own venv"


def test_an_interrupted_installation_is_done_again(machine):
    python = machine.put_python("python3", "3.12")
    script = python.read_text()
    python.write_text(script.replace('*) echo "$*"', '*install*) exit 1;;\n  *) echo "$*"'))
    assert machine.make("serve").returncode != 0
    assert machine.did() == ["python3 venv"]
    (machine.folder / ".venv/bin/python").write_text(script)
    assert machine.make("serve").returncode == 0
    assert machine.did() == ["-m pip --disable-pip-version-check install --no-compile -e .", "apt-jax serve"]


def test_the_quick_tests_are_there():
    said = subprocess.run(["make", "-n", "test-fast"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (command,) = (line for line in said.splitlines() if " pytest " in line)
    named = [word.removeprefix("--ignore=") for word in command.split() if "tests/" in word]
    assert "tests/unit" in named and all((ROOT / name).exists() for name in named)
