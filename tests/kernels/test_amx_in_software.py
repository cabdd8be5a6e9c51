"""Products by AMX on processors that lack it: its instructions are loops then, which check what they are given."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("amx.cc")


def test_products_by_amx_are_those_of_plain_loops(tmp_path):
    if platform.machine() != "x86_64":
        pytest.skip(f"{platform.machine()} is no x86 processor, whose headers these are")
    compiler = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    program = tmp_path / "amx"
    command = [compiler, "-O1", "-std=c++20", "-march=skylake-avx512", "-pthread", "-o", str(program), str(SOURCE)]
    if "avx512f" not in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        command.remove("-march=skylake-avx512")
    subprocess.run(command, check=True)
    subprocess.run([program], check=True)
