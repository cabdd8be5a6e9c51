"""A simulated fleet by hand: when instances report, when they take requests, who goes first, and seconds paid for."""

import pytest

from apt_jax.request import SamplingParams, Slo
from apt_jax.routing.catalogue import make_router
from apt_jax.scheduling.policies.catalogue import make_policy
from apt_jax.scheduling.state import Limits
from apt_jax.simulation.fleet import Fleet
from apt_jax.simulation.instance import Instance
from apt_jax.simulation.requests.columns import SimulatedRequest
from tests.unit.test_simulated_timeline import SECONDS


def start(name):
    return Instance(make_policy("fcfs"), SECONDS, num_blocks=100, limits=Limits(8, 64, "kv"), name=name)


class First:
    """Takes the first instance that it is shown, and remembers all of them."""

    def __init__(self):
        self.seen = []

    def choose(self, request, loads):
        self.seen.append((request, loads))
        return 0


class Scripted:
    """Says one number after the other, then what there is."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def desired(self, loads, num_instances, now, attainment=None, ended_per_s=0.0):
        self.asked.append((len(loads), num_instances, now, attainment, ended_per_s))
        return self.answers.pop(0) if self.answers else num_instances


def a_request(number, now, slo=None):
    return SimulatedRequest(f"r{number}", range(7), SamplingParams(max_tokens=None), now, 50, slo=slo or Slo(1.0, 1.0))


def send(fleet, now, number=0, output=1, **fields):
    """Route a request; the number of its instance, which has it in its queue."""
    request = a_request(number, now, **fields)
    chosen = fleet.route(request, now)
    fleet.instances[chosen].add(request, output)
    return chosen


def serve(fleet, number, now):
    """One iteration of an instance; when it ended."""
    end_s = fleet.instances[number].begin(now)
    fleet.end(number, end_s)
    return end_s


def test_reports_are_made_at_each_instance_s_own_times():
    """Every second: the first of two a quarter of a second after the whole ones, the second three quarters."""
    router = First()
    fleet = Fleet(start, 2, router, report_interval_s=1.0)
    for now in (0.0, 0.2, 0.25, 0.8, 2.2, 2.25, 9.5):
        fleet.route(a_request(0, now), now)
        for instance in fleet.instances:  # a report is counted anew only where something has changed
            instance.add(a_request(0, now), 1)
    assert [[load.time_s for load in loads] for _, loads in router.seen] == [
        [0.0, 0.0], [0.0, 0.0], [0.25, 0.0], [0.25, 0.75], [1.25, 1.75], [2.25, 1.75], [9.25, 8.75],
    ]  # fmt: skip
    assert [load.instance for load in router.seen[0][1]] == ["0", "1"]


def test_a_router_is_told_what_is_known_of_a_request_and_the_present_where_no_interval_is_set():
    router = First()
    fleet = Fleet(start, 2, router)
    send(fleet, 3.0, slo=Slo(0.5, 0.25))
    send(fleet, 4.0)
    request, loads = router.seen[0]
    assert (request.prompt_tokens, request.time_s, request.slo, request.waited_s) == (7, 3.0, Slo(0.5, 0.25), 0.0)
    assert [load.num_waiting for load in loads] == [0, 0]
    assert [load.num_waiting for load in router.seen[1][1]] == [1, 0]
    assert [member.num_requests for member in fleet.members] == [2, 0]


def test_a_report_that_is_due_at_the_end_of_an_iteration_is_of_the_state_before_it():
    router = First()
    fleet = Fleet(start, 1, router, report_interval_s=1.0)  # reports at half past
    send(fleet, 0.0)
    assert serve(fleet, 0, 0.0) == 1.0  # it ends at 1 s and leaves nothing
    fleet.route(a_request(1, 1.2), 1.2)
    assert [(load.time_s, load.num_running) for load in router.seen[-1][1]] == [(0.5, 1)]
    fleet.route(a_request(2, 1.5), 1.5)
    assert [(load.time_s, load.num_running) for load in router.seen[-1][1]] == [(1.5, 0)]


def test_an_instance_takes_requests_when_it_is_ready_and_decisions_are_a_second_apart():
    scaler, router = Scripted(2), First()
    fleet = Fleet(start, 1, router, autoscaler=scaler, start_s=30.0)
    for now in (0.0, 0.9, 1.0, 1.5, 29.9, 30.0, 40.0):
        fleet.route(a_request(0, now), now)
    assert [(loads, count, now) for loads, count, now, *_ in scaler.asked] == [
        (1, 1, 0.0), (1, 2, 1.0), (1, 2, 29.9), (2, 2, 40.0),
    ]  # fmt: skip
    assert [len(loads) for _, loads in router.seen] == [1, 1, 1, 1, 1, 2, 2]
    member = fleet.members[1]
    assert (member.asked_s, member.ready_s, member.instance.name) == (0.0, 30.0, "1")


def test_a_new_instance_reports_at_half_past():
    router = First()
    fleet = Fleet(start, 1, router, report_interval_s=1.0, autoscaler=Scripted(2), start_s=10.0)
    for now in (0.0, 10.25, 10.75):
        fleet.route(a_request(0, now), now)
        fleet.instances[-1].add(a_request(0, now), 1)
    assert [loads[-1].time_s for _, loads in router.seen[1:]] == [10.0, 10.5]


def test_an_instance_takes_half_a_minute_to_start_where_nothing_is_said():
    fleet = Fleet(start, 1, First(), autoscaler=Scripted(3))
    fleet.route(a_request(0, 2.0), 2.0)
    assert [member.ready_s for member in fleet.members] == [0.0, 32.0, 32.0]


def test_one_that_is_not_ready_is_ended_first_and_then_the_one_with_the_fewest_requests():
    scaler = Scripted(3, 2, 1)
    fleet = Fleet(start, 2, make_router("round-robin"), autoscaler=scaler)
    assert [send(fleet, 0.0), send(fleet, 0.1), send(fleet, 0.2)] == [0, 1, 0]
    send(fleet, 1.0)
    assert [member.ended_s for member in fleet.members] == [None, None, 1.0], "the third was not ready"
    fleet.instances[1].add(a_request(7, 1.0), 1)
    fleet.instances[1].add(a_request(8, 1.0), 1)
    fleet.instances[1].add(a_request(9, 1.0), 1)
    assert send(fleet, 2.0) == 1
    assert [member.ended_s for member in fleet.members] == [2.0, None, 1.0]


def test_seconds_are_paid_from_asking_to_the_last_iteration():
    fleet = Fleet(start, 2, make_router("round-robin"), autoscaler=Scripted(2, 3, 1))
    assert send(fleet, 0.0, output=3) == 0
    assert fleet.instance_s(10.0) == 20.0
    assert send(fleet, 1.0) == 1  # a third is asked for
    assert fleet.instance_s(10.0) == 10.0 + 10.0 + 9.0
    serve(fleet, 1, 1.0)
    send(fleet, 2.0)  # and ended again, and the second, which has nothing to do
    assert [member.ended_s for member in fleet.members] == [None, 2.0, 2.0]
    assert fleet.instance_s(10.0) == 10.0 + 2.0 + 1.0
    fleet.instances[1].add(a_request(9, 2.0), 2)
    assert serve(fleet, 1, 2.5) == 3.5  # what it had is served to the end
    assert fleet.instance_s(10.0) == 10.0 + 3.5 + 1.0


def test_the_autoscaler_is_told_the_attainment_of_twenty_and_forgets_it_when_an_instance_is_ready():
    scaler = Scripted(2)
    fleet = Fleet(start, 1, First(), autoscaler=scaler, start_s=30.0)
    fleet.route(a_request(0, 0.0), 0.0)
    for number in range(20):
        late = number < 5
        fleet.instances[0].add(a_request(number, 1.0 if not late else -1.0), 1)
        if number == 18:
            fleet.instances[0].begin(1.0)  # 8 a step: the tests' limit
            while fleet.end(0, 2.0) and fleet.instances[0].begin(1.0):
                pass
            fleet.route(a_request(0, 2.0), 2.0)
    fleet.instances[0].begin(1.0)
    fleet.end(0, 2.0)
    fleet.route(a_request(0, 3.0), 3.0)
    attainments = [attainment for *_, attainment, _ in scaler.asked]
    assert attainments == [None, None, 15 / 20]
    assert scaler.asked[-1][-1] == pytest.approx(20 / 1.0)
    fleet.route(a_request(0, 30.0), 30.0)
    assert scaler.asked[-1][3] is None and scaler.asked[-1][-1] == pytest.approx(20 / 28.0)
    for number in range(20):
        fleet.instances[1].add(a_request(number, 31.0), 1)
    now = 31.0
    while (end_s := fleet.instances[1].begin(now)) is not None:
        now = end_s
        fleet.end(1, now)
    fleet.route(a_request(0, now + 1.0), now + 1.0)
    assert scaler.asked[-1][3] is not None, "it is forgotten once, when the instance is ready"


@pytest.mark.parametrize(("count", "router"), [(0, First()), (2, None)])
def test_no_instance_or_several_without_a_router_are_refused(count, router):
    with pytest.raises(ValueError, match=f"num_instances={count} must be at least 1, and more than one need a router"):
        Fleet(start, count, router)
    with pytest.raises(ValueError, match="need a router"):
        Fleet(start, 1, autoscaler=Scripted())
