"""`apt-jax run-batch`: a file of OpenAI batch lines through the engine; it may be killed and run again at any time."""

import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from pydantic import Field, ValidationError
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from apt_jax.engine.interface import ServingEngine
from apt_jax.engine_config import EngineConfig
from apt_jax.files import check_readable, check_writable
from apt_jax.output import Output, QueueFull
from apt_jax.progress import is_hidden
from apt_jax.request import OFFLINE_SLO
from apt_jax.serve.batch.batch_file import (
    MAX_LINE_BYTES,
    Line,
    ResultFile,
    count_lines,
    read_lines,
    readable_twice,
)
from apt_jax.serve.errors import BadRequest, EngineFailure, error_reply
from apt_jax.serve.json_text import parse_json
from apt_jax.serve.openai.bodies.strict import Strict, first_fault
from apt_jax.serve.openai.endpoints import ENDPOINTS
from apt_jax.serve.openai.generation import Generation, ServedModel, as_bad_request
from apt_jax.serve.options import DEMO_NAME, LoadOptions
from apt_jax.serve.runtime.driver import Driver
from apt_jax.serve.runtime.samples import Sample

MAX_ATTEMPTS = 3  # at a line on which the engine fails
NO_LINES = "%s has no lines, so there is nothing to answer"
HOPELESS = 4  # times as many failures in a row as requests run at once mean that the engine is broken

Lines = Callable[[], Iterable[Line]]

logger = logging.getLogger("apt_jax.serve")


class Results(Protocol):
    """Where answers go; `ResultFile` has more."""

    def is_done(self, line: Line) -> bool:
        """Whether it is answered."""

    def write(self, line: Line, custom_id: str | None, response: Any, error: Any) -> None:
        """Keep the answer of `line`."""


class BatchLine(Strict):
    """One line of OpenAI's batch input; `body` is checked as the body of `url`."""

    custom_id: str = Field(min_length=1, max_length=512)
    method: str
    url: str
    body: dict[str, Any]


class LineError(ValueError):
    """A line that is not a request; `code` says why."""

    def __init__(self, message: str, code: str, custom_id: str | None = None):
        super().__init__(message)
        self.code = code
        self.custom_id = custom_id


class Unforeseen(RuntimeError):
    """A line on which the program itself failed."""


class Work:
    """A line that the engine is working on."""

    def __init__(self, line: Line, custom_id: str, completion: Generation[Any]):
        self.line = line
        self.custom_id = custom_id
        self.completion = completion
        self.ended = False


