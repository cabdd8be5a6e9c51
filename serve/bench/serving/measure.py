"""`apt-jax bench serve`: one run per rate, or a search over rates, then tables and files."""

import asyncio
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic_core import from_json
from tqdm import tqdm

from apt_jax.files import EVERYBODY, check_apart, check_plot, check_writable, replace_file
from apt_jax.flags.lists import listed_names, listed_numbers
from apt_jax.progress import is_hidden
from apt_jax.serve.bench.serving.client import Endpoint, Refused, ask, first_model, open_session, plain_base
from apt_jax.serve.bench.serving.load import load
from apt_jax.serve.bench.serving.options import GOODPUT_METRICS, METRICS, BenchServe
from apt_jax.serve.bench.serving.records import Record, Run, details, summarise
from apt_jax.serve.bench.tables import print_point, print_points, warnings_of
from apt_jax.serve.bench.work import (
    Dataset,
    Work,
    check_dataset,
    load_dataset,
    load_tokenizer,
    make_conversations,
    make_work,
)
from apt_jax.simulation.search import effective_throughput
from apt_jax.simulation.workload import gamma_times

if TYPE_CHECKING:
    from apt_jax.tokenization.tokenizer import Tokenizer

LOWEST_RATE = 1e-6  # requests per second: one in 11 days
LOWEST_SHARE = 1 / 64  # of the first rate: where a search gives up
OWN_FIELDS = ("model", "prompt", "messages", "max_tokens", "stream", "stream_options", "n")  # of a body
SECRET = "..."
READINGS = {"strict": "strict_attainment", "paper": "attainment"}  # and the figure of each


@dataclasses.dataclass(frozen=True)
class Point:
    """One run and its figures."""

    rate: float
    run: Run
    figures: dict[str, Any]

    def reaches(self, reading: str, target: float) -> bool:
        """Whether enough requests attained their SLO in one of the `READINGS`, at a rate not known to pile up."""
        return bool(self.figures[READINGS[reading]] >= target and self.figures["sustained"] is not False)


