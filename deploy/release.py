"""Builds a release and tries it: sdist and wheel, their description, an installation elsewhere, a server from it.

    python deploy/release.py [--url https://HOST/OWNER/NAME] [--out dist]

Needs git, and a package index for `pip`. The checkout is not changed: what is built is the committed files, with the
README's links made absolute and the project's addresses set if --url says where the repository is. Nothing is uploaded.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
START_LIMIT_S = 300.0
PROMPT = {"prompt": "def read_file(", "max_tokens": 16, "temperature": 0}


def call(*command: str | Path, cwd: Path, quiet: bool = True) -> str:
    """What a command prints; ends this program if it fails."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=environment, capture_output=quiet, text=True)
    if done.returncode:
        raise SystemExit(
            f"failed: {' '.join(map(str, command))}\n{(done.stdout or '')[-4000:]}{(done.stderr or '')[-4000:]}"
        )
    return done.stdout or ""


def environment(folder: Path) -> Path:
    """Python of a new virtual environment."""
    call(sys.executable, "-m", "venv", folder, cwd=folder.parent)
    return folder / "bin" / "python"


def install(python: Path, *what: str | Path) -> None:
    """Install with pip."""
    call(python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *what, cwd=python.parents[2])


def committed(folder: Path) -> None:
    """The committed files, as of the checkout's HEAD."""
    archive = folder.parent / "source.tar"
    call("git", "archive", "--format=tar", "-o", archive, "HEAD", cwd=ROOT)
    folder.mkdir()
    call("tar", "-xf", archive, "-C", folder, cwd=folder)


def with_addresses(folder: Path, url: str) -> None:
    """Links that work outside the repository, and the project's addresses."""
    readme = folder / "README.md"
    text = readme.read_text("utf-8")
    text = re.sub(r"(!\[[^\]]*\]\()(?!https?:|#)", rf"\1{url}/raw/HEAD/", text)
    readme.write_text(re.sub(r"(?<!!)(\[[^\]]*\]\()(?!https?:|#)", rf"\1{url}/blob/HEAD/", text), "utf-8")
    project = folder / "pyproject.toml"
    pages = {"Repository": "", "Documentation": "/blob/HEAD/docs/README.md", "Changelog": "/blob/HEAD/CHANGELOG.md"}
    lines = "".join(f'{name} = "{url}{page}"\n' for name, page in pages.items())
    project.write_text(project.read_text("utf-8").replace("[project.urls]\n", f"[project.urls]\n{lines}"), "utf-8")


def mebibytes(folder: Path) -> float:
    """Size of all files in a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


def serve_from(python: Path, folder: Path) -> None:
    """Start the server of an installation in an empty folder, ask it, and stop it."""
    command = [
        python.parent / "apt-jax",
        "serve",
        "--port",
        "0",
        "--snapshot-file",
        "None",
        "--compilation-cache-dir",
        folder / "xla",
    ]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "APT_JAX_LOG_FORMAT": "json"}
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen([str(word) for word in command], cwd=folder, env=environment, stderr=log)
        try:
            limit, found = time.monotonic() + START_LIMIT_S, None
            while found is None:
                if process.poll() is not None or time.monotonic() > limit:
                    raise SystemExit("the server did not start:\n" + (folder / "log").read_text()[-4000:])
                time.sleep(0.2)
                found = re.search(r"answers at (\S+)/v1/completions", (folder / "log").read_text())
            request = urllib.request.Request(
                f"{found[1]}/v1/completions", json.dumps(PROMPT).encode(), {"content-type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=60) as reply:
                answer = json.load(reply)
            print(f"it serves: {PROMPT['prompt']!r} -> {answer['choices'][0]['text']!r}")
        finally:
            process.terminate()
            code = process.wait(60)
    if code:
        raise SystemExit(f"the server ended with {code}")


def main() -> None:
    """Build, check, install, serve."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", help="address of the repository, for links")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for sdist and wheel")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="apt-jax-release-") as name:
        work = Path(name)
        committed(work / "source")
        if asked.url:
            with_addresses(work / "source", asked.url.rstrip("/"))
        tools = environment(work / "tools")
        install(tools, "build", "twine")
        call(tools, "-m", "build", "--outdir", work / "dist", work / "source", cwd=work)
        built = sorted((work / "dist").iterdir())
        call(tools, "-m", "twine", "check", "--strict", *built, cwd=work)
        print("the description renders:", ", ".join(path.name for path in built))
        python = environment(work / "installed")
        before = mebibytes(work / "installed")
        (wheel,) = (path for path in built if path.suffix == ".whl")
        install(python, "-c", ROOT / "constraints.txt", wheel)
        print(f"installed: {mebibytes(work / 'installed') - before:.0f} MiB with bytecode, within constraints.txt")
        began = time.perf_counter()
        version = call(python.parent / "apt-jax", "--version", cwd=work).strip()
        print(f"{version} in {time.perf_counter() - began:.2f} s")
        (work / "empty").mkdir()
        serve_from(python, work / "empty")
        asked.out.mkdir(parents=True, exist_ok=True)
        for path in built:
            shutil.copy(path, asked.out)
    print(f"wrote {', '.join(str(asked.out / path.name) for path in built)}")


if __name__ == "__main__":
    main()
