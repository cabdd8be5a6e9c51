"""Conversations on a server that keeps prefixes: clients who leave and come back, SIGTERM with resumption, kill -9.

In the end every conversation has all its answers, every block is free or cached, the counts of the prefix cache are
exactly those that the answers report, and answers from the cache are those that an empty cache gives.
"""

import asyncio
import json
import random
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import httpx

from tests.soak.client import Outcome, complete
from tests.soak.server import Server

WORDS = ("def", "return", "the", "file", "of", "a", "list", "is", "not", "self", "import", "for", "in", "class", "(")
AT_ONCE = 48
HITS, QUERIES = "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"
LONG = {"prompt": "class", "max_tokens": 900, "ignore_eos": True, "seed": 3}


class Live(Protocol):
    """A server that runs."""

    port: int

    def settle(self) -> dict[str, float]:
        """Metrics once nothing runs or waits; every block is free then."""


@dataclass
class Talk:
    """One conversation: its text so far, turns to come, and what its answers were. `salt` is its `cache_salt`."""

    text: str
    turns: int
    salt: str | None = None
    leaves: float = 0.1  # share of its answers that its user does not wait for
    answers: list[tuple[dict[str, Any], str]] = field(default_factory=list)  # bodies and texts


@dataclass
class Tally:
    """What was seen of one server's life."""

    answered: int = 0
    left: int = 0
    aborted: int = 0
    unsure: int = 0  # left while their server ended, so it may have taken them for aborted
    broken: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0


class Conversations:
    """Talks of random users with a few shared beginnings, by a seed. Sizes are in words."""

    def __init__(self, count: int, seed: int, *, beginning: int = 70, asked: int = 20, answered: int = 24):
        self.draw = random.Random(seed)
        self._asked, self._answered = asked, answered
        self._beginnings = [self.words(beginning) for _ in range(3)]
        self.open = [self.talk() for _ in range(count)]
        self.ended: list[Talk] = []

    def words(self, most: int) -> str:
        """A few words."""
        return " ".join(self.draw.choices(WORDS, k=self.draw.randint(1, most)))

    def talk(self) -> Talk:
        """A new one."""
        draw = self.draw
        begin = f"{draw.choice(self._beginnings)} {self.words(self._asked)}"
        return Talk(begin, draw.randint(1, 4), draw.choice([None, None, None, "tenant"]))

    async def run(self, server: Live, tally: Tally, until: Callable[[int], bool] = lambda ended: False) -> None:
        """Go on with all that are open until they have ended, or until `until`, asked after each of them, is true."""
        slots, stop = asyncio.Semaphore(AT_ONCE), asyncio.Event()
        before = len(self.ended)

        async def one(talk: Talk) -> None:
            async with slots:
                while talk.turns and not stop.is_set():
                    if not await self._turn(server, talk, tally, stop):
                        await asyncio.sleep(0.02)
                if talk.turns:
                    return
                self.open.remove(talk)
                self.ended.append(talk)
                if until(len(self.ended) - before):
                    stop.set()

        await asyncio.gather(*(one(talk) for talk in [*self.open]))

    async def _turn(self, server: Live, talk: Talk, tally: Tally, stop: asyncio.Event) -> bool:
        """Ask once; whether an answer came, or its user left for good."""
        draw = self.draw
        sampling = {"temperature": 0} if draw.random() < 0.6 else {"temperature": 0.8, "seed": draw.randrange(1000)}
        body = {"prompt": talk.text, "max_tokens": draw.randint(1, self._answered), "ignore_eos": True, **sampling}
        if talk.salt is not None:
            body["cache_salt"] = talk.salt
        if draw.random() < talk.leaves:
            outcome = await complete(server.port, {**body, "stream": True}, leave_after=draw.randint(0, 4))
            if outcome.whole:
                tally.aborted += "abort" in outcome.reasons
                return False  # it was too short to leave; asked again
            tally.left += 1
            tally.unsure += stop.is_set()
            if draw.random() < 0.3:
                talk.turns = 0
            return talk.turns == 0
        outcome = await complete(server.port, body)
        if not outcome.whole or outcome.status != 200:
            assert outcome.status in (0, 200, 503), outcome
            tally.broken += outcome.status != 503
            return False
        reply = reply_of(outcome)
        (choice,) = reply["choices"]
        if choice["finish_reason"] == "abort":
            tally.aborted += 1
            return False
        assert choice["finish_reason"] == "length" and reply["usage"]["completion_tokens"] == body["max_tokens"], reply
        tally.answered += 1
        tally.prompt_tokens += reply["usage"]["prompt_tokens"]
        tally.cached_tokens += reply["usage"]["prompt_tokens_details"]["cached_tokens"]
        talk.answers.append((body, choice["text"]))
        talk.text += f"{choice['text']} {self.words(self._asked)}"
        talk.turns -= 1
        return True