class Serving:
    """What stays fixed while rates vary.

    Raises:
        ValueError: a flag has a bad value; the sentence names it.
        Refused: the server does not answer as an OpenAI server does.
    """

    def __init__(self, args: BenchServe):
        self.args = args
        self.slo = args.slo
        self.goodput = parse_goodput(args.goodput)
        self.metrics = listed_names("percentile_metrics", args.percentile_metrics, METRICS)
        self.percentiles = listed_numbers("metric_percentiles", args.metric_percentiles, high=100)
        self.targets = listed_numbers("targets", args.targets, high=1)
        self.cv = args.cv if args.cv is not None else 1 / math.sqrt(args.burstiness or 1.0)
        check_dataset(args.work)
        if args.endpoint == "chat" and args.tokenizer is None:
            raise ValueError("a chat is text: give --tokenizer, to know how many tokens it has")
        self.tokenizer: Tokenizer | None = load_tokenizer(args.tokenizer)
        endpoint, max_model_len = _run(_find_endpoint(args))
        self.endpoint = dataclasses.replace(endpoint, count=None if self.tokenizer is None else self._count)
        self.dataset: Dataset = load_dataset(
            args.work, seed=args.seed, tokenizer=self.tokenizer, max_model_len=args.max_model_len or max_model_len
        )
        if args.dataset_arrivals and not self.dataset.has_arrivals:
            raise ValueError(f"dataset={args.work.dataset} recorded no arrivals; leave out --dataset-arrivals")
        self.points: list[Point] = []

    def _count(self, text: str) -> int:
        """Tokens of an answer's text."""
        assert self.tokenizer is not None
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    def works(self, number: int, count: int) -> list[Work]:
        """The requests of run `number`: the same lengths in every run, other prompts, so that none is cached.

        Of conversations, the first turns; they have `count` requests together, or a few more.
        """
        vocab_size, seed = self.args.work.vocab_size, (self.args.seed, 3, number)
        if self.dataset.conversations is not None:
            return make_conversations(self.dataset, count, vocab_size=vocab_size, tokenizer=self.tokenizer, seed=seed)
        rows = self.dataset.rows(count, seed=self.args.seed, in_order=self.args.dataset_arrivals).tolist()
        return make_work(self.dataset, rows, vocab_size=vocab_size, tokenizer=self.tokenizer, seed=seed)

    def planned_s(self, rate: float, count: int, num_requests: int) -> list[float]:
        """Arrival of each of `count` requests, seconds after the start; the last one at about num_requests/rate.

        Of conversations, those of the first turns. Gaps are stretched so that exactly `rate` is offered, whatever the
        seed.
        """
        if self.args.dataset_arrivals:
            return self.dataset.recorded_times(count, None if math.isinf(rate) else rate).tolist()
        if math.isinf(rate):
            return [0.0] * count
        times = gamma_times(count, rate=1.0, cv=self.cv, seed=self.args.seed)
        return (times / (times[-1] or 1.0) * (num_requests / rate)).tolist()

    def warm_up(self) -> None:
        """Send the first requests.

        Raises:
            Refused: the very first failed.
        """
        if not self.args.num_warmups:
            return
        works = self.works(0, self.args.num_warmups)
        if error := _run(_first_answer(self.endpoint, works[0])):
            raise Refused(f"the first request to {self.endpoint.url} failed: {error}")
        if len(works) > 1:
            _run(self._load(works[1:], [0.0] * (len(works) - 1), lambda record: None))

    def measure(self, rate: float) -> Point:
        """One run, its figures printed."""
        works = self.works(1 + len(self.points), self.args.work.num_prompts)
        num_requests = sum(work.num_turns for work in works)
        planned = self.planned_s(rate, len(works), num_requests)
        with tqdm(total=num_requests, desc=f"{rate:.4g} requests/s", unit="request", disable=is_hidden()) as bar:
            run = _run(self._load(works, planned, lambda record: _advance(bar)))
        given = {
            "date": time.strftime("%Y%m%d-%H%M%S"),
            "endpoint_type": "openai" if self.args.endpoint == "completions" else "openai-chat",
            "model_id": self.endpoint.model,
            "num_prompts": num_requests,
            "request_rate": rate if math.isfinite(rate) else "inf",
            "offered_rate": num_requests / planned[-1] if planned[-1] > 0 else "inf",
            "burstiness": 1 / self.cv**2 if self.cv else "inf",
            "max_concurrency": self.args.max_concurrency,
            "ttft_slo_ms": self.args.ttft_slo_ms,
            "tbt_slo_ms": self.args.tbt_slo_ms,
            "stall_slo_ms": self.slo.stall_limit_s * 1e3,
        }
        figures = summarise(run, slo=self.slo, goodput=self.goodput, metrics=self.metrics, percentiles=self.percentiles)
        point = Point(rate, run, given | figures | (details(run) if self.args.save_detailed else {}))
        self.points.append(point)
        print_point(point.figures, self.metrics, self.percentiles)
        for line in warnings_of(point.figures):
            print(f"warning: {line}", file=sys.stderr)
        return point

    def search(self, start: float) -> None:
        """Measure around the highest rate that reaches each target strictly and lasts; runs are shared."""

        def reaches(rate: float, target: float) -> bool:
            rate = float(f"{rate:.4g}")
            point = next((p for p in self.points if p.rate == rate), None) or self.measure(rate)
            return point.reaches("strict", target)

        lowest, tolerance = start * LOWEST_SHARE, self.args.sweep_tolerance
        effective_throughput(reaches, self.targets, start=start, lowest=lowest, tolerance=tolerance)

    def effective(self) -> dict[str, dict[float, float]]:
        """In each reading, the highest rate measured that reaches each target and lasts; 0 if none did."""
        return {
            reading: {
                target: max((p.rate for p in self.points if p.reaches(reading, target)), default=0.0)
                for target in self.targets
            }
            for reading in READINGS
        }

    async def _load(self, works: list[Work], planned: list[float], on_done: Callable[[Record], None]) -> Run:
        async with open_session() as session:
            limit = self.args.max_concurrency
            return await load(session, self.endpoint, works, planned, max_concurrency=limit, on_done=on_done)


def run(args: BenchServe) -> int:
    """Run the command; 1 if no request of any run was answered.

    Raises:
        ValueError: a flag has a bad value, or the server does not answer; one sentence.
    """
    rates = listed_numbers("request_rate", args.request_rate, LOWEST_RATE)
    check_writable(args.output, "--output")
    check_plot(args.plot)
    check_apart({"--output": args.output, "--plot": args.plot})
    if args.sweep and args.request_rate == "inf":
        rates = [1.0]
    if args.sweep and math.inf in rates:
        raise ValueError(f"request_rate={args.request_rate!r}: a sweep cannot begin at inf; give a number")
    serving = Serving(args)
    serving.warm_up()
    for rate in rates:
        serving.measure(rate)
    if args.sweep:
        serving.search(rates[0])
    found = serving.effective()
    points = sorted(serving.points, key=lambda point: point.rate)
    if len(points) > 1:
        print_points([point.figures for point in points], found)
    if args.output is not None:
        _write(args.output, args, points, found)
    if args.plot is not None:
        from apt_jax.serve.bench.serving.pictures import draw

        draw(args.plot, [(p.rate, p.figures["strict_attainment"], p.run) for p in points], serving.slo)
    return int(not any(point.figures["completed"] for point in points))


