"""History of each request by step: why it ran, waited, was converted, demoted or preempted.

Successive steps with the same action and reason are one event with a count, so that a long answer has a short history.
A request that keeps waiting costs nothing per step: the set of waiting requests is compared with the previous step's,
and only requests that begin or end waiting are processed.
"""

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

from apt_jax.engine.interface import EngineFigures
from apt_jax.request import Request
from apt_jax.scheduling.plan import Reason
from apt_jax.serve.openai.slo_report import slo_report
from apt_jax.serve.runtime.observer import Observer, Stepped

SAMPLE = r"(-\d{1,6}){0,2}"  # of the id of a completion's sample: numbers of its prompt and of itself
KEPT_REQUESTS = 2000  # finished ones; the oldest is forgotten
KEPT_EVENTS = 200  # per request; then those after the first KEPT_FIRST are forgotten, the oldest of them first
KEPT_FIRST = 40
SHOWN_REQUESTS = 200  # in short


@dataclass(slots=True)
class Event:
    """`count` successive steps, from time `first_s` to `last_s` of the engine's clock, that did the same."""

    action: str
    reason: str
    first_s: float
    last_s: float
    count: int = 1
    tokens: int = 0  # of it that the model ran
    since_step: int | None = None  # while it continues: the step since which `count` and `last_s` are not updated


@dataclass(slots=True)
class Story:
    """One request's."""

    request: Request
    events: list[Event] = field(default_factory=list)
    num_forgotten: int = 0  # events

    def add(self, action: str, reason: str, now: float, tokens: int = 0) -> Event:
        """Another step; returns the event that it is part of."""
        last = self.events[-1] if self.events else None
        if last is not None and (last.action, last.reason) == (action, reason):
            last.last_s = now
            last.count += 1
            last.tokens += tokens
            return last
        self.events.append(Event(action, reason, now, now, tokens=tokens))
        if len(self.events) > KEPT_EVENTS:
            del self.events[KEPT_FIRST]
            self.num_forgotten += 1
        return self.events[-1]


