"""Groups of more samples than enter before one step: nobody waits for all of them, and they are all taken or none."""

import pytest

from apt_jax.engine_config import EngineConfig
from apt_jax.output import QueueFull
from apt_jax.request import FinishReason, SamplingParams
from apt_jax.serve.errors import RequestTimeout
from apt_jax.serve.runtime.group import SAMPLES_AT_ONCE
from tests.serve.test_serve_engine_thread import run, running, submit, tokens_of, until
from tests.support.fake_engine import FakeEngine


class Noting(FakeEngine):
    """Notes how many requests were added before each step."""

    def __init__(self, queued=1024):
        config = EngineConfig(
            max_num_seqs=4, max_num_queued_reqs=queued, max_num_batched_tokens=64, scheduling_policy="fcfs"
        )
        super().__init__(config, paced=True)
        self.added = [0]

    def add(self, *args, **options):
        found = super().add(*args, **options)
        self.added[-1] += 1
        return found

    def step(self):
        self.added.append(0)
        return super().step()


def test_a_thousand_samples_enter_a_few_before_each_step():
    """All of them entered before the next step: a stream waited for a tenth of a second and more."""

    async def main():
        engine = Noting()
        async with running(engine) as thread:
            stream = submit(thread, "stream", [10], max_tokens=100)
            await stream.accepted()
            many = submit(thread, "many", *[[20]] * 8, n=100, max_tokens=1)
            late = submit(thread, "late", [30], max_tokens=1)  # is taken before the last of the many
            engine.allow_step(1)
            await late.accepted()
            assert sum(engine.added) < 2 + 4 * SAMPLES_AT_ONCE
            engine.allow_step(1000)
            await many.accepted()
            assert max(engine.added) <= SAMPLES_AT_ONCE + 1 and sum(engine.added) == 802
            assert await tokens_of(many) == {i: [21] for i in range(800)}
            assert len((await tokens_of(stream))[0]) == 100

    run(main)


def test_who_leaves_or_is_too_late_meanwhile_is_forgotten():
    async def main():
        engine = Noting()
        async with running(engine) as thread:
            left, expired, kept = (submit(thread, name, [20], n=128, max_tokens=1) for name in ("a", "b", "c"))
            await until(lambda: sum(engine.added) > 0)
            left.close()
            expired.expire(RequestTimeout("too long"))
            with pytest.raises(RequestTimeout):
                await expired.accepted()
            engine.allow_step(1000)
            await kept.accepted()
            assert len(await tokens_of(kept)) == 128
            await until(lambda: not engine.has_unfinished and not thread._entering)
            assert sum(engine.added) <= 3 * 128 - 64

    run(main)


def test_a_group_that_does_not_fit_leaves_nothing_running():
    async def main():
        engine = Noting(queued=100)
        async with running(engine) as thread:
            stream = submit(thread, "stream", [10], max_tokens=20)
            many = submit(thread, "many", *[[20]] * 4, n=100, max_tokens=100)
            engine.allow_step(5)
            with pytest.raises(QueueFull):
                await many.accepted()
            engine.allow_step(1000)
            assert len((await tokens_of(stream))[0]) == 20
            await until(lambda: not engine.has_unfinished)
            assert engine.figures().num_held_blocks == 0

    run(main)


def test_a_wrong_sample_at_the_end_refuses_them_all():
    async def main():
        engine = Noting()
        async with running(engine) as thread:
            many = submit(thread, "many", *[[20]] * 200, [1000], max_tokens=1)
            engine.allow_step(1000)
            with pytest.raises(ValueError, match="token id 1000"):
                await many.accepted()
            await until(lambda: not engine.has_unfinished)

    run(main)


def test_the_end_of_the_server_ends_those_that_have_not_entered_too():
    async def main():
        engine = Noting()
        async with running(engine) as thread:
            many = submit(thread, "many", [20], n=128, max_tokens=100)
            await until(lambda: sum(engine.added) > 0)
            thread.abort_all()
            engine.allow_step(1000)
            await many.accepted()
            ends = [output.finish_reason async for outputs in many for _, output in outputs if output.finish_reason]
            assert ends == [FinishReason.ABORT] * 128

    run(main)


def test_an_engine_that_fails_fails_those_that_have_not_entered_too():
    async def main():
        engine = Noting()
        engine.fail_with = RuntimeError("no")
        async with running(engine) as thread:
            many = submit(thread, "many", [20], n=128, max_tokens=100)
            await until(lambda: sum(engine.added) > 0)
            engine.allow_step(1000)
            with pytest.raises(Exception, match="the engine failed"):
                await many.accepted()
            again = submit(thread, "again", [20], max_tokens=1)
            assert await tokens_of(again) == {0: [21]} and not thread._entering

    run(main)


def test_parameters_are_checked_once_for_all_samples_of_a_request():
    """Each of a thousand samples had its 300 biases compared with the vocabulary."""
    looked = []

    class Watched(dict):
        def __iter__(self):
            looked.append(len(self))
            return super().__iter__()

    params = SamplingParams(n=128, seed=1, logit_bias={i: 1 for i in range(300)})
    object.__setattr__(params, "logit_bias", Watched(params.logit_bias))
    for i in range(128):
        params.with_seed(i).check_vocabulary(300)
    assert looked == []
    with pytest.raises(ValueError, match=r"logit_bias has token id 299, the vocabulary is 0\.\.298"):
        params.with_seed(1).check_vocabulary(299)
    with pytest.raises(ValueError, match="stop_token_ids has token id 299"):
        SamplingParams(stop_token_ids=[5, 299]).check_vocabulary(299)
    SamplingParams().check_vocabulary(1)
