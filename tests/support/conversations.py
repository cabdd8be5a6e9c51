"""Random conversations on an engine: shared beginnings, turns, salts, aborts, resumed requests, emptied caches."""

import random
from collections.abc import Callable

from apt_jax.request import FinishReason, Request, SamplingParams


class Conversations:
    """Turns of several users on one engine, with three beginnings, two salts, aborts, resumes and resets, by a seed.

    Args:
        engine: idle.
        draw: makes every choice.
        vocabulary: tokens are below it.
        params: of a request that is to generate so many tokens.
        tokens: most tokens of the shared beginning, of a question, of an answer, and of a conversation that goes on.
    """

    def __init__(
        self,
        engine,
        draw: random.Random,
        vocabulary: int,
        params: Callable[[int], SamplingParams],
        *,
        tokens: tuple[int, int, int, int] = (40, 12, 14, 60),
    ):
        self.engine, self.draw, self.vocabulary, self.params = engine, draw, vocabulary, params
        self.most_shared, self.most_asked, self.most_answered, self.longest = tokens
        self.running: dict[str, tuple[str, Request]] = {}
        self.answered: list[Request] = []
        self.preemptions = self.conversions = self.aborted = self.resumed = 0

    def begin(self, name: str) -> None:
        begins, shared = self.draw.randint(0, 2), self.draw.randint(0, self.most_shared)
        history = [(11 * begins + k) % self.vocabulary for k in range(shared)]
        self.turn(name, history, self.draw.choice([None, None, "salt"]))

    def turn(self, name: str, history: list[int], salt: str | None) -> None:
        asked = self.draw.randint(1, self.most_asked)
        prompt = [*history, *((5 * int(name) + k) % self.vocabulary for k in range(asked))]
        params = self.params(self.draw.randint(1, self.most_answered))
        request_id = f"{name}.{len(prompt)}"
        self.running[request_id] = name, self.engine.add(prompt, params, request_id=request_id, cache_salt=salt)

    def run(self, count: int, most_steps: int = 4000) -> None:
        """Serve `count` conversations, which begin within 30 steps or, if they are many, two in three steps."""
        coming, step = sorted((self.draw.randint(0, max(30, 3 * count // 2)), str(i)) for i in range(count)), 0
        while coming or self.running or self.engine.has_unfinished:
            while coming and coming[0][0] <= step:
                self.begin(coming.pop(0)[1])
            self.engine.step()
            self.engine.state.check()
            if self.draw.random() < 0.01:
                self.engine.reset_prefix_cache()
            for request_id, (name, request) in list(self.running.items()):
                self.look(request_id, name, request)
            step += 1
            assert step < most_steps, "no end in sight"

    def look(self, request_id: str, name: str, request: Request) -> None:
        """Take in an answer that has ended; end one that has not now and then, which half of the users resume."""
        if request.finish_reason is None:
            if self.draw.random() < 0.005:
                self.engine.abort(request_id)
                del self.running[request_id]
                self.aborted += 1
                if request.output_token_ids and self.draw.random() < 0.5:
                    self.resume(request_id, name, request)
            return
        del self.running[request_id]
        assert request.finish_reason is FinishReason.LENGTH
        self.answered.append(request)
        self.preemptions += request.num_preemptions
        self.conversions += request.num_conversions
        if request.num_tokens < self.longest and self.draw.random() < 0.5:
            self.turn(name, [*request.prompt_token_ids, *request.output_token_ids], request.cache_salt)

    def resume(self, request_id: str, name: str, request: Request) -> None:
        """As a restarted server does with a request that had some of its tokens."""
        self.resumed += 1
        resumed = self.engine.add(
            request.prompt_token_ids, request.params, request_id=f"{request_id}+", cache_salt=request.cache_salt,
            output_token_ids=request.output_token_ids,
        )  # fmt: skip
        self.running[f"{request_id}+"] = name, resumed


def converse(engine, count: int, *, seed: int) -> Conversations:
    """`count` conversations on an engine with a model, to their end: greedy, seeded, penalised; no block is lost."""
    draw = random.Random(seed)

    def drawn(max_tokens: int) -> SamplingParams:
        some = {"max_tokens": max_tokens, "ignore_eos": True}
        if draw.random() < 0.3:
            some |= {"repetition_penalty": 1.3, "frequency_penalty": 0.2}
        if draw.random() < 0.5:
            return SamplingParams(temperature=0, **some)
        return SamplingParams(temperature=0.9, seed=draw.randrange(2**31), **some)

    talks = Conversations(engine, draw, engine.model_config.vocab_size, drawn)
    talks.run(count, most_steps=100 * count + 4000)
    assert engine.state.pool.num_free == engine.state.pool.num_blocks
    return talks


def alone(engine, talks: Conversations) -> None:
    """Assert that each answer has the tokens that it has by itself, with a salt of its own, so nothing is cached."""
    before = engine.state.prefix_hits
    for number, request in enumerate(talks.answered):
        again = engine.add(request.prompt_token_ids, request.params, request_id="again", cache_salt=f"only {number}")
        while engine.has_unfinished:
            engine.step()
        assert again.num_preemptions == 0
        assert again.output_token_ids == request.output_token_ids, request.request_id
    assert engine.state.prefix_hits == before
