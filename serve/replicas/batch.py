"""`apt-jax run-batch --ray`: a batch file over engines of Ray Data; it may be killed and run again any time.

Ray Data gives parts of the file to a pool of engines, and restarts an engine with its part if its process dies.
Only this process writes results, and only for lines without one: work that is done twice is answered once.
"""

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from apt_jax.progress import is_hidden
from apt_jax.scheduling.policies.catalogue import make_policy
from apt_jax.serve.batch.batch_file import Line, ResultFile, count_lines, read_lines, readable_twice
from apt_jax.serve.batch.batch_jobs import NO_LINES, BatchJob, LineError, check_files, parse_line
from apt_jax.serve.errors import EngineFailure
from apt_jax.serve.logs import set_up_logs
from apt_jax.serve.openai.generation import ServedModel
from apt_jax.serve.replicas.messages import EngineSpec
from apt_jax.serve.replicas.options import RayBatchOptions, ray_arguments
from apt_jax.serve.replicas.ray_session import check_ray, connect, disconnect, import_ray

if TYPE_CHECKING:
    import pyarrow

MOST_LINES, FEWEST_LINES = 256, 8  # of a piece
PIECES_PER_ENGINE = 4  # at least, so that the last ones end at about the same time

logger = logging.getLogger("apt_jax.serve")


class LineWorker:
    """An engine in a process of Ray Data's; called with a part, it returns the results."""

    def __init__(self, spec: EngineSpec, template: str | None):
        from apt_jax.serve.runtime.build import build_engine  # imports jax, which takes seconds

        set_up_logs(spec.log_format)
        self._engine = build_engine(spec.model, engine_config=spec.config, **dataclasses.asdict(spec.load))
        self._engine.warm_up()
        self._model = ServedModel(self._engine, spec.model_name, template)

    def __call__(self, piece: "pyarrow.Table") -> "pyarrow.Table":
        """Columns `number`, `data`, `digest` to `number`, `result` (JSON), in the same order.

        Raises:
            EngineFailure: the engine fails on everything.
        """
        import pyarrow

        lines = [Line(**row) for row in piece.to_pylist()]
        results = _Collected()
        with tqdm(disable=True) as bar:
            BatchJob(self._engine, self._model, lambda: lines, results, bar).run()
        return pyarrow.table(
            {
                "number": pyarrow.array([line.number for line in lines], pyarrow.int64()),
                "result": pyarrow.array([results.found[line.number] for line in lines], pyarrow.large_string()),
            }
        )


class _Collected:
    """Results by line number."""

    def __init__(self) -> None:
        self.found: dict[int, str] = {}

    def is_done(self, line: Line) -> bool:
        return line.number in self.found

    def write(self, line: Line, custom_id: str | None, response: Any, error: Any) -> None:
        self.found[line.number] = json.dumps({"custom_id": custom_id, "response": response, "error": error})


def run_batch_on_ray(
    source: Path, output: Path, spec: EngineSpec, options: RayBatchOptions, chat_template: str | None = None
) -> int:
    """`run_batch` over several engines; returns the exit code.

    Raises:
        ValueError, OSError: files or model cannot be used, or Ray is not installed; one sentence.
        EngineFailure: an engine could not be started, or fails on everything. The answers so far are kept.
    """
    from apt_jax.serve.openai.templates.chat_template import read_template

    check_ray()
    check_files(source, output)
    make_policy(spec.config.scheduling_policy)
    template = None if chat_template is None else read_template(Path(chat_template))
    with readable_twice(source) as text, ResultFile(output) as results, logging_redirect_tqdm():
        total, done = count_lines(text), results.num_done
        if not total:
            logger.warning(NO_LINES, source)
            return 0
        with tqdm(total=total, initial=done, desc=source.name, unit="line", disable=is_hidden()) as bar:
            missing = sum(1 for _ in _unanswered(text, results, bar))
            if missing:
                connect(None if options.ray == "local" else options.ray)
                try:
                    _answer(text, results, bar, spec, template, options, missing)
                finally:
                    disconnect()
        if results.num_done < total:
            raise EngineFailure(f"{total - results.num_done} lines are not answered; run the same command again")
        logger.info("%d lines answered in this run, %d in all; results in %s", results.num_done - done, total, output)
    return 0


def _unanswered(source: Path, results: ResultFile, bar: tqdm) -> Iterator[Line]:
    """Lines for the engines; lines that are not requests are answered here, where all `custom_id`s are known."""
    first_line: dict[str, int] = {}
    for line in read_lines(source):
        try:
            custom_id = parse_line(line).custom_id
            first = first_line.setdefault(custom_id, line.number)
            if first != line.number:
                message = f"custom_id {custom_id!r} is already that of line {first}"
                raise LineError(message, "duplicate_custom_id", custom_id)
        except LineError as error:
            if not results.is_done(line):
                results.write(line, error.custom_id, None, {"code": error.code, "message": str(error)})
                bar.update()
            continue
        if not results.is_done(line):
            yield line


def _answer(
    source: Path,
    results: ResultFile,
    bar: tqdm,
    spec: EngineSpec,
    template: str | None,
    options: RayBatchOptions,
    missing: int,
) -> None:
    ray = import_ray()
    from ray.data import ActorPoolStrategy, DataContext, from_arrow_refs

    context = DataContext.get_current()
    context.enable_progress_bars = False  # there is one already
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    size = min(MOST_LINES, max(FEWEST_LINES, -(-missing // (PIECES_PER_ENGINE * options.replicas))))
    lines = {}  # by number, without their data
    references = []
    for piece in _pieces(_unanswered(source, results, bar), size):
        lines.update({line.number: dataclasses.replace(line, data=None) for line in piece})
        references.append(ray.put(_table(piece)))
    answered = from_arrow_refs(references).map_batches(
        LineWorker,
        fn_constructor_args=(spec, template),
        batch_size=None,  # a piece each
        batch_format="pyarrow",
        zero_copy_batch=True,
        compute=ActorPoolStrategy(size=min(options.replicas, len(references))),
        **ray_arguments(options.replica_resources),
    )
    try:
        for table in answered.iter_batches(batch_size=None, batch_format="pyarrow"):
            for row in table.to_pylist():
                line = lines[row["number"]]
                if not results.is_done(line):
                    results.write(line, **json.loads(row["result"]))
                    bar.update()
    except ray.exceptions.RayError as error:
        reason = str(getattr(error, "cause", None) or error).strip().splitlines()[-1]
        raise EngineFailure(
            f"an engine failed: {reason}; the answers so far are kept, run it again to go on"
        ) from error


def _pieces(lines: Iterator[Line], size: int) -> Iterator[list[Line]]:
    piece: list[Line] = []
    for line in lines:
        piece.append(line)
        if len(piece) == size:
            yield piece
            piece = []
    if piece:
        yield piece


def _table(lines: list[Line]) -> "pyarrow.Table":
    import pyarrow

    return pyarrow.table(
        {
            "number": pyarrow.array([line.number for line in lines], pyarrow.int64()),
            "data": pyarrow.array([line.data for line in lines], pyarrow.large_binary()),
            "digest": [line.digest for line in lines],
        }
    )
