"""The soak's conversations, a dozen of them on a small model in this process: nobody is killed."""

import asyncio
from dataclasses import dataclass

import httpx

from tests.soak.conversations import HITS, QUERIES, Conversations, Tally, check_counts
from tests.support.live_server import until
from tests.support.served_model import Server, serving, write_folder


@dataclass
class LiveServer:
    server: Server

    @property
    def port(self) -> int:
        return int(self.server.url.rsplit(":", 1)[1])

    def settle(self) -> dict[str, float]:
        until(lambda: self.server.is_idle)
        lines = httpx.get(f"{self.server.url}/metrics").text.splitlines()
        return {
            name: float(line.rsplit(" ", 1)[1])
            for line in lines
            for name in (HITS, QUERIES)
            if line.startswith(f"{name}{{")
        }


def test_a_dozen_conversations(tmp_path):
    with serving(write_folder(tmp_path)) as server:
        live, talks, tally = LiveServer(server), Conversations(16, seed=1, beginning=9, asked=2, answered=4), Tally()
        for talk in talks.open:
            talk.leaves = 0.3
        asyncio.run(talks.run(live, tally, lambda ended: ended == 4))
        assert tally.answered > 5 and tally.left > 0 and talks.open and not tally.broken + tally.aborted
        check_counts(live, talks, server.url, repeated=6)
        assert len(talks.ended) == 16 and not talks.open
        server.engine.state.check()