def parse_goodput(pairs: tuple[str, ...]) -> dict[str, float]:
    """`("ttft:500", ...)` as limits in ms.

    Raises:
        ValueError: another form, or an unknown name.
    """
    limits = {}
    for pair in pairs:
        name, _, text = pair.partition(":")
        if name in limits:
            raise ValueError(f"--goodput {pair!r}: {name} has a limit already; leave one out")
        try:
            limits[name] = float(text)
        except ValueError:
            limits[name] = -1.0
        if name not in GOODPUT_METRICS or not 0 < limits[name] < math.inf:
            raise ValueError(
                f"--goodput {pair!r} must be one of {', '.join(GOODPUT_METRICS)}, a colon and a limit above 0 ms"
            )
    return limits


async def _find_endpoint(args: BenchServe) -> tuple[Endpoint, int | None]:
    """The endpoint, and the context length if the server says it."""
    base = plain_base(args.base_url)
    key = args.api_key or os.environ.get("OPENAI_API_KEY") or os.environ.get("APT_JAX_API_KEY")
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    if args.send_slo:
        parts = {"ttft": args.slo.ttft_s, "tbt": args.slo.tbt_s, "stall": args.slo.stall_limit_s}
        headers |= {f"x-slo-{name}-ms": f"{seconds * 1e3:.9g}" for name, seconds in parts.items()}
    fields: dict[str, Any] = {"temperature": args.temperature}
    if args.ignore_eos:
        fields["ignore_eos"] = True
    fields |= _extra_fields(args.extra_body)
    found: dict[str, Any] = {"id": args.model}
    if args.model is None:
        async with open_session() as session:
            found = await first_model(session, base, headers)
    length = found.get("max_model_len")
    endpoint = Endpoint(base, args.endpoint, str(found["id"]), headers, fields, args.request_timeout)
    return endpoint, length if isinstance(length, int) else None


def _extra_fields(text: str) -> dict[str, Any]:
    try:
        fields = from_json(text or "{}", allow_inf_nan=False)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise ValueError(f"extra_body={text!r} must be a JSON object")
    if own := [name for name in OWN_FIELDS if name in fields]:
        raise ValueError(f"extra_body={text!r} has {own[0]}, which the benchmark sets itself; leave it out")
    return fields


async def _first_answer(endpoint: Endpoint, work: Work) -> str | None:
    """Why the first request failed; None if it did not."""
    record = Record(0.0, work.prompt_tokens, work.output_tokens)
    async with open_session() as session:
        await ask(session, endpoint, endpoint.body(work), record, time.perf_counter())
    return record.error


def _advance(bar: "tqdm[Any]") -> None:
    bar.update()


def _run[T](main: Coroutine[Any, Any, T]) -> T:
    """Run on uvloop, where it exists: it takes half the CPU time that asyncio's own loop does."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    return uvloop.run(main)


def _write(path: Path, args: BenchServe, points: list[Point], found: dict[str, dict[float, float]]) -> None:
    """One run is one flat object, as vLLM's benchmark writes it; several are a list `points`."""
    flags = dataclasses.asdict(args)
    flags |= flags.pop("work")
    flags |= {"api_key": SECRET if args.api_key else None}
    rest: dict[str, Any] = {
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in flags.items()},
        **{
            name: {f"{target:g}": _finite(rate) for target, rate in found[reading].items()}
            for name, reading in (("effective_throughput", "strict"), ("effective_throughput_paper", "paper"))
        },
    }
    result = {**points[0].figures, **rest} if len(points) == 1 else {"points": [p.figures for p in points], **rest}
    replace_file(path, (json.dumps(result, indent=1, default=_plain) + "\n").encode(), mode=EVERYBODY)
    print(f"wrote {path}", file=sys.stderr)


def _finite(number: float) -> float | str:
    """JSON has no infinity."""
    return float(f"{number:.6g}") if math.isfinite(number) else "inf"


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} in results")
