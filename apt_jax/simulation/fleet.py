"""Several simulated instances behind one router, and their number over time."""

from collections.abc import Callable
from dataclasses import dataclass

from apt_jax.request import Request
from apt_jax.routing.attainment import RecentAttainment
from apt_jax.routing.autoscaler import Autoscaler
from apt_jax.routing.instance import InstanceLoad
from apt_jax.routing.interface import Router, RouteRequest
from apt_jax.scheduling.length import LengthPredictor
from apt_jax.simulation.instance import Instance
from apt_jax.simulation.requests.columns import SimulatedRequest

CHECK_EVERY_S = 1.0  # between two decisions of the autoscaler
ENOUGH_FINISHED = 20  # requests from which on an attainment is reported to the autoscaler


@dataclass
class Member:
    """An instance's place in the fleet: when it takes requests, and its last report."""

    instance: Instance
    asked_s: float
    ready_s: float
    due_s: float  # when it reports next
    report: InstanceLoad
    ended_s: float | None = None  # when it stopped taking new requests
    num_requests: int = 0


class Fleet:
    """Instances 0, 1, ... as they were started; those that were ended keep their number.

    Args:
        start: makes an instance of a name.
        num_instances: at first.
        router: chooses among them; None needs exactly one.
        report_interval_s: seconds between two reports of an instance; 0 means that the router always sees the present.
            Instances report at times of their own.
        autoscaler: changes their number; None leaves it.
        start_s: seconds from asking for an instance until it takes requests.
    """

    def __init__(
        self,
        start: Callable[[str], Instance],
        num_instances: int = 1,
        router: Router | None = None,
        *,
        report_interval_s: float = 0.0,
        autoscaler: Autoscaler | None = None,
        start_s: float = 30.0,
    ):
        if num_instances < 1 or (router is None and (num_instances > 1 or autoscaler is not None)):
            raise ValueError(f"{num_instances=} must be at least 1, and more than one need a router")
        self._start, self._router, self._interval_s = start, router, report_interval_s
        self._autoscaler, self._start_s = autoscaler, start_s
        self._predictor = LengthPredictor()
        self._attainment = RecentAttainment(ENOUGH_FINISHED)
        self._check_s = 0.0
        self._num_ready = num_instances
        self.instances: list[Instance] = []
        self.members: list[Member] = []
        for number in range(num_instances):
            self._add(0.0, 0.0, phase=(number + 0.5) / num_instances)

    @property
    def is_routed(self) -> bool:
        """Whether there is a router, which sees instances between two iterations."""
        return self._router is not None

    def route(self, request: Request, now: float) -> int:
        """The number of the instance that gets `request`."""
        if self._router is None:
            self.members[0].num_requests += 1
            return 0
        if self._autoscaler is not None and now >= self._check_s:
            self._check_s = now + CHECK_EVERY_S
            self._scale(self._autoscaler, now)
        numbers = [i for i, m in enumerate(self.members) if m.ended_s is None and m.ready_s <= now]
        loads = [self._load(self.members[i], now) for i in numbers]
        asked = RouteRequest(request.num_prompt_tokens, now, slo=request.slo, token_ids=request.prompt_token_ids)
        number = numbers[self._router.choose(asked, loads)]
        self.members[number].num_requests += 1
        return number

    def end(self, number: int, now: float) -> list[SimulatedRequest]:
        """End the iteration of an instance; the requests that finished."""
        instance = self.instances[number]
        if self._router is None:
            return instance.end()
        if self._interval_s:
            self._load(self.members[number], now)  # a report that is due is of the state before
        finished = instance.end()
        for request in finished:
            self._predictor.learn(request)
            self._attainment.add(now, request.attained_strictly)
        return finished

    def instance_s(self, makespan_s: float) -> float:
        """Seconds of all instances, each from asking for it until its last iteration after it was ended."""
        total = 0.0
        for member in self.members:
            end_s = makespan_s
            if member.ended_s is not None:
                samples = member.instance.samples
                end_s = max(member.ended_s, samples[-1].end_s if samples else 0.0)
            total += end_s - member.asked_s
        return total

    def _add(self, asked_s: float, ready_s: float, phase: float) -> None:
        instance = self._start(str(len(self.members)))
        due_s = ready_s + phase * self._interval_s
        report = instance.load(ready_s, self._predictor)
        self.instances.append(instance)
        self.members.append(Member(instance, asked_s, ready_s, due_s, report))

    def _load(self, member: Member, now: float) -> InstanceLoad:
        """The last report of an instance. The state has not changed since any report that is due by now."""
        if self._interval_s == 0:
            return member.instance.load(now, self._predictor)
        if now >= member.due_s:
            due_s = member.due_s + (now - member.due_s) // self._interval_s * self._interval_s
            member.report = member.instance.load(due_s, self._predictor)
            member.due_s = due_s + self._interval_s
        return member.report

    def _scale(self, autoscaler: Autoscaler, now: float) -> None:
        staying = [member for member in self.members if member.ended_s is None]
        loads = [self._load(member, now) for member in staying if member.ready_s <= now]
        if len(loads) > self._num_ready:
            self._attainment.clear()
        self._num_ready = len(loads)
        desired = autoscaler.desired(loads, len(staying), now, self._attainment.share(now), self._attainment.per_s(now))
        for _ in range(desired - len(staying)):
            self._add(now, now + self._start_s, phase=0.5)
        # one that is not ready yet first: it serves nobody
        by_use = sorted(staying, key=lambda m: (m.ready_s <= now, m.instance.state.num_unfinished))
        for member in by_use[: max(len(staying) - desired, 0)]:
            member.ended_s = now
