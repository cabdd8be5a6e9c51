"""The search for effective throughput: highest rates that are kept and last, each point simulated once."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

from apt_jax.simulation.experiment import Configuration, Experiment
from apt_jax.simulation.throughput.grid import highest, nearest, rate_of
from apt_jax.simulation.throughput.points import Point, Task
from apt_jax.simulation.throughput.questions import Question

START_SHARE = 0.7  # of the fluid bound: where the first question is asked


@dataclass(frozen=True)
class Found:
    """The answer to one question.

    Attributes:
        rate: highest rate found that keeps the target and lasts, in requests per second; 0.0 if there is none.
        sustained: whether it is known to last; None if arrivals were too short to say.
        not_sustained: highest rate simulated that keeps the target but does not last; 0.0 if there is none.
    """

    rate: float
    sustained: bool | None
    not_sustained: float


def search(
    experiment: Experiment, configuration: Configuration, questions: Sequence[Question]
) -> Generator[Task, Point, dict[Question, Found]]:
    """A job (`points`) that answers all `questions`, the hardest first; each begins where the last one ended."""
    asked = tuple(questions)
    known: dict[int, Point] = {}
    start, step = nearest(START_SHARE * experiment.fluid_bound(configuration)), 4
    answers: dict[Question, int | None] = {}
    for question in sorted(asked, key=lambda q: (-q.target, q.reading != "strict")):
        asking = highest(start, step)
        number = next(asking)
        while question not in answers:
            if number not in known:
                known[number] = yield Task(experiment, configuration, rate_of(number), asked)
            point = known[number]
            try:
                number = asking.send(question in point.kept and point.sustained is not False)
            except StopIteration as end:
                answers[question] = end.value
        found = answers[question]
        start, step = (start if found is None else found), 2
    return {question: _found(question, answers[question], known) for question in asked}


def _found(question: Question, number: int | None, known: dict[int, Point]) -> Found:
    passing = [n for n, point in known.items() if question in point.kept and point.sustained is False]
    return Found(
        rate=0.0 if number is None else rate_of(number),
        sustained=None if number is None else known[number].sustained,
        not_sustained=rate_of(max(passing)) if passing else 0.0,
    )


def throughput_rows(
    names: dict[str, Any], questions: Sequence[Question], seeds: Sequence[int], found: Sequence[dict[Question, Found]],
    bound: float,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of `effective_throughput` for one configuration: mean and spread over its seeds' searches.

    Args:
        names: what the configuration is, first in every row.
        questions: asked.
        seeds: of `found`, in order.
        found: the answers for each seed.
        bound: the fluid bound, requests per second.
    """
    rows = []
    for question in questions:
        answers = [each[question] for each in found]
        mean, spread = mean_and_spread([answer.rate for answer in answers])
        lasts = {answer.sustained for answer in answers}
        rows.append(
            {
                **names, "reading": question.reading,
                "target": question.target, "rate": _rounded(mean), "spread": _rounded(spread), "seeds": list(seeds),
                "rates": [answer.rate for answer in answers],
                "sustained": True if lasts == {True} else None if None in lasts else False,
                "not_sustained": max(answer.not_sustained for answer in answers),
                "fluid_bound": _rounded(bound), "share_of_bound": _rounded(mean / bound),
            }
        )  # fmt: skip
    return rows


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and standard deviation of the sample; 0 of a single value."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, 0.0
    return mean, float((sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5)


def _rounded(number: float) -> float:
    return float(f"{number:.4g}")