class History(Observer):
    """Keeps the stories of unfinished requests and of the newest finished ones. Safe to read from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stories: OrderedDict[str, Story] = OrderedDict()
        self._finished: OrderedDict[str, None] = OrderedDict()
        self._waiting: dict[Reason, tuple[Request, ...]] = {}  # of the last step
        self._waits: dict[Request, Event] = {}  # that continue
        self._step, self._step_s = 0, 0.0  # number and time of the last one

    def stepped(self, figures: EngineFigures, step: Stepped) -> None:
        """Take in the step's plan."""
        with self._lock:
            plan = figures.plan
            waiting: dict[Reason, tuple[Request, ...]] = {}
            for waited in plan.waited:
                waiting[waited.reason] = waiting.get(waited.reason, ()) + waited.requests
            changed = waiting != self._waiting
            if changed:
                self._end_waits(waiting)
            self._step, self._step_s = self._step + 1, step.began_s
            for action, request, reason in replace(plan, waited=(), scheduled=()).decisions():
                self._story(request).add(action, reason.value, step.began_s)
            for run in plan.scheduled:
                self._story(run.request).add("scheduled", run.reason.value, step.began_s, run.num_tokens)
            if changed:
                self._begin_waits(waiting)
            for output in step.outputs:
                if output.finish_reason is not None:
                    story = self._story(output.request)
                    story.add("finished", output.error or output.finish_reason.value, step.began_s)
                    self._finished[output.request.request_id] = None
            while len(self._finished) > KEPT_REQUESTS:
                self._stories.pop(self._finished.popitem(last=False)[0], None)

    def of(self, request_id: str) -> list[dict[str, Any]]:
        """The stories of the request with this id, or of the samples of the completion with this id."""
        with self._lock:
            known = re.compile(re.escape(request_id) + SAMPLE)
            names = [name for name in self._stories if known.fullmatch(name)]
            return [self._shown(self._stories[name]) for name in names]

    def newest(self) -> list[dict[str, Any]]:
        """The newest requests in short: those under way, then those that have ended."""
        with self._lock:
            ended = [self._stories[name] for name in [*self._finished][-SHOWN_REQUESTS:] if name in self._stories]
            under_way = [story for story in self._stories.values() if story.request.finish_reason is None]
            return newest_first(map(_in_short, [*under_way[-SHOWN_REQUESTS:], *ended]))

    def _end_waits(self, waiting: dict[Reason, tuple[Request, ...]]) -> None:
        """End the events of requests that no longer wait, or for another reason; they lasted until the last step."""
        for reason, requests in self._waiting.items():
            for request in set(requests).difference(waiting.get(reason, ())):
                event = self._waits.pop(request)
                event.count, event.last_s, event.since_step = self._count(event), self._step_s, None

    def _begin_waits(self, waiting: dict[Reason, tuple[Request, ...]]) -> None:
        for reason, requests in waiting.items():
            for request in set(requests).difference(self._waiting.get(reason, ())):
                event = self._waits[request] = self._story(request).add("waited", reason.value, self._step_s)
                event.since_step = self._step
        self._waiting = waiting

    def _count(self, event: Event) -> int:
        return event.count + (0 if event.since_step is None else self._step - event.since_step)

    def _story(self, request: Request) -> Story:
        story = self._stories.get(request.request_id)
        if story is None or story.request is not request:
            story = self._stories[request.request_id] = Story(request)
        return story

    def _shown(self, story: Story) -> dict[str, Any]:
        request = story.request
        return {
            "id": request.request_id,
            "status": request.status.value,
            "finish_reason": None if request.finish_reason is None else request.finish_reason.value,
            "prompt_tokens": request.num_prompt_tokens,
            **({} if request.num_cached_tokens is None else {"cached_tokens": request.num_cached_tokens}),
            "tokens": len(request.output_token_ids),
            "priority": request.priority,
            "slo": slo_report([request]),
            "arrived_ago_ms": _ms(time.monotonic() - request.arrival_s),
            "token_ms": _token_times_ms(request),
            "events": [self._event(event, request.arrival_s) for event in story.events],
            **({"events_forgotten": story.num_forgotten} if story.num_forgotten else {}),
        }

    def _event(self, event: Event, arrival_s: float) -> dict[str, Any]:
        last_s = event.last_s if event.since_step is None else self._step_s
        return {
            "action": event.action,
            "reason": event.reason,
            "after_ms": _ms(event.first_s - arrival_s),
            "until_ms": _ms(last_s - arrival_s),
            "steps": self._count(event),
            **({"tokens": event.tokens} if event.tokens else {}),
        }


def newest_first(requests: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Requests in short: those under way, then those that have ended, each the newest first; the first of them."""
    ranked = sorted(requests, key=lambda entry: (entry["finish_reason"] is not None, entry["arrived_ago_ms"]))
    return ranked[:SHOWN_REQUESTS]


def _in_short(story: Story) -> dict[str, Any]:
    request, last = story.request, story.events[-1]
    return {
        "id": request.request_id,
        "status": request.status.value,
        "finish_reason": None if request.finish_reason is None else request.finish_reason.value,
        "arrived_ago_ms": _ms(time.monotonic() - request.arrival_s),
        "prompt_tokens": request.num_prompt_tokens,
        "tokens": len(request.output_token_ids),
        "priority": request.priority,
        "slo": slo_report([request]),
        "doing": last.reason,
    }


def _token_times_ms(request: Request) -> list[float]:
    """When the engine had each token of an answer, after arrival; not those that it brought with it."""
    if request.first_token_s is None:
        return []
    return [_ms(at - request.arrival_s) for at in accumulate(list(request.gaps_s), initial=request.first_token_s)]


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)
