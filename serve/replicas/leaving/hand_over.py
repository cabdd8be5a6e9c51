"""Requests of a replica that will be taken away, on their way to another: tokens always, cached pages where these pay.

Source: SpotServe (arXiv 2311.15566, section 4), which moves the cache to where decoding goes on. Here the other replica
could compute a request's known tokens again, in one prefill; so pages travel only where the link is quicker than that.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from apt_jax.engine.interface import ServingEngine
from apt_jax.scheduling.costs.cost_model import CostModel
from apt_jax.scheduling.costs.step_load import StepLoad
from apt_jax.serve.runtime.samples import Sample

HAND_OVER_S = 5.0  # before the machine is gone its requests begin to move
LATEST_S = 1.0  # before, only tokens are still handed over: a page under way may not arrive
PROBE_BYTES = 1 << 20

logger = logging.getLogger("apt_jax.serve")


@dataclass(frozen=True, slots=True)
class Link:
    """What messages from one process to another cost, as measured."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, num_bytes: float) -> float:
        """Of one message."""
        return self.latency_s + num_bytes / self.bytes_per_s

    def then(self, other: "Link") -> "Link":
        """This one, and then another one: pages go through the server in front."""
        return Link(self.latency_s + other.latency_s, 1 / (1 / self.bytes_per_s + 1 / other.bytes_per_s))

    def as_seen(self, num_bytes: int, seconds: float) -> "Link":
        """With the speed of a transfer that was made, in which pages were read and written too.

        A small one mostly waited for the engines' steps, and says nothing.
        """
        if num_bytes < PROBE_BYTES:
            return self
        return Link(self.latency_s, num_bytes / max(seconds - self.latency_s, 1e-9))


class Asked(Protocol):
    """A replica that answers questions, as `Handle` does."""

    async def ask(self, question: str, argument: Any = "") -> Any:
        """See `EngineActor.ask`."""


async def measured(handle: Asked) -> Link:
    """The link to a replica, by echoes: one of nothing and one of `PROBE_BYTES`, both ways."""
    began = time.monotonic()
    await handle.ask("echo", b"")
    latency_s = time.monotonic() - began
    began = time.monotonic()
    await handle.ask("echo", bytes(PROBE_BYTES))
    seconds = time.monotonic() - began
    return Link(latency_s, 2 * PROBE_BYTES / max(seconds - latency_s, 1e-6))


def is_worth_moving(num_bytes: int, recompute_s: float | None, link: Link) -> bool:
    """Whether cached pages arrive before the other replica would have computed them again; None: not known, so no."""
    return recompute_s is not None and link.seconds(num_bytes) < recompute_s


def recompute_s(cost_model: CostModel | None, tokens: int, tokens_at_once: int) -> float | None:
    """Predicted seconds of computing the first `tokens` tokens of a request again, in chunks and alone."""
    if cost_model is None:
        return None
    total, done = 0.0, 0
    while done < tokens:
        chunk = min(tokens - done, max(tokens_at_once, 1))
        pairs = chunk * done + chunk * (chunk + 1) // 2
        total += cost_model.step_s(StepLoad(prefill_tokens=chunk, prefill_pairs=pairs))
        done += chunk
    return total


@dataclass(frozen=True, slots=True)
class Leaving:
    """A question to the replica that goes: end these samples of a ticket, and give their pages if that pays."""

    ticket: int
    samples: tuple[Sample, ...]
    link: Link


@dataclass(frozen=True, slots=True)
class Pages:
    """Cached pages of a sample: of all its first `tokens`, as bytes."""

    tokens: tuple[int, ...]
    cache_salt: str | None
    form: dict[str, Any]
    contents: tuple[bytes, ...]

    @property
    def num_bytes(self) -> int:
        """Of the contents."""
        return sum(map(len, self.contents))


def take_pages(engine: ServingEngine, samples: Sequence[Sample], link: Link) -> list[Pages]:
    """Pages of those samples whose pages are quicker moved than computed again; in the engine's thread."""
    found: list[Pages] = []
    store, cost_model = engine.saved_pages, engine.figures().cost_model
    if store is None:
        return found
    at_once = engine.config.max_num_batched_tokens or 1
    for sample in samples:
        tokens = [*sample.prompt_token_ids, *sample.output_token_ids]
        if (saved := store.save(tokens, sample.cache_salt)) is None:
            continue
        held, num_bytes = saved.num_pages * store.block_size, saved.num_pages * saved.page_bytes
        again_s = recompute_s(cost_model, held, at_once)
        pays = is_worth_moving(num_bytes, again_s, link)
        if pays:
            found.append(Pages(tuple(tokens[:held]), sample.cache_salt, saved.form, tuple(saved.pages)))
        logger.info(
            "%s is handed over with %s: %d bytes in %.1f ms, or %d tokens computed again in %s ms",
            *(sample.request_id, "its pages" if pays else "tokens alone"),
            *(num_bytes, 1e3 * link.seconds(num_bytes), held, "?" if again_s is None else f"{1e3 * again_s:.1f}"),
        )
    return found


def enter_pages(engine: ServingEngine, pages: Sequence[Pages]) -> int:
    """Put pages into the prefix cache, as far as blocks are free; how many tokens are cached now."""
    if (store := engine.saved_pages) is None:
        return 0
    return sum(store.restore(each.tokens, each.cache_salt, each.form, each.contents) for each in pages)
