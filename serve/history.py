"""What became of each request, step by step: why it ran, waited, was converted, demoted or preempted.

Successive steps with the same action and reason are one event with a count, so that a long answer stays short here.
"""

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from apt_jax.request import Request
from serve.observer import Observer, Stepped
from serve.slo_report import slo_report

if TYPE_CHECKING:
    from apt_jax.engine import Engine

KEPT_REQUESTS = 2000  # finished ones; the oldest is forgotten
KEPT_EVENTS = 200  # per request; the oldest is forgotten


@dataclass(slots=True)
class Event:
    """`count` successive steps, from time `first_s` to `last_s` of the engine's clock, that did the same."""

    action: str
    reason: str
    first_s: float
    last_s: float
    count: int = 1


@dataclass(slots=True)
class Story:
    """One request's."""

    request: Request
    events: list[Event] = field(default_factory=list)

    def add(self, action: str, reason: str, now: float) -> None:
        """Another step."""
        last = self.events[-1] if self.events else None
        if last is not None and (last.action, last.reason) == (action, reason):
            last.last_s = now
            last.count += 1
            return
        self.events.append(Event(action, reason, now, now))
        if len(self.events) > KEPT_EVENTS:
            del self.events[0]


class History(Observer):
    """Keeps the stories of unfinished requests and of the newest finished ones. Safe to read from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stories: OrderedDict[str, Story] = OrderedDict()
        self._finished: OrderedDict[str, None] = OrderedDict()

    def stepped(self, engine: "Engine", step: Stepped) -> None:
        """Take in the step's plan."""
        with self._lock:
            for action, request, reason in engine.last_plan.decisions():
                self._story(request).add(action, reason.value, step.began_s)
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
            names = [n for n in self._stories if n == request_id or n.startswith(f"{request_id}-")]
            return [_shown(self._stories[name]) for name in names]

    def _story(self, request: Request) -> Story:
        story = self._stories.get(request.request_id)
        if story is None or story.request is not request:
            story = self._stories[request.request_id] = Story(request)
        return story


def _shown(story: Story) -> dict[str, Any]:
    request = story.request
    return {
        "id": request.request_id,
        "status": request.status.value,
        "finish_reason": None if request.finish_reason is None else request.finish_reason.value,
        "prompt_tokens": request.num_prompt_tokens,
        "tokens": len(request.output_token_ids),
        "priority": request.priority,
        "slo": slo_report([request]),
        "events": [
            {
                "action": event.action,
                "reason": event.reason,
                "after_ms": round(1000 * (event.first_s - request.arrival_s), 3),
                "until_ms": round(1000 * (event.last_s - request.arrival_s), 3),
                "steps": event.count,
            }
            for event in story.events
        ],
    }
