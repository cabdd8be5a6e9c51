"""The shape of the code: what may import what, where jit and platform names may stand, how long a file may be.

A rule is a function that returns what breaks it, by file. `EXCEPTIONS` are meant to stay, each with its reason; `OWED`
is what is still to be mended: it only gets shorter. A key that ends in / stands for all files below it.
"""

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from tests.support import import_graph
from tests.support.import_graph import LINKED, ROOT, Source, circles, sources

# From low to high. A file imports files of its own group and of lower rows; groups in one row do not know each other.
# A group is a list of folders and files; "folder/*" is what lies directly in it.
LAYERS = (
    ("pallas_kernels",),
    ("apt_jax/sampling",),
    ("apt_jax/*",),
    ("apt_jax/flags", "apt_jax/models", "apt_jax/tokenization"),
    ("apt_jax/scheduling",),
    ("apt_jax/batching", "apt_jax/routing"),
    ("apt_jax/cpu_kernels", "apt_jax/simulation"),
    ("apt_jax/attention",),
    ("apt_jax/execution",),
    ("apt_jax/engine",),
    ("checkpoints",),
    ("serve/errors.py serve/options.py serve/logs.py",),
    ("serve/json_text.py serve/line_file.py",),
    ("serve/runtime",),
    ("serve/openai",),
    ("serve/observability", "serve/batch"),
    ("serve/replicas",),
    ("serve/http",),
    ("serve/python",),
    ("serve/llm.py", "serve/bench"),
    ("pallas_kernels/bench",),
    ("serve/cli.py serve/__main__.py",),
    ("experiments",),
    ("tests",),
)
PURE = (
    *("apt_jax/scheduling/", "apt_jax/simulation/", "apt_jax/routing/", "apt_jax/sampling/"),
    *("apt_jax/cache.py", "apt_jax/request.py"),
)
IMPURE_MODULES = {"jax", "jaxlib", "flax", "time", "datetime", "asyncio", "threading"}
PLATFORMS = {"cpu", "gpu", "tpu", "cuda", "rocm"}
NO_POLICIES = ("catalogue.py", "interface.py", "packing.py", "swap_in.py")  # in scheduling/policies: what they share
NO_FAMILIES = (  # in models: what the families share
    "activations.py",
    "collectives.py",
    "interface.py",
    "kernels.py",
    "linear.py",
    "quantization.py",
    "sharding.py",
)
KERNELS = ("pallas_kernels/tpu/", "pallas_kernels/gpu/", "pallas_kernels/reference.py")
MAX_LINES, MAX_KERNEL_LINES, MAX_FILES = 400, 600, 12

type Breaches = dict[str, str]  # by file or folder: what is wrong there


def without_packages() -> Iterator[tuple[str, Source]]:
    """All files but the packages' `__init__`."""
    return ((path, source) for path, source in sources().items() if source.name != "__init__.py")


def no_import_circle() -> Breaches:
    files = dict(without_packages())
    edges = {path: (source.imported_files & files.keys()) - {path} for path, source in files.items()}
    return {path: f"circle of {', '.join(group)}" for group in circles(edges) for path in group}


def layer_of(path: str) -> tuple[int, str] | None:
    """Row and group of a file; the longest name that fits decides."""
    fitting = [
        (len(name), row, group)
        for row, groups in enumerate(LAYERS)
        for group in groups
        for name in group.split()
        if path == name
        or path.startswith(f"{name}/")
        or (name.endswith("/*") and path.rsplit("/", 1)[0] == name.removesuffix("/*"))
    ]
    return max(fitting)[1:] if fitting else None


def imports_only_lower_layers() -> Breaches:
    found: dict[str, list[str]] = {}
    for path, source in sources().items():
        if path in ("apt_jax/__init__.py", "apt_jax/__main__.py"):  # give out LLM on first use, and the command
            continue
        layer = layer_of(path)
        if layer is None:
            if source.tree.body:
                found.setdefault(path, []).append("a file of no layer: give its folder one")
            continue
        for target in sorted(source.imported_files):
            other = layer_of(target)
            if other is not None and (other[0] > layer[0] or (other[0] == layer[0] and other[1] != layer[1])):
                found.setdefault(path, []).append(target)
    return {path: ", ".join(targets) for path, targets in found.items()}


def linked_folders_are_imported_as_apt_jax() -> Breaches:
    found = {}
    for path, source in sources().items():
        names = {module for module in source.imported_modules if module.split(".")[0] in LINKED}
        if names:
            found[path] = ", ".join(sorted(names))
    return found