def reply_of(outcome: Outcome) -> dict[str, Any]:
    """The body of an answer that was not streamed."""
    found: dict[str, Any] = json.loads(outcome.raw.split(b"\r\n\r\n", 1)[1])
    return found


def check_counts(server: Live, talks: Conversations, url: str, *, repeated: int) -> str:
    """Nobody leaves: the server counts what its answers report. Then some answers again, from an empty cache."""
    for talk in talks.open:
        talk.leaves = 0.0
    before, tally = server.settle(), Tally()
    asyncio.run(talks.run(server, tally))
    after = server.settle()
    counted = [after[name] - before.get(name, 0.0) for name in (QUERIES, HITS)]
    assert counted == [tally.prompt_tokens, tally.cached_tokens], f"{counted} counted, {tally} reported"
    assert 0 < tally.cached_tokens < tally.prompt_tokens
    assert httpx.post(f"{url}/reset_prefix_cache").status_code == 200
    again = [talks.draw.choice(talk.answers) for talk in talks.ended if talk.answers]
    again = talks.draw.sample(again, min(repeated, len(again)))
    for number, (body, text) in enumerate(again):
        reply = reply_of(asyncio.run(complete(server.port, {**body, "cache_salt": f"only {number}"})))
        assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert reply["choices"][0]["text"] == text, f"another answer from an empty cache: {body}"
    server.settle()
    share = tally.cached_tokens / tally.prompt_tokens
    return f"{tally.answered} answers counted exactly, {share:.0%} of their prompts cached; {len(again)} the same cold"


def conversations(server: Server, scale: float, restart: Callable[[], Server]) -> str:
    """1,000 conversations; SIGTERM after a third of them, kill -9 after another, and exact counts in the rest."""
    count, folder = max(int(1000 * scale), 12), Path(server.log.parent)
    talks, tally = Conversations(count, seed=4), Tally()
    began = time.monotonic()
    kept = terminate(server, talks, tally, count // 3, folder)
    server = restart()
    wait_until_resumed(folder, kept)
    assert server.settle()[HITS] > 0, "no resumed request began with its pages"

    def kill(ended: int) -> bool:
        if ended == count // 3:
            server.kill()
        return ended >= count // 3

    asyncio.run(talks.run(server, tally, kill))
    server = restart()
    middle = server.settle()
    shown = check_counts(server, talks, server.url, repeated=40)
    assert len(talks.ended) == count and not talks.open and middle["apt:idle_lost_blocks"] == 0
    return (
        f"{count} conversations in {time.monotonic() - began:.0f} s: {tally.answered} answers and {tally.left} left, "
        f"{kept} requests ended by SIGTERM and resumed, {tally.broken} broken off by kill -9; {shown}"
    )


def terminate(server: Server, talks: Conversations, tally: Tally, after: int, folder: Path) -> int:
    """SIGTERM after so many conversations, beside long requests; how many requests were kept, with their pages."""

    async def run() -> list[Outcome]:
        long: list[asyncio.Task[Outcome]] = []

        def stop(ended: int) -> bool:
            if ended == max(after - 8, 1):
                long.extend(asyncio.create_task(complete(server.port, {**LONG, "stream": True})) for _ in range(64))
            if ended == after:
                server.signal(signal.SIGTERM)
            return ended >= after

        await talks.run(server, tally, stop)
        return await asyncio.gather(*long)

    outcomes = asyncio.run(run())
    code = server.wait()
    assert code == 0, f"it exits with {code}: {server.tail()}"
    aborted = tally.aborted + sum("abort" in outcome.reasons for outcome in outcomes)
    left = folder / "left.jsonl"
    kept = len(left.read_text().splitlines()) if left.exists() else 0
    assert 0 < aborted <= kept <= aborted + tally.unsure, f"{aborted} requests were ended, {kept} are in the snapshot"
    said = re.search(r"cached pages of (\d+) of (\d+) unfinished samples are in .*: (\d+) tokens", server.tail())
    assert said is not None and int(said[2]) == kept and int(said[1]) > 0, server.tail()
    assert len(list((folder / "left.jsonl.caches").iterdir())) == int(said[1])
    return kept


def wait_until_resumed(folder: Path, kept: int) -> None:
    """Until the next start has finished them all; neither they nor their pages are left then."""
    left, end = folder / "left.jsonl", time.monotonic() + 300
    while left.exists():
        assert time.monotonic() < end, "they never end"
        time.sleep(0.5)
    lines = (folder / "left.jsonl.results.jsonl").read_text().splitlines()
    results = [json.loads(line) for line in lines]
    assert len(results) >= kept and all(result["response"]["status_code"] == 200 for result in results)
    texts = {r["response"]["body"]["choices"][0]["text"] for r in results if r["response"]["body"]["usage"][
        "completion_tokens"] == LONG["max_tokens"]}  # fmt: skip
    assert len(texts) <= 1, "the same seed and prompt came to different texts"
    assert not (folder / "left.jsonl.caches").exists()
