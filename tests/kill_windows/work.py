"""Pieces of work that change files, and what must hold however they are ended."""

import io
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from tqdm import tqdm

from apt_jax.checkpoints.mappings.opt import OPT_MAPPING
from apt_jax.files import replace_file
from apt_jax.serve.batch.batch_file import ResultFile, count_lines, read_lines
from apt_jax.serve.batch.batch_jobs import BatchJob
from apt_jax.serve.batch.store import BatchStore
from apt_jax.serve.http.resume import Resumption
from apt_jax.serve.http.snapshot import record_of
from apt_jax.serve.http.snapshot_file import check_snapshot_file, keep_records, read_snapshot, write_snapshot
from apt_jax.serve.openai.bodies.requests import parse_completion
from apt_jax.serve.openai.completions import Completion
from apt_jax.serve.openai.generation import ServedModel
from tests.kill_windows.forks import forked
from tests.support.asgi_service import run, serving, until
from tests.support.fake_engine import CharTokenizer, FakeEngine


class Work:
    """`do` is what is killed, and what the next start does."""

    def prepare(self, folder: Path) -> None:
        """What is there before."""

    def do(self, folder: Path) -> None:
        raise NotImplementedError

    def check_killed(self, folder: Path) -> None:
        """What holds after a kill, before anything else is done."""

    def check(self, folder: Path) -> None:
        raise NotImplementedError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Batch(Work):
    """A job of five lines, one of which is no request."""

    def prepare(self, folder: Path) -> None:
        body = {"prompt": "a\u2028", "max_tokens": 2, "echo": True}
        lines = [{"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": body} for i in range(4)]
        (folder / "in").write_text("".join(json.dumps(line) + "\n" for line in lines) + "no request\n")

    def do(self, folder: Path) -> None:
        engine = FakeEngine(tokenizer=CharTokenizer())
        with ResultFile(folder / "out") as results, tqdm(total=count_lines(folder / "in"), file=io.StringIO()) as bar:
            job = BatchJob(engine, ServedModel(engine, "tiny"), partial(read_lines, folder / "in"), results, bar)
            job.run()

    def check(self, folder: Path) -> None:
        found = [json.loads(line) for line in (folder / "out").read_bytes().split(b"\n") if line]
        assert sorted(int(result["id"].split("_")[2]) for result in found) == [1, 2, 3, 4, 5]
        assert sum(result["error"] is not None for result in found) == 1
        assert names(folder) == ["in", "out"]


def records(*ids: str) -> list[dict]:
    """Of requests that have not begun."""
    model = ServedModel(FakeEngine(tokenizer=CharTokenizer()), "tiny")
    body = parse_completion({"prompt": "a", "max_tokens": 3})
    return [record_of(Completion.prepare(body, model, request_id=name), "weights:fake") for name in ids]


class Snapshot(Work):
    """A server that finds a snapshot, with a line that it cannot read, and adds its own requests at shutdown."""

    def prepare(self, folder: Path) -> None:
        write_snapshot(folder / "left", records("a", "b"))
        with (folder / "left").open("a") as file:
            file.write("damaged\n")

    def do(self, folder: Path) -> None:
        check_snapshot_file(str(folder / "left"))
        assert keep_records(folder / "left", records("b", "c", "d")) == folder / "left"

    def check_killed(self, folder: Path) -> None:
        ids = [record["id"] for record in read_snapshot(folder / "left")]
        assert sorted(ids) in (["a", "b"], ["a", "b", "c", "d"])
        assert b"damaged\n" in (folder / "left").read_bytes()

    def check(self, folder: Path) -> None:
        assert sorted(record["id"] for record in read_snapshot(folder / "left")) == ["a", "b", "c", "d"]
        assert b"damaged\n" in (folder / "left").read_bytes()
        assert names(folder) == ["left"], "no draft is left"


