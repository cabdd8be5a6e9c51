"""What a user installs: one name at the top, in a wheel, from an sdist and editable, beside files of their own."""

import email
import io
import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging import requirements, utils
from readme_renderer import markdown

ROOT = Path(__file__).parents[2]
# of a user, in the folder that they work in; each says so if it is imported in place of a part of the package
OWN_FILES = ("serve.py", "checkpoints.py", "pallas_kernels.py", "tests/__init__.py", "tests/support.py")
IMPORTS = """
import apt_jax, importlib.metadata
from apt_jax import LLM, SamplingParams
import apt_jax.checkpoints.load, apt_jax.pallas_kernels.dispatch
print(LLM.__module__, SamplingParams(max_tokens=3).max_tokens, importlib.metadata.version("apt-jax"))
print(apt_jax.__file__)
"""


def call(*command: str | Path, cwd: Path, code: int = 0) -> str:
    """Run a command without this process's import path; returns all that it printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment["JAX_PLATFORMS"] = "cpu"
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def pip(*arguments: str | Path, cwd: Path) -> None:
    call(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, cwd=cwd)


def built_wheel(source: Path, folder: Path) -> Path:
    pip("wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", folder, source, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return built_wheel(ROOT, tmp_path_factory.mktemp("wheel"))


def fresh_environment(folder: Path, wheel: Path) -> Path:
    """Python of a new virtual environment with the package, which finds the dependencies where these tests do."""
    call(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    pip("--python", python, "install", "--no-deps", "--no-index", "--no-compile", wheel, cwd=folder.parent)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")  # whose own .pth files do not count
    return python


@pytest.fixture
def user_folder(tmp_path) -> Path:
    folder = tmp_path / "work"
    for name in OWN_FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"print('the own {name}')\n")
    return folder


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_a_wheel_puts_one_name_into_site_packages(wheel):
    with zipfile.ZipFile(wheel) as archive:
        top = {name.split("/")[0] for name in archive.namelist()}
    (metadata,) = (name for name in top if name.endswith(".dist-info"))
    assert top == {"apt_jax", metadata}


def test_a_wheel_holds_all_source_and_data_files(wheel):
    tracked = call("git", "ls-files", "apt_jax", "serve", "checkpoints", "pallas_kernels", cwd=ROOT).splitlines()
    linked = {"apt_jax/serve", "apt_jax/checkpoints", "apt_jax/pallas_kernels"}
    expected = {name if name.startswith("apt_jax/") else f"apt_jax/{name}" for name in tracked} - linked
    missing = {name for name in expected - names_in(wheel) if (ROOT / name).exists()}
    assert not missing


def test_its_metadata_has_licences_addresses_and_a_description_that_renders(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
        licences = [name for name in archive.namelist() if ".dist-info/licenses/" in name]
    assert {Path(licence).name for licence in licences} == {"LICENSE", "PYTHON_LICENSE.txt", "README.md"}
    assert metadata.get_all("Project-URL") and metadata["Description-Content-Type"] == "text/markdown"
    problems = io.StringIO()
    assert markdown.render(str(metadata.get_payload()), stream=problems), problems.getvalue()


def test_the_constraints_are_versions_within_the_ranges_and_name_no_host():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {utils.canonicalize_name(name): pinned for name, _, pinned in (line.partition("==") for line in lines)}
    assert all(pins.values()) and not any(mark in line for line in lines for mark in ("://", "@", "--"))
    for text in project["dependencies"]:
        asked = requirements.Requirement(text)
        assert pins[utils.canonicalize_name(asked.name)] in asked.specifier, text


def test_the_command_imports_little(tmp_path):
    code = (
        "import sys, apt_jax.serve.cli; from apt_jax.serve.cli import read_command; read_command(['serve']);"
        "print(sorted({'jax', 'numpy', 'transformers', 'scipy'} & set(sys.modules)))"
    )
    assert call(sys.executable, "-c", code, cwd=ROOT).strip() == "[]"


def test_it_works_beside_files_of_the_same_names(wheel, user_folder, tmp_path):
    python = fresh_environment(tmp_path / "environment", wheel)
    printed = call(python, "-c", IMPORTS, cwd=user_folder)
    assert printed.startswith("apt_jax.serve.llm 3 ")
    assert Path(printed.splitlines()[-1]).is_relative_to(tmp_path / "environment")
    assert "run-batch" in call(python.parent / "apt-jax", "--help", cwd=user_folder)
    assert "kernels" in call(python, "-m", "apt_jax.serve.cli", "bench", "--help", cwd=user_folder)
    assert call(python, "-c", "import serve", cwd=user_folder) == "the own serve.py\n"


def test_an_editable_install_takes_the_files_of_the_checkout(user_folder, tmp_path):
    build = f"from hatchling.build import build_editable; build_editable({str(tmp_path)!r})"  # what pip install -e does
    call(sys.executable, "-c", build, cwd=ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    python = fresh_environment(tmp_path / "environment", wheel)
    printed = call(python, "-c", IMPORTS, cwd=user_folder)
    assert printed.startswith("apt_jax.serve.llm 3 ")
    assert Path(printed.splitlines()[-1]) == ROOT / "apt_jax" / "__init__.py"
    assert call(python, "-c", "import serve", cwd=user_folder) == "the own serve.py\n"


def test_an_sdist_gives_the_same_wheel(wheel, tmp_path):
    call(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", tmp_path, cwd=ROOT)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "Makefile"} <= names
    assert names_in(built_wheel(sdist, tmp_path)) == names_in(wheel)


@pytest.mark.parametrize("name", ["serve", "checkpoints", "pallas_kernels"])
def test_lint_refuses_a_second_copy_of_a_module(name, tmp_path):
    """In a checkout `import serve` works, and gives other classes than `import apt_jax.serve`."""
    ruff = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--no-cache",
        "--select",
        "TID251",
        "--config",
        ROOT / "pyproject.toml",
    ]
    for statement, code in (
        (f"import {name}", 1),
        (f"from {name}.errors import E", 1),
        (f"from {name} import errors", 1),
        (f"import apt_jax.{name}", 0),
        (f"from apt_jax import {name}", 0),
    ):
        path = tmp_path / "some.py"
        path.write_text(f"{statement}\n")
        assert ("TID251" in call(*ruff, path, cwd=tmp_path, code=code)) == bool(code)
