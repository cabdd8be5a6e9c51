"""Workloads: request lengths from a table, arrival times from a Gamma process or a recorded trace."""

import csv
import io
import math
import textwrap
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from apt_jax.files import read_text
from apt_jax.request import Slo
from apt_jax.simulation.requests.classes import DEFAULT_CLASS, RequestClass, Terms, terms_of
from apt_jax.simulation.requests.surge import Surge

NAMED = ("sharegpt", "humaneval", "longbench", "azure")
TERMS = {  # cell of `terms_of` -> column of a table
    "ttft_ms": "ttft_slo_ms", "tbt_ms": "tbt_slo_ms", "stall_ms": "stall_slo_ms", "priority": "priority",
    "user": "user",
}  # fmt: skip
CLASS = "class"  # the column of its name
MIN_DURATION_S = 300.0  # shorter traces flatter policies that starve
SHOWN_CHARS = 120  # of a table's head in a sentence
MOST_TOKENS = 10**9  # in a cell
MOST_ARRIVALS = 10**7  # of one run
MOST_TOKEN_IDS = 2**31 - 1  # different ones, as the prefix cache takes them


@dataclass(frozen=True)
class Lengths:
    """A table of requests: `[n]` prompt and output tokens, `[n]` arrival seconds if they were recorded, and terms.

    `terms` has an entry for each row if the table has such columns, else none.
    """

    name: str
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    arrival_s: NDArray[np.float64] | None = None
    terms: tuple[Terms, ...] = ()

    @property
    def recorded_rate(self) -> float:
        """Requests per second of the recorded arrivals.

        Raises:
            ValueError: arrivals were not recorded, or are all at one time.
        """
        if self.arrival_s is None:
            raise ValueError(f"workload {self.name} has no recorded arrivals; give --rate")
        if not self.arrival_s[-1] > 0:
            raise ValueError(
                f"the arrivals of workload {self.name} are all at one time and have no rate; leave them out"
            )
        return len(self.arrival_s) / float(self.arrival_s[-1])


