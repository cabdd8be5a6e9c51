"""Do the tests notice a wrong decision? Single mutations of given files, each tried against given tests.

`python -m experiments.mutations apt_jax/routing/*.py --tests tests/unit/test_routing.py --sample 100` changes one
comparison, operator, constant, branch or statement at a time and runs the tests in a forked process in which an import
hook gives out the changed module; no file is written. A mutation that no test notices is printed: the tests lack a
case, the code lacks a need for what was changed, or both versions mean the same. Messages, annotations, assertions and
long tables of numbers are left alone.
"""

import argparse
import ast
import importlib.abc
import importlib.machinery
import importlib.util
import os
import random
import signal
import sys
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Pow: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.Mod: ast.Mult,
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "floor": "ceil", "ceil": "floor"}
PRELOADED = ("hypothesis", "numpy", "pytest", "scipy.optimize")  # once for all runs; never what is mutated


@dataclass(frozen=True)
class Mutation:
    """One changed place of a file: `code` is compiled in place of `path`."""

    path: Path
    line: int
    what: str
    code: CodeType

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.what}"


class Mutator:
    """The mutations of one file: `change` is called with each place, and undone after the caller has compiled."""

    def __init__(self, path: Path):
        self._path = path
        self._tree = ast.parse(path.read_text(encoding="utf-8"))

    def mutations(self) -> Iterator[Mutation]:
        """All of them, in the order of the source."""
        yield from self._within(self._tree)

    def _within(self, node: ast.AST) -> Iterator[Mutation]:
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "type_params", "decorator_list"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and not _is_left_alone(child):
                    yield from self._of(child)
                    yield from self._within(child)
            if field in ("body", "orelse", "finalbody") and isinstance(value, list):
                yield from self._dropped(value)

    def _of(self, node: ast.AST) -> Iterator[Mutation]:
        match node:
            case ast.Compare(ops=ops):
                for index, operator in enumerate(ops):
                    yield from self._swap(node, ops, index, COMPARISONS[type(operator)]())
            case ast.BinOp(op=operator) | ast.AugAssign(op=operator) if type(operator) in OPERATORS:
                yield from self._set(node, "op", OPERATORS[type(operator)]())
            case ast.BoolOp(op=operator):
                yield from self._set(node, "op", ast.And() if isinstance(operator, ast.Or) else ast.Or())
            case ast.UnaryOp(op=ast.Not()):
                yield from self._set(node, "op", ast.UAdd())
            case ast.Constant(value=bool(value)):
                yield from self._set(node, "value", not value)
            case ast.Constant(value=int(value)) | ast.Constant(value=float(value)):
                yield from self._set(node, "value", value + 1 if isinstance(value, int) else 2 * value or 1.0)
            case ast.Name(id=name) if name in NAMES:
                yield from self._set(node, "id", NAMES[name])
            case ast.Attribute(attr=name) if name in NAMES:
                yield from self._set(node, "attr", NAMES[name])
        if isinstance(node, ast.If | ast.IfExp | ast.While) and ast.unparse(node.test) != "TYPE_CHECKING":
            yield from self._set(node, "test", ast.UnaryOp(ast.Not(), node.test))
        if isinstance(node, ast.comprehension):
            for index, test in enumerate(node.ifs):
                yield from self._swap(node, node.ifs, index, ast.UnaryOp(ast.Not(), test))

    def _dropped(self, body: list[ast.stmt]) -> Iterator[Mutation]:
        for index, statement in enumerate(body):
            is_docstring = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
            is_state = isinstance(statement, ast.Assign) and not isinstance(statement.targets[0], ast.Name)
            is_effect = is_state or isinstance(statement, ast.Expr | ast.AugAssign | ast.Continue | ast.Break)
            if is_effect and not is_docstring:
                yield from self._swap(statement, body, index, ast.Pass(), "dropped: ")

    def _set(self, node: ast.AST, field: str, value: object) -> Iterator[Mutation]:
        old, before = getattr(node, field), ast.unparse(node)
        yield from self._changed(node, before, lambda: setattr(node, field, value), lambda: setattr(node, field, old))

    def _swap(self, node: ast.AST, values: list[Any], index: int, value: ast.AST, what: str = "") -> Iterator[Mutation]:
        old, before = values[index], ast.unparse(node)

        def put(new: ast.AST) -> None:
            values[index] = new

        yield from self._changed(node, before, lambda: put(value), lambda: put(old), what)

    def _changed(
        self, node: ast.AST, before: str, change: Callable[[], None], undo: Callable[[], None], what: str = ""
    ) -> Iterator[Mutation]:
        change()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                code = compile(ast.fix_missing_locations(self._tree), str(self._path), "exec")
            after = "" if what else f"  ->  {_head(ast.unparse(node))}"
        except SyntaxError:  # for example a nonlocal without its variable
            return
        finally:
            undo()
        line = getattr(node, "lineno", 0) or getattr(getattr(node, "target", None), "lineno", 0)
        yield Mutation(self._path, line, f"{what}{_head(before)}{after}", code)