class BatchJob:
    """Answers those of `lines`, which is called for each attempt, that `results` has not answered; `bar` counts them.

    A line on which the engine fails is tried again after the others; a line that still fails after MAX_ATTEMPTS gets
    the error as its answer.
    """

    def __init__(self, engine: ServingEngine, model: ServedModel, lines: Lines, results: Results, bar: tqdm):
        self._engine = engine
        self._model = model
        self._lines = lines
        self._results = results
        self._bar = bar
        self._driver = Driver(engine)
        self._work: dict[str, Work] = {}  # by engine request id
        self._first_line: dict[str, int] = {}  # by custom_id
        self._attempt = 0
        self._failures = 0  # of the engine in this attempt
        self._failures_in_a_row = 0
        self.counts: Counter[str] = Counter()  # lines "answered" and "refused" in this run, and "tokens"

    def run(self) -> None:
        """Answer every line.

        Raises:
            ValueError: `results` is of another input.
            EngineFailure: the engine fails on everything; what has been answered so far is in `results`.
        """
        began = time.monotonic()
        for self._attempt in range(1, MAX_ATTEMPTS + 1):
            self._failures = 0
            for sample, output in self._driver.run(self._samples()):
                work = self._work[sample.request_id]
                if isinstance(output, ValueError):
                    self._refuse(work, as_bad_request(output, work.completion.body))
                else:
                    self._take(work, sample, output)
                    self.counts["tokens"] += len(output.token_ids)
                if work.ended:
                    rate = self.counts["tokens"] / max(time.monotonic() - began, 1e-9)
                    running = self._engine.num_running
                    self._bar.set_postfix_str(f"{rate:.0f} tokens/s, {running} running", refresh=False)
            if not self._failures:
                return

    def _samples(self) -> Iterator[Sample | None]:
        """The samples of the lines still to be answered; lines that are not requests are answered here.

        None where a line is to be tried again after a step.
        """
        for line in self._lines():
            custom_id = None
            try:
                request = parse_line(line)
                custom_id = request.custom_id
                check_unique(self._first_line, line, custom_id)
                if self._results.is_done(line):
                    continue
                while (work := self._prepare(line, request)) is None:
                    yield None
            except LineError as error:
                if not self._results.is_done(line):
                    self._write(line, error.custom_id, None, {"code": error.code, "message": str(error)})
                continue
            except (BadRequest, Unforeseen) as error:
                self._reply(line, custom_id, f"cmpl-{line.result_id}", error)
                continue
            for sample in work.completion.samples:
                if not work.ended:  # it ends early if a sample before is refused
                    self._work[sample.request_id] = work
                    yield sample

    def _prepare(self, line: Line, request: BatchLine) -> Work | None:
        """None while too many grammars are followed; raises BadRequest: the body is not valid here."""
        # another id for each attempt: what the engine still reports of the last one must not be taken for this one
        request_id = f"{ENDPOINTS[request.url].generation.ID_PREFIX}-{line.result_id}" + (
            f"-{self._attempt}" if self._attempt > 1 else ""
        )
        try:
            completion = prepare(request, self._model, request_id)
        except BadRequest:
            raise
        except Exception as error:  # a line must not end the job, and again each time that it is run
            if isinstance(error, QueueFull) and self._driver.is_busy:
                return None
            logger.exception("line %d cannot be answered", line.number)
            raise Unforeseen(str(error)) from error
        return Work(line, request.custom_id, completion)

    def _take(self, work: Work, sample: Sample, output: Output) -> None:
        try:
            work.completion.collect(sample, output)
        except Exception as error:
            self._refuse(work, error)
            return
        if output.finish_reason is not None:
            del self._work[sample.request_id]
        if work.completion.is_finished:
            work.ended = True
            self._failures_in_a_row = 0
            body = work.completion.response()
            reply = {"status_code": 200, "request_id": work.completion.request_id, "body": body}
            self._write(work.line, work.custom_id, reply, None)

    def _refuse(self, work: Work, error: Exception) -> None:
        """End a line with an error and cancel its other samples."""
        work.ended = True
        for sample in work.completion.samples:
            self._driver.abort(sample.request_id)
            self._work.pop(sample.request_id, None)
        if isinstance(error, BadRequest):
            self._reply(work.line, work.custom_id, work.completion.request_id, error)
            return
        logger.error("line %d, attempt %d of %d: %s", work.line.number, self._attempt, MAX_ATTEMPTS, error)
        self._failures += 1
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= HOPELESS * self._engine.max_num_seqs:
            raise EngineFailure(
                f"the engine has failed on {self._failures_in_a_row} lines in a row, the last time with: {error}; "
                "the answers so far are kept, run the same command again to go on"
            )
        if self._attempt == MAX_ATTEMPTS:
            self._reply(work.line, work.custom_id, work.completion.request_id, error)

    def _reply(self, line: Line, custom_id: str | None, request_id: str, error: Exception) -> None:
        status, body, _ = error_reply(error)
        self._write(line, custom_id, {"status_code": status, "request_id": request_id, "body": body}, None)

    def _write(self, line: Line, custom_id: str | None, response: Any, error: Any) -> None:
        self._results.write(line, custom_id, response, error)
        good = error is None and response["status_code"] == 200
        self.counts["answered" if good else "refused"] += 1
        self._bar.update()