@dataclass(frozen=True)
class Arrival:
    """One request to come.

    Attributes:
        arrival_s: when; of one that follows another, seconds after that has ended.
        prompt_tokens: of the prompt.
        output_tokens: of the answer.
        terms: what it is promised; None is what the simulation promises.
        first_token_id: number of the first token of its prompt and answer, which are numbered on. None gives numbers
            that no other request has.
        shared_tokens: the first tokens of the prompt, which have numbers from 0 on instead, as in other requests.
        then: the next turn of its conversation, which repeats its prompt and answer.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    terms: Terms | None = None
    first_token_id: int | None = None
    shared_tokens: int = 0
    then: "Arrival | None" = None

    @property
    def turns(self) -> "list[Arrival]":
        """It and those that follow it."""
        found, arrival = [self], self.then
        while arrival is not None:
            found.append(arrival)
            arrival = arrival.then
        return found

    def token_ids(self, index: int, max_model_len: int) -> tuple[Sequence[int], int]:
        """Its prompt as numbers, which mean nothing but which beginnings are equal, and the number after them.

        Args:
            index: its number among all requests.
            max_model_len: longest context, and so how many numbers a conversation has.
        """
        first = first_token_id(index, max_model_len) if self.first_token_id is None else self.first_token_id
        end = first + self.prompt_tokens
        if not self.shared_tokens:
            return range(first, end), end
        return array("i", [*range(self.shared_tokens), *range(first + self.shared_tokens, end)]), end


def first_token_id(number: int, max_model_len: int) -> int:
    """The first of `max_model_len` token ids that a request or conversation has for itself; millions have others."""
    return (1 + number % (MOST_TOKEN_IDS // max_model_len - 1)) * max_model_len


def load_lengths(workload: str, max_model_len: int = 2048, slo: Slo | None = None) -> Lengths:
    """A named workload, or a CSV with columns prompt_tokens, output_tokens and, if recorded, arrival_s.

    A file may also have the columns ttft_slo_ms, tbt_slo_ms, stall_slo_ms, priority, user and class; where one is empty
    `slo` holds. Several workloads, joined by `+`, are mixed: as many requests of each, recorded arrivals and terms left
    out.

    Requests longer than `max_model_len` are left out.

    Raises:
        ValueError: no such name or file, a column is missing, a cell is no number of tokens or seconds, or no request
            is left.
    """
    if "+" in workload:
        return _mixed([load_lengths(part, max_model_len) for part in workload.split("+")])
    if workload in NAMED:
        text = resources.files("apt_jax.simulation").joinpath(f"workloads/{workload}.csv").read_text("utf-8")
    else:
        path = Path(workload)
        if not path.is_file():
            raise ValueError(f"workload {workload!r} is neither a file nor one of {', '.join(NAMED)}, conversations")
        try:
            text = read_text(path)
        except ValueError as error:
            raise ValueError(f"workload {workload} is {error}") from error
    rows, terms = _rows(workload, text, slo or Slo())
    fits = rows[:, -2] + rows[:, -1] <= max_model_len
    rows, terms = rows[fits], [each for each, is_in in zip(terms, fits, strict=False) if is_in]
    if not len(rows):
        raise ValueError(f"workload {workload} has no request of at most {max_model_len} tokens")
    arrival = None
    if rows.shape[1] == 3:
        order = np.argsort(rows[:, 0], kind="stable")
        rows, terms = rows[order], [terms[i] for i in order] if terms else []
        arrival = rows[:, 0] - rows[0, 0]
    return Lengths(workload, rows[:, -2].astype(np.int64), rows[:, -1].astype(np.int64), arrival, tuple(terms))


@lru_cache(maxsize=16)  # each point of a search asks again
def _rows(workload: str, text: str, slo: Slo) -> tuple[NDArray[np.float64], list[Terms]]:
    """`[n, 2 or 3]` cells of a table: arrival_s if it has them, prompt_tokens, output_tokens; and its terms, if any."""
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        columns = reader.fieldnames or []
    except csv.Error as error:
        raise ValueError(f"workload {workload}, line 1: {error}") from error
    if not columns:
        raise ValueError(f"workload {workload} is empty; give a table with the columns prompt_tokens and output_tokens")
    for column in ("prompt_tokens", "output_tokens"):
        if column not in columns:
            found = textwrap.shorten(", ".join(map(ascii, columns)), SHOWN_CHARS)
            raise ValueError(f"workload {workload} has no column {column}; it has {found}")
    if repeated := [column for column in (*columns,) if columns.count(column) > 1]:
        raise ValueError(f"workload {workload} has the column {repeated[0][:SHOWN_CHARS]!a} twice; leave one out")
    wanted = [c for c in ("arrival_s", "prompt_tokens", "output_tokens") if c in columns]
    rows, terms, has_terms = [], [], any(column in columns for column in (*TERMS.values(), CLASS))
    try:
        for row in reader:
            if None in row:  # csv's key for what is left
                raise ValueError("there are more cells than columns")
            rows.append([_cell(column, row[column]) for column in wanted])
            if has_terms:
                terms.append(terms_of(row, slo, "", row.get(CLASS) or DEFAULT_CLASS, TERMS))
    except (ValueError, csv.Error) as error:
        raise ValueError(f"workload {workload}, line {reader.line_num}: {error}") from error
    return np.array(rows, np.float64).reshape(-1, len(wanted)), terms


def _cell(column: str, text: str | None) -> float:
    """A cell's number; ValueError says what it must be."""
    if text is None:
        raise ValueError(f"there is no cell for {column}")
    try:
        value = float(text)
    except ValueError as error:
        raise ValueError(f"{column}={text[:SHOWN_CHARS]!r} must be a number") from error
    if column == "arrival_s":
        if not 0 <= value < math.inf:
            raise ValueError(f"arrival_s={text} must be seconds, at least 0")
    elif not 1 <= value <= MOST_TOKENS or value % 1:
        raise ValueError(f"{column}={text} must be a whole number of tokens, at least 1")
    return value


def _mixed(tables: list[Lengths]) -> Lengths:
    """Rows of the tables alternately, the shorter ones repeated, cut to whole passes of the longest."""
    rows = max(len(table.prompt_tokens) for table in tables)
    prompt, output = (
        np.stack([np.resize(column, rows) for column in columns], axis=1).reshape(-1)
        for columns in ([t.prompt_tokens for t in tables], [t.output_tokens for t in tables])
    )
    return Lengths("+".join(table.name for table in tables), prompt, output)


