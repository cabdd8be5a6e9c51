"""Conversations: every turn sends the earlier turns and their answers again, after one beginning that all share.

The shape is that of vLLM's own benchmark of conversations (vllm-project/vllm, benchmarks/multi_turn,
generate_multi_turn.json): 500 tokens that all conversations begin with, questions of 120 to 160 tokens and answers of
80 to 120. Its document of 1,000 tokens and more is left out and four turns are taken, since OPT's context is 2,048.
"""

import math
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from apt_jax.ranges import check_at_least, check_at_most, check_finite
from apt_jax.request import Slo
from apt_jax.simulation.requests.classes import Terms
from apt_jax.simulation.requests.surge import Surge
from apt_jax.simulation.workload import MOST_ARRIVALS, Arrival, Lengths, first_token_id, gamma_times

NAME = "conversations"
UNIFORM = "uniform"
QUESTION_TOKENS, ANSWER_TOKENS = (120, 160), (80, 120)  # lowest and highest, of a uniform distribution
SAMPLE = 2000  # conversations drawn to say what their requests are like


class Turn(NamedTuple):
    """One request of a conversation.

    Attributes:
        prompt_tokens: all that it sends: the shared beginning, the earlier questions and answers, and its question.
        output_tokens: of its answer.
        think_s: seconds from the end of the answer before it to its arrival; 0 of the first.
        earlier_tokens: of the prompt, those that an earlier request sent or got as its answer.
    """

    prompt_tokens: int
    output_tokens: int
    think_s: float
    earlier_tokens: int


