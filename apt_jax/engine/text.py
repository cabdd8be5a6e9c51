"""Output text: tokens become text as soon as it is complete, and it is searched for stop strings."""

from collections.abc import Sequence
from dataclasses import dataclass

from apt_jax.request import Request, SamplingParams
from apt_jax.tokenization.detokenizer import IncrementalDetokenizer
from apt_jax.tokenization.restriction import Restriction, restriction
from apt_jax.tokenization.stop_text import StopText
from apt_jax.tokenization.tokenizer import Tokenizer


@dataclass
class _Text:
    detokenizer: IncrementalDetokenizer
    stop: StopText
    resumed: str = ""  # of tokens generated before the request was added, until it is shown


class OutputTexts:
    """Output texts of all unfinished requests. Without a tokenizer, every text is empty."""

    def __init__(self, tokenizer: Tokenizer | None):
        self._tokenizer = tokenizer
        self._texts: dict[str, _Text] = {}

    def add(self, request: Request) -> None:
        """A request has come; tokens that it already has were generated before."""
        if self._tokenizer is None:
            return
        params = request.params
        detokenizer = self._tokenizer.detokenizer(params.skip_special_tokens, request.prompt_token_ids)
        text = _Text(detokenizer, StopText(params.stop or (), params.include_stop_str_in_output))
        self._texts[request.request_id] = text
        for number, token in enumerate(request.output_token_ids, start=1):
            text.resumed += _show(text, token, early=number < params.min_tokens)[0]

    def restriction(
        self, params: SamplingParams, vocab_size: int, output_token_ids: Sequence[int]
    ) -> Restriction | None:
        """See `tokenization/restriction.py`, whose ValueError this raises."""
        return restriction(params, self._tokenizer, vocab_size, output_token_ids)

    def push(self, request: Request, token: int) -> tuple[str, str | None]:
        """Text to show after the request's newest token, and the stop string that it ends, if any."""
        text = self._texts.get(request.request_id)
        if text is None:
            return "", None
        shown, stop = _show(text, token, early=len(request.output_token_ids) < request.params.min_tokens)
        shown, text.resumed = text.resumed + shown, ""
        return shown, stop

    def flush(self, request: Request) -> str:
        """Text that was held back: part of a character, or of a possible stop string."""
        text = self._texts.get(request.request_id)
        if text is None:
            return ""
        shown, stop = text.stop.push(text.detokenizer.flush())
        return text.resumed + (shown if stop is not None else shown + text.stop.flush())

    def forget(self, request_id: str) -> None:
        """A request has ended; unknown ids change nothing."""
        self._texts.pop(request_id, None)


def _show(text: _Text, token: int, *, early: bool) -> tuple[str, str | None]:
    """Text that a token completes, and the stop string that it ends, if it is not too early for one."""
    shown = text.detokenizer.push([token])
    return (shown, None) if early else text.stop.push(shown)
