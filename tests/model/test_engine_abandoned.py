"""Requests that the policy abandons: each is reported once, with what it has, and its blocks are free."""

from dataclasses import replace

from apt_jax.request import FinishReason
from apt_jax.scheduling.plan import Abandoned, Reason
from tests.model.test_engine import CONFIG
from tests.support.checkpoint_folders import random_model
from tests.support.engines import GREEDY, Orders, finish, make_engine


def test_a_request_that_the_policy_abandons_is_reported_once_with_what_it_has():
    model = random_model(CONFIG, seed=0)

    class GivesUp(Orders):
        def schedule(self, state, now):
            late = [r for r in (*state.running, *state.waiting) if r.request_id in given_up]
            plan = super().schedule(state, now)
            kept = tuple(entry for entry in plan.scheduled if entry.request not in late)
            return replace(plan, scheduled=kept, abandoned=tuple(Abandoned(r, Reason.ABANDONED_LATE) for r in late))

        def finished(self, request, now):
            told.append(request.request_id)

    for is_async in (False, True):
        given_up, told = set(), []
        engine = make_engine(model, CONFIG, async_scheduling=is_async)
        engine.policy = GivesUp(kinds={})
        first = engine.add([5, 6], replace(GREEDY, max_tokens=9), request_id="first")
        outputs = [output for _ in range(3) for output in engine.step()]
        engine.add([7], GREEDY, request_id="second")
        given_up |= {"first", "second"}
        outputs += engine.step()
        assert not engine.has_unfinished
        ends = [o for o in outputs if o.finish_reason is not None]
        assert [(o.request.request_id, o.finish_reason, o.error) for o in ends] == [
            ("first", FinishReason.ABANDONED, None), ("second", FinishReason.ABANDONED, None)
        ]  # fmt: skip
        assert told == ["first", "second"]
        assert first.output_token_ids == [token for o in outputs for token in o.token_ids] and first.output_token_ids
        assert engine.state.pool.num_free == engine.state.pool.num_blocks


def test_the_operator_s_limit_ends_what_waits_and_leaves_what_is_served():
    engine = make_engine(random_model(CONFIG, seed=0), CONFIG, max_num_seqs=1, ttft_slo_ms=0.001, abandon_after=0.0)
    for _ in range(2):  # also after the policy was made anew
        served = engine.add([5, 6], replace(GREEDY, max_tokens=4), request_id="served")
        waiting = engine.add([7], GREEDY, request_id="waiting")
        (output,) = [o for o in engine.step() if o.finish_reason is not None]
        assert (output.request, output.finish_reason, output.token_ids) == (waiting, FinishReason.ABANDONED, ())
        finish(engine)
        assert served.finish_reason is FinishReason.LENGTH and not served.attained
        engine.renew_policy()
