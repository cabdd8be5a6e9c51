"""Sampling parameters as arrays with a row for each request: `Sampling`, and how a request fills a row of it.

A new sampling parameter is a field of `SamplingParams` (`request.py`), an array and its column here, and its use in
`execution/sampling.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from apt_jax.request import Request
from apt_jax.sampling.params import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS

MAX_END_IDS = MAX_STOP_TOKEN_IDS + 8  # stop ids of the request and end-of-sequence ids of the model
NO_TOKEN = np.int32(2**31 - 1)  # padding in lists of token ids: out of range of any vocabulary, so updates drop it

type Array = Any  # numpy on the host, jax inside a compiled step


class Sampling(NamedTuple):
    """How each row's next token is chosen."""

    temperature: Array  # float32 [R]; 0 is greedy
    top_k: Array  # int32 [R]; 0 keeps all
    top_p: Array  # float32 [R]
    min_p: Array  # float32 [R]
    repetition_penalty: Array  # float32 [R]
    presence_penalty: Array  # float32 [R]
    frequency_penalty: Array  # float32 [R]
    seed: Array  # uint32 [R, 2]
    prompt_tokens: Array  # int32 [R]
    min_tokens: Array  # int32 [R]
    end_ids: Array  # int32 [R, MAX_END_IDS]: not allowed before min_tokens; padding NO_TOKEN
    bias_ids: Array  # int32 [R, MAX_LOGIT_BIAS]; padding NO_TOKEN
    bias_values: Array  # float32 [R, MAX_LOGIT_BIAS]
    wants_logprobs: Array  # bool [R]
    is_restricted: Array  # bool [R]: only some tokens are allowed


@dataclass(frozen=True)
class Column:
    """One array of `Sampling`: its dtype, what asks for nothing, and what a request asks for.

    With a `width` the value is a list of at most as many; `empty` fills the rest of the row.
    """

    dtype: DTypeLike
    empty: Any
    value: Callable[[Request], Any]
    width: int | None = None


COLUMNS = {
    "temperature": Column(np.float32, 0, lambda r: r.params.temperature),
    "top_k": Column(np.int32, 0, lambda r: min(r.params.top_k, 2**31 - 1)),
    "top_p": Column(np.float32, 1, lambda r: r.params.top_p),
    "min_p": Column(np.float32, 0, lambda r: r.params.min_p),
    "repetition_penalty": Column(np.float32, 1, lambda r: r.params.repetition_penalty),
    "presence_penalty": Column(np.float32, 0, lambda r: r.params.presence_penalty),
    "frequency_penalty": Column(np.float32, 0, lambda r: r.params.frequency_penalty),
    "seed": Column(np.uint32, 0, lambda r: _halves(r.params.seed or 0), width=2),
    "prompt_tokens": Column(np.int32, 0, lambda r: r.num_prompt_tokens),
    "min_tokens": Column(np.int32, 0, lambda r: min(r.params.min_tokens, 2**31 - 1)),
    "end_ids": Column(np.int32, NO_TOKEN, lambda r: _end_ids(r), width=MAX_END_IDS),
    "bias_ids": Column(np.int32, NO_TOKEN, lambda r: list(r.params.logit_bias or ()), width=MAX_LOGIT_BIAS),
    "bias_values": Column(np.float32, 0, lambda r: list((r.params.logit_bias or {}).values()), width=MAX_LOGIT_BIAS),
    "wants_logprobs": Column(np.bool_, False, lambda r: r.params.logprobs is not None),
    "is_restricted": Column(np.bool_, False, lambda r: r.restriction is not None),
}


def empty_sampling(rows: int) -> Sampling:
    """Greedy sampling without any option, for `rows` rows."""

    def array(column: Column) -> np.ndarray:
        shape = (rows,) if column.width is None else (rows, column.width)
        return np.full(shape, column.empty, column.dtype)

    return Sampling(**{name: array(column) for name, column in COLUMNS.items()})


def write_sampling(arrays: Sampling, row: int, request: Request) -> None:
    """Write a request's sampling parameters into row `row` of `arrays`."""
    for name, column in COLUMNS.items():
        array, value = getattr(arrays, name), column.value(request)
        if column.width is None:
            array[row] = value
        else:
            array[row] = column.empty
            array[row, : len(value)] = value


def _halves(seed: int) -> tuple[int, int]:
    """The high and the low 32 bits of a seed taken modulo 2^64."""
    whole = int(seed) % 2**64  # int: a numpy integer cannot take the modulus
    return whole >> 32, whole & 0xFFFFFFFF


def _end_ids(request: Request) -> list[int]:
    params = request.params
    return [*(params.stop_token_ids or ()), *(() if params.ignore_eos else sorted(request.eos_token_ids))]
