"""An engine whose policy raises: nothing is lost by it, and what is in flight is read."""

import pytest

from apt_jax.engine.engine import Engine
from apt_jax.model_config import ModelConfig
from apt_jax.output import PolicyFailed
from apt_jax.request import FinishReason, SamplingParams
from apt_jax.scheduling.costs.step_load import StepLoad
from apt_jax.scheduling.idling import MOST_IDLE_S
from apt_jax.scheduling.plan import Plan
from apt_jax.scheduling.policies.catalogue import make_policy
from tests.support.checkpoint_folders import random_model
from tests.support.engines import Orders, finish, make_engine, run

CONFIG = ModelConfig(
    vocab_size=96, hidden_size=32, num_hidden_layers=2, ffn_dim=64, max_position_embeddings=64,
    num_attention_heads=2, word_embed_proj_dim=32, eos_token_ids=(2,),
)  # fmt: skip
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


class Moody(Orders):
    """Raises in its attempts number `bad` to plan, or about ends."""

    def __init__(self, bad=(), ends=False):
        super().__init__({})
        self.bad, self.ends, self.attempts = bad, ends, 0

    def schedule(self, state, now) -> Plan:
        self.attempts += 1
        if self.attempts in self.bad:
            raise ZeroDivisionError("division by zero")
        return super().schedule(state, now)

    def finished(self, request, now) -> None:
        if self.ends:
            raise KeyError(request.request_id)


@pytest.fixture(scope="module", params=[False, True], ids=["sync", "async"])
def engine(request) -> Engine:
    return make_engine(random_model(CONFIG, seed=0), CONFIG, async_scheduling=request.param)


@pytest.fixture(scope="module")
def tokens(engine) -> list[int]:
    engine.policy = Moody()
    return run(engine, [[5, 6, 7]], GREEDY)[0].output_token_ids


@pytest.mark.parametrize("bad", [{1}, {1, 2, 3}, {3}, {3, 4, 6}])
def test_a_policy_that_raises_delays_its_requests_and_changes_no_token(engine, tokens, bad):
    engine.policy, before = Moody(bad), engine.figures().num_failed_steps
    request = engine.add([5, 6, 7], GREEDY, request_id="r")
    raised: list[str] = []
    while engine.has_unfinished:
        try:
            engine.step()
        except PolicyFailed as error:
            raised.append(str(error))
        engine.state.check()
    assert request.output_token_ids == tokens and request.finish_reason is FinishReason.LENGTH
    assert set(raised) <= {"policy 'fcfs' raised: division by zero"}
    assert len(raised) + engine.figures().num_failed_steps - before == len(bad), "each is seen once"


def test_what_was_ended_is_reported_without_the_policy(engine):
    engine.policy = Moody(range(100))
    engine.add([5], GREEDY, request_id="r")
    with pytest.raises(PolicyFailed):
        engine.step()
    engine.abort("r")
    (output,) = finish(engine)
    assert output.finish_reason is FinishReason.ABORT
    engine.renew_policy()
    assert run(engine, [[5]], GREEDY)[0].finish_reason is FinishReason.LENGTH


def test_a_policy_that_raises_about_an_end_takes_no_output_away(engine, tokens):
    engine.policy, before = Moody(ends=True), engine.figures().num_failed_steps
    engine.add([5, 6, 7], GREEDY, request_id="r")
    outputs = finish(engine)
    assert [token for output in outputs for token in output.token_ids] == tokens
    engine.add([5, 6, 7], GREEDY, request_id="s")
    engine.abort("s")
    assert [output.finish_reason for output in finish(engine)] == [FinishReason.ABORT]
    assert engine.figures().num_failed_steps == before + 2


def test_the_longest_step_is_no_shorter_than_one_of_all_seats(engine):
    model, longest = engine.times.calibration.model, engine.longest_step_s
    assert longest >= model.step_s(StepLoad(16, 16 * 64, samples=8)) > 0
    assert longest >= model.step_s(StepLoad(decode_requests=8, context_tokens=(160, 0), samples=8))
    assert longest >= model.step_s(StepLoad(decode_requests=8, context_tokens=(0, 320), samples=8))


class Sleepy(Orders):
    """Plans nothing for a second after each plan, or for ever."""

    def __init__(self, for_ever=False):
        super().__init__({})
        self.for_ever, self.asked_s, self.planned_s = for_ever, [], None

    def schedule(self, state, now) -> Plan:
        self.asked_s.append(now)
        if self.for_ever or (self.planned_s is not None and now < self.planned_s + 1.0):
            return Plan(wake_at_s=now + 1.0 if self.for_ever else self.planned_s + 1.0)
        self.planned_s = now
        return super().schedule(state, now)


def drive(engine, clock):
    """Step as the server's thread does, which sleeps while the engine idles; what it slept."""
    slept = []
    while engine.has_unfinished:
        engine.step()
        slept.append(engine.idle_s)
        clock[0] += engine.idle_s
        assert len(slept) < 100
    return slept


def test_a_policy_that_waits_on_purpose_is_waited_for(engine, tokens, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(engine, "_clock", lambda: clock[0])
    engine.policy = Sleepy()
    request = engine.add([5, 6, 7], GREEDY, request_id="r")
    slept = drive(engine, clock)
    assert request.output_token_ids == tokens and sum(slept) == pytest.approx(5.0)
    assert engine.idle_s == 0


def test_a_policy_that_only_waits_is_given_up_and_an_arrival_wakes_it(engine, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(engine, "_clock", lambda: clock[0])
    engine.policy = Sleepy(for_ever=True)
    request = engine.add([5, 6, 7], GREEDY, request_id="r")
    engine.step()
    assert engine.idle_s == 1.0
    second = engine.add([5], GREEDY, request_id="s")
    assert engine.idle_s == 0, "somebody came"
    engine.abort("s")
    drive(engine, clock)
    assert second.finish_reason is FinishReason.ABORT and request.finish_reason is FinishReason.ERROR
    assert clock[0] - 1000.0 == pytest.approx(MOST_IDLE_S), "not for ever"
    engine.renew_policy()


def test_fuller_batches_change_no_token(engine, tokens):
    engine.policy = make_policy("wait:force_after_s=0.02")
    assert run(engine, [[5, 6, 7], [5, 6, 7]], GREEDY)[1].output_token_ids == tokens
    engine.renew_policy()