def parse_line(line: Line) -> BatchLine:
    """Read a line.

    Raises:
        LineError: it is not a request that can be answered here.
    """
    if line.data is None:
        raise LineError(f"the line is longer than {MAX_LINE_BYTES} bytes", "line_too_long")
    try:
        value = parse_json(line.data, "the line")
    except BadRequest as error:
        raise LineError(str(error), "invalid_json") from error
    if not isinstance(value, dict):
        raise LineError("the line is not a JSON object", "invalid_line")
    custom_id = value.get("custom_id")
    known_id = custom_id if isinstance(custom_id, str) else None
    try:
        request = BatchLine.model_validate(value)
    except ValidationError as error:
        raise LineError(str(first_fault(error, BatchLine)), "invalid_line", known_id) from error
    if request.method != "POST" or request.url not in ENDPOINTS:
        *first, last = ENDPOINTS
        raise LineError(
            f"{request.method} {request.url} cannot be answered in a batch; POST {', '.join(first)} and {last} can",
            *("unsupported_url", known_id),
        )
    return request


def check_unique(first: dict[str, int], line: Line, custom_id: str) -> None:
    """Raises LineError if `custom_id` is that of an earlier line; `first` has their numbers, and gets this one's."""
    number = first.setdefault(custom_id, line.number)
    if number != line.number:
        raise LineError(f"custom_id {custom_id!r} is already that of line {number}", "duplicate_custom_id", custom_id)


def prepare(request: BatchLine, model: ServedModel, request_id: str) -> Generation[Any]:
    """What a line asks for, ready to be given to the engine.

    Raises:
        BadRequest: the body is not valid here.
    """
    endpoint = ENDPOINTS[request.url]
    body = endpoint.parse(request.body)
    if body.stream:
        raise BadRequest("stream is not possible in a batch; leave it out", "stream")
    return endpoint.generation.prepare(body, model, request_id=request_id, otherwise_slo=OFFLINE_SLO)


def check_files(source: Path, output: Path) -> None:
    """Raises ValueError if a job cannot read what it is to answer, or would write it."""
    check_readable(source, "--input")
    check_writable(output, "--output", in_place=True)
    if output.exists() and output.samefile(source):
        raise ValueError(f"{source} is both input and output; choose another output")


def run_batch(
    source: Path,
    output: Path,
    model: str | None,
    model_name: str | None,
    load: LoadOptions,
    config: EngineConfig,
    chat_template: str | None = None,
    leader_host: str | None = None,
) -> int:
    """Answer `source` into `output`, which may hold results already; returns the exit code.

    The model is only loaded if a line is left to answer. Lines that cannot be answered do not fail the job.
    `leader_host`: see `build_engine`.

    Raises:
        ValueError, OSError: files or model cannot be used; one sentence.
    """
    check_files(source, output)
    with readable_twice(source) as text, ResultFile(output) as results:
        total, done = count_lines(text), results.num_done
        if not total:
            logger.warning(NO_LINES, source)
            return 0
        if all(results.is_done(line) for line in read_lines(text)):
            logger.info("all %d lines of %s are answered in %s", total, source, output)
            return 0
        if done:
            logger.info("%d of %d lines are answered in %s, going on with the others", done, total, output)
        from apt_jax.serve.openai.templates.chat_template import read_template
        from apt_jax.serve.runtime.build import build_engine  # imports jax, which takes seconds

        template = None if chat_template is None else read_template(Path(chat_template))
        engine = build_engine(model, engine_config=config, leader_host=leader_host, **dataclasses.asdict(load))
        engine.warm_up(progress=True)
        with (
            logging_redirect_tqdm(),
            tqdm(total=total, initial=done, desc=source.name, unit="line", disable=is_hidden()) as bar,
        ):
            served = ServedModel(engine, model_name or model or DEMO_NAME, template)
            job = BatchJob(engine, served, partial(read_lines, text), results, bar)
            job.run()
        logger.info(
            "%d/%d lines: %d lines answered and %d refused in this run, %d tokens; results in %s",
            *(results.num_done, total),
            *(job.counts["answered"], job.counts["refused"], job.counts["tokens"]),
            output,
        )
    return 0
