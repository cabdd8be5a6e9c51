"""Folders kept from start to start, and starts where there can be none."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from apt_jax.files import kept_folder
from apt_jax.serve.runtime.starting.compile_cache import use_compile_cache

# Prints the folders that a start would use for compiled programs and kernels.
FOLDERS = """
from pathlib import Path
from apt_jax.files import kept_folder
from apt_jax.serve.runtime.starting.compile_cache import use_compile_cache
for folder in (use_compile_cache(None), kept_folder(Path("~/.cache/kernels"), "the CPU kernels")):
    (folder / "file").touch()
    print(folder)
"""


@pytest.fixture
def jax_cache():
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_where_the_home_folder_cannot_be_written_a_temporary_one_is_used(tmp_path):
    home = tmp_path / "home"
    home.write_text("a file: nothing can be made below it, not even by root")
    env = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"} | {
        "HOME": str(home)
    }
    done = subprocess.run([sys.executable, "-c", FOLDERS], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    folders = [Path(line) for line in done.stdout.splitlines()]
    assert len(folders) == 2 and not any(folder.exists() for folder in folders), "removed when the process ended"
    assert "compiled programs are not kept for the next start" in done.stderr and str(home) in done.stderr


def test_without_a_home_folder_a_temporary_one_is_used(monkeypatch, caplog):
    def no_home(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", no_home)
    folder = kept_folder(Path("~/.cache/apt-jax"), "compiled programs")
    assert folder.is_dir() and os.access(folder, os.W_OK)
    assert "compiled programs are not kept for the next start: Could not determine home directory" in caplog.text


def test_a_folder_that_cannot_be_written_is_read_if_there_is_something_in_it(monkeypatch, tmp_path):
    monkeypatch.setattr("apt_jax.files.os.access", lambda *args: False)
    assert kept_folder(tmp_path, "compiled programs") != tmp_path
    (tmp_path / "program").touch()
    assert kept_folder(tmp_path, "compiled programs") == tmp_path


def test_a_folder_that_was_named_and_cannot_be_made_is_refused(monkeypatch, tmp_path, jax_cache):
    (tmp_path / "file").touch()
    for named in (lambda name: use_compile_cache(name), lambda name: use_compile_cache(None)):
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "file/cache"))
        with pytest.raises(ValueError, match=r"file/cache for compiled programs \(Not a directory\); choose another"):
            named(str(tmp_path / "file/cache"))
