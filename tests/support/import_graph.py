"""Which file of the repository imports which, read from the sources: lazy and TYPE_CHECKING imports count too."""

import ast
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("apt_jax", "pallas_kernels", "checkpoints", "serve", "experiments", "tests")
LINKED = ("serve", "checkpoints", "pallas_kernels")  # top-level folders that are imported as apt_jax.NAME


@dataclass(frozen=True)
class Source:
    """A parsed file; `path` is relative to the repository, with the folders as they are in git."""

    path: str
    tree: ast.Module
    num_lines: int

    @property
    def name(self) -> str:
        """The file's name without folders."""
        return self.path.rsplit("/", 1)[-1]

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """All nodes of the tree."""
        return list(ast.walk(self.tree))

    @cached_property
    def imported_modules(self) -> set[str]:
        """Dotted names of all that it imports anywhere; `from a import b` is `a.b`, whether b is a module or not."""
        found: set[str] = set()
        for node in self.nodes:
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{self.path} line {node.lineno} has a relative import"
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
        return found

    @cached_property
    def imported_files(self) -> set[str]:
        """Paths of the files of this repository that it imports. Only a package's own `__init__` may be missing."""
        return {path for module in self.imported_modules if (path := file_of(module)) is not None}


@cache
def sources() -> dict[str, Source]:
    """Every Python file of the repository by its path."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):  # does not follow the links in apt_jax/
            text = path.read_text(encoding="utf-8")
            name = path.relative_to(ROOT).as_posix()
            found[name] = Source(name, ast.parse(text), len(text.splitlines()))
    return found


@cache
def file_of(module: str) -> str | None:
    """The file of a module, or of the module that a name comes from; None if it is not of this repository."""
    parts = module.split(".")
    if parts[0] == "apt_jax" and len(parts) > 1 and parts[1] in LINKED:
        parts = parts[1:]
    for stem in ("/".join(parts), "/".join(parts[:-1])):
        for path in (f"{stem}.py", f"{stem}/__init__.py"):
            if path in sources():
                return path
    return None


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of files that reach each other (strongly connected components of more than one file), each sorted."""
    reach = {path: _reachable(path, edges) for path in edges}
    groups = {frozenset({path, *(other for other in reach[path] if path in reach[other])}) for path in edges}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def _reachable(start: str, edges: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    stack = [start]
    while stack:
        for path in edges.get(stack.pop(), set()) - seen:
            seen.add(path)
            stack.append(path)
    return seen
