"""What a router sent to each instance after the instance's last report was counted."""

from collections import deque
from dataclasses import dataclass

from apt_jax.routing.instance import InstanceLoad
from apt_jax.routing.interface import RouteRequest


@dataclass(slots=True)
class Since:
    """Requests that a report lacks, summed up. Blocks are those of their prompts, in the instance's smallest kind."""

    num_requests: int = 0
    prompt_tokens: int = 0
    blocks: float = 0.0


NOTHING = Since()


class Sent:
    """Requests by instance, until a report covers them. Instances that are no longer asked about cost a few bytes."""

    def __init__(self) -> None:
        self._requests: dict[str, deque[tuple[float, int, float]]] = {}
        self._sums: dict[str, Since] = {}

    def add(self, load: InstanceLoad, request: RouteRequest) -> None:
        """`request` goes to the instance of `load`."""
        entry = request.time_s, request.prompt_tokens, load.blocks_for(request.prompt_tokens)
        self._requests.setdefault(load.instance, deque()).append(entry)
        self._count(self._sums.setdefault(load.instance, Since()), 1, entry)

    def since(self, load: InstanceLoad) -> Since:
        """What was sent to the instance of `load` after it was counted. Forgets the rest: reports only get newer.

        A request sent at the very time of a report is taken to be missing in it.
        """
        requests = self._requests.get(load.instance)
        if not requests:
            return NOTHING
        sums = self._sums[load.instance]
        while requests and requests[0][0] < load.time_s:
            self._count(sums, -1, requests.popleft())
        return sums

    @staticmethod
    def _count(sums: Since, sign: int, entry: tuple[float, int, float]) -> None:
        _, prompt_tokens, blocks = entry
        sums.num_requests += sign
        sums.prompt_tokens += sign * prompt_tokens
        sums.blocks += sign * blocks
