"""The output of a step for one request. Without jax, so that modules that only pass it on stay light."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from apt_jax.request import FinishReason, Request

NO_WAY_ON = "the output cannot go on as "
TRY_AGAIN = "try again later"  # ends the reason where the same request may well succeed


class QueueFull(RuntimeError):
    """The maximum number of requests is waiting; try again later."""


class ContextExceeded(ValueError):
    """The request needs more tokens than the model's context holds."""

    def __init__(self, message: str, max_model_len: int):
        super().__init__(f"this model's maximum context length is {max_model_len} tokens: {message}")
        self._arguments = message, max_model_len

    def __reduce__(self) -> tuple[object, ...]:
        """For pickle, which would pass the whole sentence alone."""
        return type(self), self._arguments


class PolicyFailed(RuntimeError):
    """The scheduling policy raised; nothing was changed, so the step may be tried again."""


class DeviceLost(RuntimeError):
    """After a failed step not even an empty cache could be put on the device: nothing can be served any more."""


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities of one token of prompt or output, under the model's own distribution (before penalties)."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]  # the most likely tokens, best first


@dataclass(frozen=True)
class Output:
    """The output of one step for one request. `finish_reason` is set exactly once, on the request's last Output.

    `prompt_logprobs`, of every prompt token but the first, come with the first token if they were asked for. So does
    `hidden`, float32 `[E]`: the hidden state after the prompt, after the final layer norm and projection.
    """

    request: Request
    text: str
    token_ids: tuple[int, ...]
    logprobs: Sequence[TokenLogprobs]
    finish_reason: FinishReason | None
    error: str | None = None
    prompt_logprobs: Sequence[TokenLogprobs] | None = None
    hidden: Any = None

    @property
    def is_contradictory(self) -> bool:
        """Whether it ended with an error because of what its client asked for, not of the engine."""
        return self.error is not None and self.error.startswith(NO_WAY_ON) and not self.error.endswith(TRY_AGAIN)

    def of(self, request: Request) -> "Output":
        """The same for another record of the request. Made for every token, so without a constructor's checks."""
        made = object.__new__(Output)
        made.__dict__.update(self.__dict__, request=request)
        return made

    def without_answer(self) -> "Output":
        """For a prompt that was only to be scored: no token was asked for, so none ended it early."""
        reason = FinishReason.LENGTH if self.finish_reason is FinishReason.STOP else self.finish_reason
        return replace(self, text="", token_ids=(), logprobs=(), finish_reason=reason)


def joined(outputs: Sequence[Output]) -> Output:
    """Successive outputs of one request as one."""
    if len(outputs) == 1:
        return outputs[0]
    return replace(
        outputs[-1],
        text="".join(output.text for output in outputs),
        token_ids=tuple(token_id for output in outputs for token_id in output.token_ids),
        logprobs=[entry for output in outputs for entry in output.logprobs],
        prompt_logprobs=next((o.prompt_logprobs for o in outputs if o.prompt_logprobs is not None), None),
        hidden=next((o.hidden for o in outputs if o.hidden is not None), None),
    )
