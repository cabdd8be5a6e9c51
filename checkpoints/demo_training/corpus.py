"""The demo model's training text: documentation and short functions of the Python standard library.

Everything read here ships with CPython under the PSF License Agreement. A source file that names any other
copyright holder or licence is left out whole, and so are tests, data tables, and bundled third-party code.
"""

import ast
import dataclasses
import hashlib
import importlib
import inspect
import re
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path

SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__", "ensurepip", "encodings", "idle_test", "idlelib", "lib2to3", "pydoc_data",
        "site-packages", "test", "tests", "turtledemo",
    }
)  # fmt: skip
SKIPPED_FILES = frozenset({"html/entities.py", "this.py", "antigravity.py", "_sysconfigdata"})
LONGEST_FUNCTION = 40  # lines; of a longer function only the signature and the docstring are kept
SHORTEST_DOCUMENT = 40  # characters
HELD_OUT = 0.02

_NOTICE = re.compile(r"copyright|licen[sc]e|all rights reserved|\(c\)\s*\d{4}", re.IGNORECASE)
_ASCII_QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2026": "..."})
_PSF = re.compile(r"Python Software Foundation|\bPSFL?\b")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents for training and, apart from them, for validation, with the facts of their source."""

    train: list[str]
    validation: list[str]
    python_version: str
    files_read: int
    files_left_out: int
    license_text: str


def build_corpus() -> Corpus:
    """Collect the text from the running interpreter's standard library; same interpreter, same result.

    A unit (a topic, a module's text, a function, a class) lies wholly in training or in validation, with
    every form in which its docstring appears; a text that was already seen is dropped.

    Raises:
        FileNotFoundError: this Python's library folder has no LICENSE.txt (some distributions move it).
    """
    units = list(_topics())
    files_read = files_left_out = 0
    root = Path(sysconfig.get_path("stdlib"))
    license_text = (root / "LICENSE.txt").read_text(encoding="utf-8")
    for path in _library_files(root):
        source = path.read_text(encoding="utf-8")
        if _names_other_owner(source):
            files_left_out += 1
            continue
        files_read += 1
        units.extend(_module_units(source))
    units.extend(_compiled_docstrings())

    seen: set[str] = set()
    train: list[str] = []
    validation: list[str] = []
    for unit in units:
        key = hashlib.sha256(re.sub(r"\W+", " ", unit[-1]).encode()).hexdigest()
        if key in seen:
            continue
        seen.add(key)
        held_out = int(key[:8], 16) < HELD_OUT * 2**32
        texts = [_tidy(text) for text in unit]
        (validation if held_out else train).extend(t for t in texts if len(t) >= SHORTEST_DOCUMENT)
    return Corpus(train, validation, sys.version.split()[0], files_read, files_left_out, license_text)


def _library_files(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.intersection(relative.parts[:-1]) or relative.parts[0].startswith("config-"):
            continue
        if any(relative.as_posix().startswith(name) for name in SKIPPED_FILES):
            continue
        yield path


def _names_other_owner(source: str) -> bool:
    return any(_NOTICE.search(line) and not _PSF.search(line) for line in source.splitlines())


def _topics() -> Iterator[tuple[str, ...]]:
    """Chapters of the language reference, as `help("...")` shows them."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield (topics[name],)


def _module_units(source: str) -> Iterator[tuple[str, ...]]:
    """The module's own text, then its functions and classes: `(docstring, code)`, or `(code,)`."""
    tree = ast.parse(source)
    head = ast.get_docstring(tree)
    if head:
        yield (head,)
    yield from _definitions(tree, source.splitlines())


def _definitions(parent: ast.AST, lines: list[str]) -> Iterator[tuple[str, ...]]:
    """What is kept whole is not entered, so that no text comes twice."""
    for node in ast.iter_child_nodes(parent):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from _definitions(node, lines)
            continue
        docstring = ast.get_docstring(node)
        code, whole = _code(node, lines, docstring)
        if code:
            yield (docstring, code) if docstring and len(docstring) > 80 else (code,)
        if not whole:
            yield from _definitions(node, lines)


def _code(
    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, lines: list[str], docstring: str | None
) -> tuple[str | None, bool]:
    """A short definition, whole (True); of a long one the signature and docstring, if it has any (False)."""
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
    last = node.end_lineno or node.lineno
    whole = last - first <= LONGEST_FUNCTION
    if not whole:
        last = node.body[0].end_lineno or last
        if not docstring or last - first > 2 * LONGEST_FUNCTION:
            return None, False
    return textwrap.dedent("\n".join(lines[first:last])), whole


def _compiled_docstrings() -> Iterator[tuple[str, ...]]:
    """Docstrings of builtins and of modules written in C: `name(arguments)`, a newline, the text."""
    for module_name in sorted(sys.stdlib_module_names):
        if module_name in sys.builtin_module_names or module_name in (
            "math",
            "array",
            "zlib",
            "_socket",
            "_csv",
        ):
            module = importlib.import_module(module_name)
            for name, member in sorted(vars(module).items()):
                yield from _member_docstrings(name, member)
                if inspect.isclass(member):
                    for inner, method in sorted(vars(member).items()):
                        yield from _member_docstrings(f"{name}.{inner}", method)


def _member_docstrings(name: str, member: object) -> Iterator[tuple[str, ...]]:
    if name.startswith("_") or "._" in name or not callable(member):
        return
    text = inspect.getdoc(member)
    if text and not _NOTICE.search(text):
        try:
            signature = str(inspect.signature(member))
        except (TypeError, ValueError):
            signature = "(...)"
        yield (f"{name}{signature}\n\n{text}",)


def _tidy(text: str) -> str:
    """Unix newlines, no tabs or trailing blanks, no rulers, at most one empty line in a row."""
    text = text.expandtabs(8).replace("\r\n", "\n").translate(_ASCII_QUOTES)
    text = re.sub(r"^[ #]*[-=*~^#+]{4,}[ #]*$\n?", "", text, flags=re.MULTILINE)
    text = re.sub(r"[ \t\f]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")
