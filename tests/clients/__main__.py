"""Real clients in their current versions against a running server, each in an environment of its own.

    make test-clients [ARGS="--clients openai-3,litellm"]

One that cannot be installed here is skipped with a sentence. The environments stay in .venv-clients for the next time;
--environments NAME=PYTHON takes one that is there already.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.clients.catalogue import CLIENTS, Client

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".venv-clients"
DEMO = ROOT / "checkpoints" / "demo"
SCRIPTS = Path(__file__).parent / "scripts"
TEMPLATE = "{{ eos_token }}{% for m in messages %}{{ m.content }}\n{% endfor %}"
INSTALL_LIMIT_S, CLIENT_LIMIT_S = 900, 600


class NotInstalled(Exception):
    """A client cannot be installed here; one sentence."""


def start(*flags: str, folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """A server of the demo model, and its address."""
    log = folder / f"server{len(list(folder.glob('server*')))}"
    template = folder / "template.jinja"
    template.write_text(TEMPLATE)
    command = [sys.executable, "-m", "apt_jax", "serve", "--port", "0", "--snapshot-file", "None"]
    command += ["--chat-template", str(template), "--max-num-seqs", "16", "--max-num-batched-tokens", "128", *flags]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stderr=file, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    while (found := re.search(r"answers at (\S+)/v1/completions", log.read_text())) is None:
        if process.poll() is not None:
            raise SystemExit(log.read_text())
        time.sleep(0.2)
    return process, found[1]


def python_of(client: Client) -> Path:
    """The client's interpreter; its environment is made if necessary.

    Raises:
        NotInstalled: why not.
    """
    folder = FOLDER / client.name
    python, stamp = folder / "bin" / "python", folder / ".installed"
    wanted = "\n".join([*client.requirements, *(f"without {name}" for name in client.unwanted)])
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    base = shutil.which(client.python or "") or sys.executable
    print(f"installing {client.name} (once; minutes)", file=sys.stderr, flush=True)
    FOLDER.mkdir(exist_ok=True)
    log = FOLDER / f"{client.name}.log"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    commands = [[base, "-m", "venv", "--clear", str(folder)], [*pip, "install", "--no-compile", *client.requirements]]
    if client.unwanted:
        commands.append([*pip, "uninstall", "-y", *client.unwanted])
    with log.open("w") as file:
        for command in commands:
            try:
                code = subprocess.run(command, stdout=file, stderr=file, timeout=INSTALL_LIMIT_S).returncode
            except subprocess.TimeoutExpired as error:
                raise NotInstalled(f"it could not be installed within {INSTALL_LIMIT_S} s; see {log}") from error
            if code:
                errors = [line for line in log.read_text(errors="replace").splitlines() if "ERROR" in line]
                raise NotInstalled(f"it cannot be installed here: {(errors or ['see'])[-1][:120]}; see {log}")
    stamp.write_text(wanted)
    return python


def version_of(client: Client, python: Path) -> str:
    """Of the client's distribution."""
    code = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"
    done = subprocess.run([python, "-c", code, client.distribution], capture_output=True, text=True)
    return done.stdout.strip() or "?"


def use(client: Client, python: Path, addresses: tuple[str, str]) -> str:
    """What the client's script says; AssertionError with its end if it fails."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "OPENAI_API_KEY": "none"}  # nothing is fetched
    command = [python, SCRIPTS / client.script, *addresses, DEMO, *client.arguments]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [str(word) for word in command], cwd=folder, env=environment, capture_output=True, text=True,
            timeout=CLIENT_LIMIT_S,
        )  # fmt: skip
    if done.returncode:
        raise AssertionError((done.stdout + done.stderr)[-3000:])
    return done.stdout.strip().splitlines()[-1]


def main() -> None:
    """Use each, print a table; exits with 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", default=",".join(client.name for client in CLIENTS))
    parser.add_argument("--environments", nargs="*", default=[], metavar="NAME=PYTHON")
    asked = parser.parse_args()
    there = dict(pair.split("=", 1) for pair in asked.environments)
    chosen = [client for client in CLIENTS if client.name in asked.clients.split(",")]
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        servers = [start(folder=Path(name)), start("--max-model-len", "128", folder=Path(name))]
        try:
            print("| Client | Version | Result |\n|---|---|---|")
            for client in chosen:
                version = "-"
                try:
                    python = Path(there[client.name]) if client.name in there else python_of(client)
                    version = version_of(client, python)
                    result = use(client, python, (servers[0][1], servers[1][1]))
                except NotInstalled as error:
                    result = f"skipped: {error}"
                except (AssertionError, subprocess.TimeoutExpired) as error:
                    failed += 1
                    result = f"FAILED: {error}"
                print(f"| {client.name} | {version} | {result} |", flush=True)
        finally:
            for process, _ in servers:
                process.terminate()
            codes = [process.wait() for process, _ in servers]
    if any(codes):
        raise SystemExit(f"the servers ended with {codes}")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