class FirstSnapshot(Work):
    """The same where there was none."""

    def do(self, folder: Path) -> None:
        check_snapshot_file(str(folder / "left"))
        keep_records(folder / "left", records("a"))

    def check(self, folder: Path) -> None:
        assert [record["id"] for record in read_snapshot(folder / "left")] == ["a"] and names(folder) == ["left"]


class Results(Work):
    """A server that finishes the requests of a snapshot."""

    IDS: ClassVar = ["a", "b", "c"]

    def prepare(self, folder: Path) -> None:
        write_snapshot(folder / "left", records(*self.IDS))

    def do(self, folder: Path) -> None:
        resumption = Resumption(folder / "left")

        async def main() -> None:
            async with serving(FakeEngine(tokenizer=CharTokenizer()), resumption=resumption):
                await until(lambda: not (folder / "left").exists())

        run(main)

    def check(self, folder: Path) -> None:
        lines = (folder / "left.results.jsonl").read_bytes().split(b"\n")
        found = {(r := json.loads(line))["custom_id"]: r["response"]["body"] for line in lines if line}
        assert sum(map(bool, lines)) == 3 and sorted(found) == self.IDS
        assert {body["choices"][0]["text"] for body in found.values()} == {"bcd"}
        assert names(folder) == ["left.results.jsonl"]


class Replaced(Work):
    """A file that is kept from start to start: calibration, program, tokenizer, figures."""

    def prepare(self, folder: Path) -> None:
        (folder / "file").write_bytes(b"old")

    def do(self, folder: Path) -> None:
        replace_file(folder / "file", b"new" * 1000, durable=True)

    def check_killed(self, folder: Path) -> None:
        assert (folder / "file").read_bytes() in (b"old", b"new" * 1000)

    def check(self, folder: Path) -> None:
        assert (folder / "file").read_bytes() == b"new" * 1000


class Converted(Work):
    """A conversion; once it is done, a second one finds it done. Reading and writing the weights takes no time here."""

    def prepare(self, folder: Path) -> None:
        import apt_jax.checkpoints.convert  # noqa: F401  once, before it is forked
        from tests.support.checkpoint_folders import VARIANTS, write_config

        write_config(folder / "source", VARIANTS["plain"])
        (folder / "source" / "vocab.json").write_text("{}")

    def do(self, folder: Path) -> None:
        from apt_jax.checkpoints import convert
        from apt_jax.checkpoints.formats.manifest import Manifest

        def save_weights(weights: Path, parameters: object) -> None:
            weights.mkdir()
            for name in ("one", "two"):
                (weights / name).write_bytes(b"weights")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(convert, "read_parameters", lambda *args, **options: ({}, ""))
            patch.setattr(convert, "choose_int8", lambda *args: None)
            patch.setattr(convert, "weights_fingerprint", lambda *args: "weights:none")
            patch.setattr(convert, "_host", lambda: None)
            patch.setattr(convert.Skeleton, "of", lambda *args: SimpleNamespace(dtype=np.dtype("float32"), nbytes=0))
            patch.setattr(convert, "save_weights", save_weights)
            if not (folder / "new").exists():
                convert.convert(str(folder / "source"), folder / "new", load_format="dummy")
        assert Manifest.read(folder / "new").fingerprint == "weights:none"

    def check_killed(self, folder: Path) -> None:
        from apt_jax.checkpoints.formats.manifest import Manifest

        if (folder / "new").exists():
            Manifest.read(folder / "new")  # it is whole

    def check(self, folder: Path) -> None:
        kept = [name for name in names(folder) if not name.startswith(".")]
        assert kept == ["new", "source"], kept
        left = [path for path in folder.glob(".*") if any(path.iterdir())]
        assert left == [], left


