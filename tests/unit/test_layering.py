"""Which package may import which. Scheduling is pure host code: the simulator runs it without jax and clock."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PURE = [
    *sorted((ROOT / "apt_jax" / "scheduling").rglob("*.py")),
    *sorted((ROOT / "apt_jax" / "routing").rglob("*.py")),
    ROOT / "apt_jax/cache.py",
    ROOT / "apt_jax/request.py",
]


def imported(path: Path) -> set[str]:
    """Top-level names of all packages that a file imports anywhere."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("path", PURE, ids=lambda path: path.name)
def test_scheduling_imports_neither_jax_nor_a_clock(path):
    assert not imported(path) & {"jax", "jaxlib", "flax", "time", "datetime", "asyncio", "threading"}


def test_importing_the_scheduler_does_not_import_jax():
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in PURE]
    script = f"import sys, {', '.join(modules)}; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def rooms(path: Path) -> set[str]:
    """Packages that a file imports anywhere: `serve`, `checkpoints` and `pallas_kernels`, else the top-level name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        for module in modules:
            first, second, *_ = [*module.split("."), ""]
            found.add(second if first == "apt_jax" and second in LINKED else first)
    return found


LINKED = ("serve", "checkpoints", "pallas_kernels")


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("pallas_kernels", {"apt_jax", "checkpoints", "serve", "flax"}),
        ("apt_jax", {"checkpoints", "serve", "starlette"}),
        ("checkpoints", {"serve"}),
    ],
)
def test_lower_packages_do_not_import_higher_ones(package, forbidden):
    found = {
        str(path.relative_to(ROOT)): rooms(path) & forbidden
        for path in sorted((ROOT / package).rglob("*.py"))
        if path != ROOT / "apt_jax" / "__init__.py"  # gives out LLM on first use
        and "bench" not in path.relative_to(ROOT).parts
    }
    assert {path: names for path, names in found.items() if names} == {}
