"""What the deploy files and the docs tell an operator to type exists."""

import configparser
import dataclasses
import re
from pathlib import Path

import pytest

from apt_jax.config import EngineConfig
from serve.options import LoadOptions, ServerOptions

ROOT = Path(__file__).parent.parent
FLAGS = {
    f"--{field.name.replace('_', '-')}"
    for kind in (EngineConfig, LoadOptions, ServerOptions)
    for field in dataclasses.fields(kind)
}
FLAGS |= {f"--no-{flag[2:]}" for flag in FLAGS}
OTHER_TOOLS = {
    "Dockerfile": {"--target", "--rm", "--create-home", "--uid", "--interval", "--timeout", "--start-period"},
    "deploy/compose.yaml": {"--build"},
    "deploy/apt-jax.service": {"--system", "--create-home", "--home-dir", "--now"},
    "docs/http_api.md": set(),
}


@pytest.mark.parametrize("name", OTHER_TOOLS)
def test_every_flag_exists(name):
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", (ROOT / name).read_text()))
    assert named - OTHER_TOOLS[name] <= FLAGS


def test_the_unit_gives_the_server_longer_to_stop_than_its_requests():
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str
    unit.read(ROOT / "deploy" / "apt-jax.service")
    grace_s = int(re.search(r"--shutdown-timeout (\d+)", unit["Service"]["ExecStart"])[1])
    assert int(unit["Service"]["TimeoutStopSec"]) > grace_s + 5


def test_the_image_copies_every_package_that_the_wheel_has():
    packages = re.search(r"packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text())[1]
    copied = (ROOT / "Dockerfile").read_text()
    for package in re.findall(r'"(\w+)"', packages):
        assert f"COPY {package} {package}" in copied or f"COPY {package[:-1]}[{package[-1]}] {package}" in copied