class Stored(Work):
    """A conversion of which nothing is replaced: Orbax and TensorStore write the weights, with threads of their own."""

    def prepare(self, folder: Path) -> None:
        # all modules and no backend: threads do not live on in a fork
        import apt_jax.checkpoints.convert  # noqa: F401
        from tests.support.checkpoint_folders import VARIANTS, write_config, write_safetensors

        config, numbers = VARIANTS["untied"], np.random.default_rng(1)
        write_config(folder / "source", config)
        slots = OPT_MAPPING.slots(config)
        tensors = {n: numbers.normal(size=slot.torch_shape).astype(np.float32) for n, slot in slots.items()}
        write_safetensors(folder / "source", tensors)

    def do(self, folder: Path) -> None:
        from apt_jax.checkpoints.convert import convert
        from apt_jax.checkpoints.errors import CheckpointError

        try:
            convert(str(folder / "source"), folder / "new")
        except CheckpointError:  # it was killed when all was done but removing an empty folder, which the next one does
            if not (folder / "new").exists():
                raise

    def check_killed(self, folder: Path) -> None:
        if (folder / "new").exists():
            assert forked(lambda: verify(folder)) == 0, "what is there must be whole"

    def check(self, folder: Path) -> None:
        assert names(folder) == ["new", "source"]
        assert forked(lambda: verify(folder)) == 0


def verify(folder: Path) -> None:
    """Read every weight of what was converted, and compare with the fingerprint."""
    from apt_jax.checkpoints.convert import verify

    verify(folder / "new")


class HttpBatch(Work):
    """A batch of the Batch API, from its request to its files; a file is uploaded beside it."""

    def prepare(self, folder: Path) -> None:
        store = BatchStore(folder / "store")
        lines = [
            {"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": {"prompt": "a", "max_tokens": n}}
            for i, n in enumerate((1, 2, 0, 3))
        ]
        known = store.add_file("", "in", "batch", [b"".join(json.dumps(line).encode() + b"\n" for line in lines)])
        store.add_batch("", batch_of(known["id"]))
        store.close()

    def do(self, folder: Path) -> None:
        store = BatchStore(folder / "store")
        store.add_file("other", "upload", "batch", [b"some", b"thing"])

        async def main() -> None:
            async with serving(FakeEngine(tokenizer=CharTokenizer()), store=store):
                await until(lambda: not store.unfinished())

        run(main)
        store.close()

    def check_killed(self, folder: Path) -> None:
        store = BatchStore(folder / "store")
        for known in store.files("other"):
            assert store.path_of(known["id"]).read_bytes() == b"something"
        for batch in store.batches(""):
            if batch["status"] == "completed":
                self._check_batch(store, batch)
        store.close()

    def check(self, folder: Path) -> None:
        store = BatchStore(folder / "store")
        (batch,) = store.batches("")
        self._check_batch(store, batch)
        left = names(folder / "store" / "batches")
        assert len(store.files("")) == 3 and left == [f"{batch['id']}.json"], left
        store.close()

    def _check_batch(self, store: BatchStore, batch: dict[str, Any]) -> None:
        assert batch["status"] == "completed" and batch["request_counts"] == {"total": 4, "completed": 3, "failed": 1}
        found = [
            json.loads(line)
            for field in ("output_file_id", "error_file_id")
            for line in store.path_of(batch[field]).read_text().splitlines()
        ]
        texts = {
            line["custom_id"]: line["response"]["body"].get("choices", [{"text": None}])[0]["text"] for line in found
        }
        assert len(found) == 4 and texts == {"0": "b", "1": "bc", "2": None, "3": "bcd"}


def batch_of(file_id: str) -> dict[str, Any]:
    """What the route keeps of a new batch."""
    times = dict.fromkeys(("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled"))
    return {
        "endpoint": "/v1/completions", "errors": None, "input_file_id": file_id, "completion_window": "24h",
        "status": "validating", "output_file_id": None, "error_file_id": None, "created_at": 1, "expires_at": 10**10,
        **{f"{name}_at": None for name in times}, "metadata": None,
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
    }  # fmt: skip


WORKS: dict[str, Work] = {
    "http-batch": HttpBatch(),
    "batch": Batch(),
    "snapshot": Snapshot(),
    "first-snapshot": FirstSnapshot(),
    "results": Results(),
    "replaced": Replaced(),
    "convert": Converted(),
    "orbax": Stored(),
}
