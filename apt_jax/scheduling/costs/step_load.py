"""What one iteration computes and reads: the cost model's input, counted from a plan."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import add
from typing import NamedTuple

from apt_jax.cache import KINDS
from apt_jax.scheduling.plan import Plan
from apt_jax.scheduling.state import Span


class Chunk(NamedTuple):
    """Tokens of a prompt that an iteration computes after `cached_tokens` of it; `kind` is the `CacheKind.index`."""

    kind: int
    tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class StepLoad:
    """What one iteration does. Tokens are summed over its requests.

    Attributes:
        prefill_tokens: prompt tokens computed.
        prefill_pairs: query-key pairs of their attention; a whole prompt of n has n (n + 1) / 2.
        decode_requests: requests that compute one new token.
        context_tokens: tokens of context that decoding requests read, by `CacheKind.index` of the request.
        projected_tokens: cached hidden tokens that conversions to KV project to keys and values.
        samples: requests that sample a token.
        decodes: of `decode_requests`, those of each kind, by `CacheKind.index`.
        chunks: prompts of which earlier tokens are cached.
    """

    prefill_tokens: int = 0
    prefill_pairs: int = 0
    decode_requests: int = 0
    context_tokens: tuple[int, ...] = (0,) * len(KINDS)
    projected_tokens: int = 0
    samples: int = 0
    decodes: tuple[int, ...] = (0,) * len(KINDS)
    chunks: tuple[Chunk, ...] = ()

    def __add__(self, other: "StepLoad") -> "StepLoad":
        """Both in one iteration."""
        return StepLoad(
            self.prefill_tokens + other.prefill_tokens,
            self.prefill_pairs + other.prefill_pairs,
            self.decode_requests + other.decode_requests,
            tuple(map(add, self.context_tokens, other.context_tokens)),
            self.projected_tokens + other.projected_tokens,
            self.samples + other.samples,
            tuple(map(add, self.decodes, other.decodes)),
            self.chunks + other.chunks,
        )


@dataclass(frozen=True)
class PaddedSizes:
    """Compiled sizes, ascending: what an iteration really computes. Empty ones pad nothing (the simulator's default).

    Attributes:
        decode: tokens of iterations that only decode.
        prefill: tokens of all others.
        samples: rows of the sampling program.
    """

    decode: tuple[int, ...] = ()
    prefill: tuple[int, ...] = ()
    samples: tuple[int, ...] = ()

    def pad(self, load: StepLoad) -> StepLoad:
        """`load` with the tokens (as prefill tokens) and samples of the program that runs it."""
        if not (self.decode or self.prefill or self.samples):
            return load
        tokens = load.prefill_tokens + load.decode_requests
        padding = _padded(tokens, self.prefill if load.prefill_tokens else self.decode) - tokens
        samples = _padded(load.samples, self.samples)
        return replace(load, prefill_tokens=load.prefill_tokens + padding, samples=samples)


def _padded(count: int, sizes: tuple[int, ...]) -> int:
    index = bisect_left(sizes, count)
    return sizes[index] if count and index < len(sizes) else count


def step_load(plan: Plan, spans: Sequence[Span], projected_tokens: int = 0) -> StepLoad:
    """What an iteration computes and reads. `spans` come from applying `plan`.

    `projected_tokens` are those of `SchedulerState.num_projected_tokens`; conversions project further ones.
    """
    prefill = pairs = samples = 0
    projected = projected_tokens + sum(entry.request.num_computed_tokens for entry in plan.converted)
    context_tokens, decodes = [0] * len(KINDS), [0] * len(KINDS)
    chunks: list[Chunk] = []
    for span in spans:
        start, tokens = span.start, span.num_tokens
        kind = span.request.table.kind  # type: ignore[union-attr]
        samples += span.samples
        if tokens == 1 and start:
            decodes[kind.index] += 1
            context_tokens[kind.index] += start + 1
        else:
            prefill += tokens
            pairs += tokens * start + tokens * (tokens + 1) // 2
            if start:
                chunks.append(Chunk(kind.index, tokens, start))
    return StepLoad(
        prefill, pairs, sum(decodes), tuple(context_tokens), projected, samples, tuple(decodes), tuple(chunks)
    )  # fmt: skip
