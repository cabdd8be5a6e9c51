"""Simulations in parallel processes: single points, and searches in which one point follows from the last.

A job is a generator that yields `Task`s and is sent what each came to; what it returns is its answer. Answers depend
on nothing but the tasks' results, so they are the same whatever the number of processes.
"""

import multiprocessing
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from apt_jax.scheduling.costs.host_times import host_time
from apt_jax.simulation.experiment import Configuration, Experiment
from apt_jax.simulation.instance import Sample
from apt_jax.simulation.report import Report
from apt_jax.simulation.throughput.questions import Question


@dataclass(frozen=True)
class Task:
    """One simulation: `rate` None is the recorded one; with `questions` it ends as soon as they are decided."""

    experiment: Experiment
    configuration: Configuration
    rate: float | None
    questions: tuple[Question, ...] = ()
    with_timeline: bool = False


@dataclass(frozen=True)
class Point:
    """What a task came to.

    Attributes:
        report: of a simulation that ran to its end.
        kept: the questions whose target was kept.
        sustained: whether the rate lasts; None if arrivals were too short to say.
        samples: of the first instance's iterations, and `first_tokens_s` of all requests, if asked for.
    """

    report: Report | None
    kept: frozenset[Question] = frozenset()
    sustained: bool | None = None
    samples: tuple[Sample, ...] = ()
    first_tokens_s: tuple[float, ...] = ()


USUAL_REQUESTS = 100  # unfinished at a time
Job = Generator[Task, Point, Any]


def simulate_point(task: Task) -> Point:
    """Run one task. Pure: the same task gives the same point in every process."""
    outcome, report = task.experiment.run(*task.configuration, task.rate, questions=task.questions)
    samples: tuple[Sample, ...] = ()
    first: tuple[float, ...] = ()
    if task.with_timeline:
        samples = tuple(outcome.samples_by_instance[0])
        first = tuple(r.ttft_s for r in outcome.requests if r.ttft_s is not None)
    standing = outcome.standing
    kept = frozenset(question for question in task.questions if question.is_kept(standing))
    return Point(report, kept, outcome.is_sustained() if task.questions else None, samples, first)


def run_jobs(
    jobs: Sequence[Job], num_processes: int, on_point: Callable[[Task], None] = lambda task: None
) -> list[Any]:
    """What each job returns, in order.

    Of the tasks that are ready the longest goes first, so that at the end no process waits for a search of others.

    Args:
        jobs: started here.
        num_processes: 1 runs all of it in this one.
        on_point: told of each task that is done.

    Raises:
        ValueError: as `Experiment.run`, of the first task that fails.
    """
    num_processes = min(num_processes, len(jobs))  # no job runs two tasks at once
    if num_processes <= 1:
        return [_alone(job, on_point) for job in jobs]
    answers: list[Any] = [None] * len(jobs)
    running: dict[Future[Point], tuple[int, Task]] = {}
    ready: list[tuple[float, int, Task]] = []
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    with ProcessPoolExecutor(num_processes, mp_context=context) as pool:

        def advance(number: int, point: Point | None) -> None:
            try:
                task = next(jobs[number]) if point is None else jobs[number].send(point)
            except StopIteration as end:
                answers[number] = end.value
            else:
                ready.append((-_cost(task), number, task))

        def hand_out() -> None:
            ready.sort(key=lambda entry: entry[:2])
            while ready and len(running) < num_processes:
                _, number, task = ready.pop(0)
                running[pool.submit(simulate_point, task)] = number, task

        try:
            for number in range(len(jobs)):
                advance(number, None)
            hand_out()
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    number, task = running.pop(future)
                    point = future.result()
                    on_point(task)
                    advance(number, point)
                hand_out()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return answers


def _cost(task: Task) -> float:
    """About how long a simulation takes, as far as is known before: as its policy does to decide."""
    return host_time(task.configuration[0]).seconds(USUAL_REQUESTS)


def _alone(job: Job, on_point: Callable[[Task], None]) -> Any:
    try:
        task = next(job)
        while True:
            point = simulate_point(task)
            on_point(task)
            task = job.send(point)
    except StopIteration as end:
        return end.value