def policies_do_not_import_each_other() -> Breaches:
    folder = "apt_jax/scheduling/policies/"

    def policy(path: str) -> str | None:
        """Name of the policy that a file belongs to; apt has a folder."""
        name = path.removeprefix(folder).split("/")[0]
        return name if path.startswith(folder) and name not in (*NO_POLICIES, "__init__.py") else None

    found = {}
    for path, source in sources().items():
        own = policy(path)
        others = {other for target in source.imported_files if (other := policy(target)) not in (None, own)}
        if own is not None and others:
            found[path] = ", ".join(sorted(filter(None, others)))
    return found


def pure_host_code_imports_neither_jax_nor_a_clock() -> Breaches:
    found = {}
    for path, source in sources().items():
        names = {module.split(".")[0] for module in source.imported_modules} & IMPURE_MODULES
        if path.startswith(PURE) and names:
            found[path] = ", ".join(sorted(names))
    return found


def of_product(path: str) -> bool:
    return not path.startswith(("tests/", "experiments/", "pallas_kernels/bench/"))


def only_the_registry_imports_a_model_family() -> Breaches:
    def of_family(path: str) -> bool:
        folder, name = path.rsplit("/", 1)
        return name != "__init__.py" and (
            folder == "checkpoints/mappings" or (folder == "apt_jax/models" and name not in NO_FAMILIES)
        )

    found = {}
    for path, source in sources().items():
        named = sorted(filter(of_family, source.imported_files))
        if named and of_product(path) and path != "checkpoints/families.py" and not of_family(path):
            found[path] = ", ".join(named)
    return found


def only_execution_compiles() -> Breaches:
    found = {}
    for path, source in sources().items():
        if not of_product(path) or path.startswith("apt_jax/execution/"):
            continue
        lines = [
            node.lineno
            for node in source.nodes
            if isinstance(node, ast.Attribute) and node.attr in ("jit", "pjit") and ast.unparse(node.value) != "self"
        ]
        if lines or {"jax.jit", "flax.nnx.jit"} & source.imported_modules:
            found[path] = f"jit in lines {lines}"
    return found


def only_execution_names_platforms() -> Breaches:
    found = {}
    for path, source in sources().items():
        if not of_product(path) or path.startswith("apt_jax/execution/"):
            continue
        lines = sorted({n.lineno for n in source.nodes if isinstance(n, ast.Constant) and n.value in PLATFORMS})
        if lines:
            found[path] = f"names a platform in lines {lines}"
    return found


def serve_does_not_reach_into_the_engine() -> Breaches:
    found = {}
    for path, source in sources().items():
        reached = sorted(
            f"{ast.unparse(node)} in line {node.lineno}"
            for node in source.nodes
            if isinstance(node, ast.Attribute)
            and node.attr in ("state", "runner")
            and ast.unparse(node.value).endswith("engine")
        )
        if path.startswith("serve/") and reached:
            found[path] = ", ".join(reached)
    return found


def files_are_short() -> Breaches:
    limits = {path: MAX_KERNEL_LINES if path.startswith(KERNELS) else MAX_LINES for path in sources()}
    return {
        path: f"{source.num_lines} lines, at most {limits[path]}"
        for path, source in sources().items()
        if source.num_lines > limits[path]
    }


def folders_are_small() -> Breaches:
    counts = Counter(path.rsplit("/", 1)[0] + "/" for path, _ in without_packages())
    return {folder: f"{count} files, at most {MAX_FILES}" for folder, count in counts.items() if count > MAX_FILES}