def make_arrivals(
    lengths: Lengths, *, rate: float, num_requests: int, cv: float | None, seed: int,
    duration_s: float = MIN_DURATION_S, classes: Sequence[tuple[RequestClass, Lengths | None]] = (),
    surge: Surge | None = None,
) -> list[Arrival]:  # fmt: skip
    """Requests at `rate` per second: `num_requests`, or more if those would arrive within `duration_s` seconds.

    Lengths are drawn from the table in shuffled passes (each row once per pass). Gaps are Gamma distributed with
    mean 1/rate and coefficient of variation `cv` (1 is Poisson). With `cv` None the recorded arrivals are
    stretched to `rate`, repeated end to end if they are too few, in their order. Times scale with 1/rate for a
    fixed seed: two rates see the same pattern.

    With `classes` each request is of one of them, drawn in proportion to their shares, and has its terms; its lengths
    are from the class' own table, if there is one.

    A `surge` moves arrivals together where it raises the rate; `rate` is the base then.
    """
    numbers = (rate, num_requests, *(() if cv is None else (cv,)))
    if not all(0 < number < math.inf for number in numbers) or not 0 <= duration_s < math.inf:
        raise ValueError(f"{rate=}, {num_requests=} and {cv=} must all be greater than 0, and {duration_s=} at least 0")
    expected = rate * duration_s * (1.0 if surge is None else surge.mean_factor(duration_s))
    if max(num_requests, expected) > MOST_ARRIVALS:
        raise ValueError(
            f"{rate=:g} for {duration_s=:g} or {num_requests=} are more than {MOST_ARRIVALS:,} requests; lower one"
        )
    count = max(num_requests, math.ceil(expected))
    rows = len(lengths.prompt_tokens)
    if cv is None:
        times, index = recorded_times(lengths, count, rate=rate), np.arange(count) % rows
    else:
        times, index = gamma_times(count, rate=rate, cv=cv, seed=seed), shuffled_rows(rows, count, seed=seed)
    times = times if surge is None else surge.times(times)
    prompt, output = lengths.prompt_tokens[index], lengths.output_tokens[index]
    terms: list[Terms | None] = [lengths.terms[i] for i in index] if lengths.terms else [None] * count
    if classes:
        shares = np.array([each.share for each, _ in classes])
        drawn = np.random.default_rng([seed, 2]).choice(len(classes), count, p=shares / shares.sum())
        for number, (each, own) in enumerate(classes):
            places = np.flatnonzero(drawn == number)
            for place in places:
                terms[place] = each.terms
            if own is not None and len(places):
                own_index = shuffled_rows(len(own.prompt_tokens), len(places), seed=seed)
                prompt[places], output[places] = own.prompt_tokens[own_index], own.output_tokens[own_index]
    return [Arrival(float(t), int(p), int(o), each) for t, p, o, each in zip(times, prompt, output, terms, strict=True)]


def gamma_times(count: int, *, rate: float, cv: float, seed: int) -> NDArray[np.float64]:
    """`[count]` arrival seconds with Gamma distributed gaps of mean 1/rate; `cv` 0 is regular, rate inf all at 0."""
    generator = np.random.default_rng([seed, 1])
    gaps = generator.gamma(1 / cv**2, cv**2, count) if cv else np.ones(count)
    return np.cumsum(gaps) / rate


def recorded_times(lengths: Lengths, count: int, *, rate: float) -> NDArray[np.float64]:
    """`[count]` recorded arrival seconds stretched to `rate`, repeated end to end if they are too few.

    Raises:
        ValueError: arrivals were not recorded.
    """
    recorded_rate = lengths.recorded_rate
    assert lengths.arrival_s is not None
    rows = len(lengths.arrival_s)
    period = rows / recorded_rate
    times = np.concatenate([lengths.arrival_s + k * period for k in range(-(-count // rows))])[:count]
    return times * (recorded_rate / rate)


def shuffled_rows(rows: int, count: int, *, seed: int) -> NDArray[np.int64]:
    """`[count]` row numbers in shuffled passes over a table: each row once per pass."""
    generator = np.random.default_rng([seed, 0])
    return np.concatenate([generator.permutation(rows) for _ in range(-(-count // rows))])[:count]