def _is_left_alone(node: ast.AST) -> bool:
    """Messages, assertions, and edges of histograms: tables of many numbers."""
    if isinstance(node, ast.Tuple):
        return len(node.elts) > 4 and all(isinstance(element, ast.Constant) for element in node.elts)
    return isinstance(node, ast.JoinedStr | ast.Raise | ast.Assert)


def _head(text: str) -> str:
    first, _, rest = text.partition("\n")
    return first[:160] + ("" if not rest and len(first) <= 160 else " ...")


class Hook(importlib.abc.MetaPathFinder):
    """Gives out the mutated module."""

    def __init__(self, mutation: Mutation):
        self._mutation = mutation
        self._name = ".".join(mutation.path.with_suffix("").parts)

    def find_spec(self, name: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        """The module's, if it is the one."""
        if name != self._name:
            return None
        code = self._mutation.code

        class Loader(importlib.machinery.SourceFileLoader):
            def get_code(self, fullname: str) -> CodeType:
                return code

        file = str(self._mutation.path.resolve())
        return importlib.util.spec_from_file_location(name, file, loader=Loader(name, file))


def is_noticed(mutation: Mutation | None, options: Sequence[str], limit_s: float) -> bool:
    """Whether the tests fail, or do not end, with `mutation`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child = os.fork()
    if not child:
        status = 1
        try:
            os.setsid()
            if mutation is not None:
                sys.meta_path.insert(0, Hook(mutation))
                silent = os.open(os.devnull, os.O_RDWR)
                for stream in range(3):
                    os.dup2(silent, stream)
            import pytest

            status = int(pytest.main(list(options)))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    end_s = time.monotonic() + limit_s
    while time.monotonic() < end_s:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status != 0
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def _module_path(text: str) -> Path:
    """The path by which a file is imported: serve, checkpoints and pallas_kernels are links in apt_jax."""
    path = Path(text)
    linked = "apt_jax" / path
    return linked if path.parts[0] != "apt_jax" and linked.exists() else path


def main() -> int:
    """Print survivors and a table by file; the exit code is 1 if the tests fail without a mutation."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="+", type=_module_path, help="relative to the repository's root")
    parser.add_argument("--tests", nargs="+", required=True)
    parser.add_argument("--sample", type=int, help="mutations tried in all; default: every one")
    parser.add_argument("--only", nargs="+", help="try those drawn of these files alone, with tests of their own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit-s", type=float, default=60.0, help="a run that takes longer counts as noticed")
    parser.add_argument("--preload", nargs="*", default=[], help="packages that the tests load anyway, such as jax")
    args = parser.parse_args()
    for name in (*PRELOADED, *args.preload):
        importlib.import_module(name)
    from hypothesis import settings

    settings.register_profile("mutations", deadline=None, derandomize=True, database=None)
    settings.load_profile("mutations")
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # loading them takes longer than the tests
    quiet = ["-x", "-q", "-p", "no:cacheprovider", "-p", "pytest_timeout", "--noconftest"]
    options = [*quiet, "-W", "ignore::pytest.PytestAssertRewriteWarning", *args.tests]
    if is_noticed(None, options, args.limit_s):
        print("the tests fail without any mutation")
        return 1
    found = [mutation for path in args.files for mutation in Mutator(path).mutations()]
    if args.sample is not None and args.sample < len(found):
        found = [found[i] for i in sorted(random.Random(args.seed).sample(range(len(found)), args.sample))]
    if args.only is not None:
        found = [mutation for mutation in found if any(map(mutation.path.match, args.only))]
    tried: dict[Path, list[bool]] = defaultdict(list)
    for mutation in found:
        noticed = is_noticed(mutation, options, args.limit_s)
        tried[mutation.path].append(noticed)
        if not noticed:
            print(mutation, flush=True)
    for path, results in tried.items():
        print(f"{path}: {sum(results)} of {len(results)}")
    everything = [noticed for results in tried.values() for noticed in results]
    print(f"in all: {sum(everything)} of {len(everything)} noticed, {sum(everything) / max(len(everything), 1):.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