EXCEPTIONS: dict[Callable[[], Breaches], dict[str, str]] = {
    only_the_registry_imports_a_model_family: {
        "apt_jax/execution/forms/native.py": "runs OPT's layers in C++, and no others",
        "checkpoints/demo_training/": "trains an OPT",
    },
    only_execution_compiles: {
        "pallas_kernels/dispatch.py": "the self-check at start-up compiles each kernel once",
        "checkpoints/formats/dummy.py": "dummy weights are made on the device that will hold them",
        "checkpoints/demo_training/": "trains the bundled model",
    },
    only_execution_names_platforms: {
        "pallas_kernels/dispatch.py": "which kernels exist for which platform",
        "apt_jax/cpu_kernels/": "XLA is told which platform the C++ kernels are for",
        "checkpoints/formats/torch_reader.py": "torch's name of the host",
        "apt_jax/host_limits.py": "a controller of Linux control groups has that name",
    },
    folders_are_small: {
        "tests/": "a tier's folder is flat: a file for each thing tested, found by its name",
    },
}
OWED: dict[Callable[[], Breaches], dict[str, str]] = {}
RULES = [
    no_import_circle,
    imports_only_lower_layers,
    linked_folders_are_imported_as_apt_jax,
    policies_do_not_import_each_other,
    pure_host_code_imports_neither_jax_nor_a_clock,
    only_the_registry_imports_a_model_family,
    only_execution_compiles,
    only_execution_names_platforms,
    serve_does_not_reach_into_the_engine,
    files_are_short,
    folders_are_small,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule):
    known = (*EXCEPTIONS.get(rule, {}), *OWED.get(rule, {}))
    assert {path: what for path, what in rule().items() if not path.startswith(known)} == {}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_no_exception_is_out_of_date(rule):
    breaches = rule()
    known = (*EXCEPTIONS.get(rule, {}), *OWED.get(rule, {}))
    assert [key for key in known if not any(path.startswith(key) for path in breaches)] == []


LONG = "x = 1\n" * (MAX_LINES + 1)
PLANTED = {
    no_import_circle: {
        "apt_jax/engine/a.py": "def f():\n    from apt_jax.engine import b",
        "apt_jax/engine/b.py": "if TYPE_CHECKING:\n    from apt_jax.engine.c import C",
        "apt_jax/engine/c.py": "import apt_jax.engine.a",
    },
    imports_only_lower_layers: {
        "pallas_kernels/a.py": "from apt_jax.request import Slo",
        "apt_jax/request.py": "from apt_jax.scheduling.plan import Plan",
        "apt_jax/scheduling/plan.py": "from apt_jax.serve import errors",
        "serve/errors.py": "from apt_jax.serve.llm import LLM",
        "serve/llm.py": "from apt_jax.serve.bench import work",
        "serve/bench/work.py": "from apt_jax.pallas_kernels.bench import timing",
        "apt_jax/new_folder/a.py": "x = 1",
        "pallas_kernels/bench/timing.py": "",
    },
    linked_folders_are_imported_as_apt_jax: {
        "tests/unit/test_a.py": "def f():\n    import serve.errors",
        "experiments/a.py": "from checkpoints import load",
    },
    policies_do_not_import_each_other: {
        "apt_jax/scheduling/policies/edf.py": "from apt_jax.scheduling.policies.apt.policy import Apt",
        "apt_jax/scheduling/policies/apt/policy.py": "from apt_jax.scheduling.policies import edf",
    },
    pure_host_code_imports_neither_jax_nor_a_clock: {
        "apt_jax/cache.py": "def f():\n    import time",
        "apt_jax/simulation/a.py": "from jax import numpy",
    },
    only_the_registry_imports_a_model_family: {
        "apt_jax/engine/a.py": "from apt_jax.models.new import New",
        "checkpoints/a.py": "from apt_jax.checkpoints.mappings.new import MAPPING",
        "apt_jax/models/new.py": "",
        "checkpoints/mappings/new.py": "",
    },
    only_execution_compiles: {
        "apt_jax/models/a.py": "@partial(jax.jit, static_argnums=1)\ndef f(): ...",
        "checkpoints/a.py": "from jax import jit",
    },
    only_execution_names_platforms: {"apt_jax/engine/a.py": "x = device.platform == 'tpu'"},
    serve_does_not_reach_into_the_engine: {
        "serve/http/a.py": "x = self._engine.state",
        "serve/runtime/a.py": "engine.runner.close()",
    },
    files_are_short: {"apt_jax/engine/a.py": LONG},
    folders_are_small: {f"serve/http/a{number}.py": "" for number in range(MAX_FILES + 1)},
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_rule_finds_what_breaks_it(rule, monkeypatch):
    """Every planted file that is not empty breaks its rule."""
    planted = {path: Source(path, ast.parse(text), len(text.splitlines())) for path, text in PLANTED[rule].items()}
    for module in (import_graph, sys.modules[__name__]):
        monkeypatch.setattr(module, "sources", lambda: planted)
    monkeypatch.setattr(import_graph, "file_of", import_graph.file_of.__wrapped__)  # which remembers the real files
    expected = {path for path, text in PLANTED[rule].items() if text}
    assert set(rule()) == (expected or {"serve/http/"})


def test_importing_the_scheduler_does_not_import_jax():
    paths = [path for path in sources() if path.startswith(PURE) and path != "apt_jax/simulation/__main__.py"]
    modules = [path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in paths]
    script = f"import sys, {', '.join(modules)}; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