@dataclass(frozen=True)
class Conversations:
    """What conversations are like, as `conversations:turns=4:system_tokens=500:think_s=5:lengths=uniform`.

    Attributes:
        turns: questions of each.
        system_tokens: tokens of the beginning that all of them share, such as a system prompt.
        think_s: mean of the exponential distribution of the time from an answer to the next question.
        lengths: of questions and answers: uniform, or a workload, of which each turn takes a row. Then a conversation
            ends before the turn that would not fit into the context.
    """

    turns: int = 4
    system_tokens: int = 500
    think_s: float = 5.0
    lengths: str = UNIFORM

    def __post_init__(self) -> None:
        check_finite(self)
        check_at_least(self, 1, ("turns",))
        check_at_least(self, 0, ("system_tokens", "think_s"))
        check_at_most(self, 10**6, ("turns", "system_tokens", "think_s"))

    @classmethod
    def parse(cls, text: str) -> "Conversations | None":
        """What `conversations:option=value:...` describes; None if `text` names another workload.

        Raises:
            ValueError: an option is unknown or has a bad value; one sentence.
        """
        name, *settings = text.split(":")
        if name != NAME:
            return None
        defaults: dict[str, Any] = {f.name: f.default for f in fields(cls)}
        values: dict[str, Any] = {}
        for setting in settings:
            key, _, value = setting.partition("=")
            if key not in defaults or not value or key in values:
                known = ", ".join(f"{k}={v}" for k, v in defaults.items())
                raise ValueError(
                    f"option {setting!r} of {NAME} is unknown, empty or given twice; known, with defaults: {known}"
                )
            try:
                values[key] = type(defaults[key])(value)
            except ValueError as error:
                raise ValueError(f"option {key}={value!r} of {NAME} must be a number like {defaults[key]}") from error
        return cls(**values)

    def draw(self, count: int, table: Lengths | None, *, seed: int, max_model_len: int) -> list[tuple[Turn, ...]]:
        """`count` conversations; more with the same seed begin with the same ones. Pure.

        Args:
            count: of conversations.
            table: of `lengths`; None if these are uniform.
            seed: of lengths and think times.
            max_model_len: longest context.

        Raises:
            ValueError: uniform ones may not fit into the context, or none of the table's does.
        """
        longest = self.system_tokens + self.turns * (QUESTION_TOKENS[1] + ANSWER_TOKENS[1])
        if table is None and longest > max_model_len:
            raise ValueError(
                f"conversations of {self.turns} turns after {self.system_tokens} tokens have up to {longest}, and the "
                f"context is {max_model_len}; lower turns or system_tokens"
            )
        asked, answered, think_s = self._columns(count, table, seed)
        found = []
        for number in range(count):
            turns: list[Turn] = []
            context = self.system_tokens
            for k in range(self.turns):
                prompt, output = context + int(asked[number, k]), int(answered[number, k])
                if prompt + output > max_model_len:
                    break
                turns.append(Turn(prompt, output, float(think_s[number, k]) if k else 0.0, context))
                context = prompt + output
            if turns:
                found.append(tuple(turns))
        if not found:
            raise ValueError(
                f"nothing fits into {max_model_len} tokens after the first {self.system_tokens}; lower system_tokens"
            )
        return found

    def _columns(
        self, count: int, table: Lengths | None, seed: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        """`[count, turns]` tokens of questions, tokens of answers, and seconds before the questions."""
        shape, generators = (count, self.turns), [np.random.default_rng([seed, 4, part]) for part in range(3)]
        think_s = self.think_s * generators[2].exponential(1.0, shape)
        if table is None:
            (low, high), (least, most) = QUESTION_TOKENS, ANSWER_TOKENS
            return generators[0].integers(low, high + 1, shape), generators[1].integers(least, most + 1, shape), think_s
        rows = generators[0].integers(len(table.prompt_tokens), size=shape)
        return table.prompt_tokens[rows], table.output_tokens[rows], think_s

    def requests(self, table: Lengths | None, *, max_model_len: int) -> "Requests":
        """What the requests of a sample of conversations are like."""
        sample = self.draw(SAMPLE, table, seed=0, max_model_len=max_model_len)
        prompt, output, _, earlier = (np.array(column) for column in zip(*(t for s in sample for t in s), strict=True))
        return Requests(Lengths(NAME, prompt, output), prompt - earlier, self.system_tokens, len(prompt) / len(sample))

    def arrivals(
        self, table: Lengths | None, *, rate: float, num_requests: int, cv: float, seed: int, duration_s: float,
        max_model_len: int, slo: Slo, surge: Surge | None = None,
    ) -> list[Arrival]:  # fmt: skip
        """First turns, each with those that follow it, of conversations that bring `rate` requests per second.

        Conversations begin for `duration_s` seconds, or longer until they have `num_requests` requests; their gaps are
        Gamma distributed as in `make_arrivals`. Requests of turn k are of the class "turn k".
        """
        turns = self.requests(table, max_model_len=max_model_len).turns
        expected = rate * duration_s * (1.0 if surge is None else surge.mean_factor(duration_s))
        if max(num_requests, expected) > MOST_ARRIVALS:
            raise ValueError(
                f"{rate=:g} for {duration_s=:g} or {num_requests=} are more than {MOST_ARRIVALS:,} requests; lower one"
            )
        count = math.ceil(max(num_requests, expected) / turns)
        drawn = self.draw(count, table, seed=seed, max_model_len=max_model_len)
        times = gamma_times(len(drawn), rate=rate / turns, cv=cv, seed=seed)
        times = times if surge is None else surge.times(times)
        found = []
        for number, (at_s, conversation) in enumerate(zip(times.tolist(), drawn, strict=True)):
            arrival: Arrival | None = None
            for k, turn in reversed([*enumerate(conversation, start=1)]):
                arrival = Arrival(
                    turn.think_s if k > 1 else at_s, turn.prompt_tokens, turn.output_tokens,
                    Terms(slo, 0, f"turn {k}"), first_token_id(number, max_model_len), self.system_tokens, arrival,
                )  # fmt: skip
            assert arrival is not None
            found.append(arrival)
        return found


class Requests(NamedTuple):
    """Requests of conversations.

    Attributes:
        lengths: theirs.
        uncached_tokens: `[n]` tokens of each prompt that no earlier request sent or got.
        shared_tokens: of every prompt, its first ones, which are the same in all.
        turns: requests of a conversation, on average.
    """

    lengths: Lengths
    uncached_tokens: NDArray[np.int64]
    shared_tokens: int
    turns: float
