"""What is kept of a request that is unfinished at shutdown, so that the next start can finish it with the same tokens.

A record is a JSON object: the model, the body as it was sent, and for each sample its prompt, its sampling parameters
with the seed that was used, and the tokens so far.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from apt_jax.logprob_rows import LogprobRows
from apt_jax.output import TokenLogprobs
from apt_jax.request import MAX_USER_CHARS, FinishReason, SamplingParams, Slo
from apt_jax.serve.http.snapshot_file import VERSION
from apt_jax.serve.json_text import shown
from apt_jax.serve.openai.endpoints import ENDPOINTS_BY_PREFIX
from apt_jax.serve.openai.generation import Choice, Generation, ServedModel
from apt_jax.serve.runtime.samples import Sample


def restore(record: dict[str, Any], model: ServedModel) -> tuple[Generation[Any], list[Sample]]:
    """The generation with its finished parts, and the samples that remain to be run.

    Raises:
        ValueError: the record is damaged.
    """
    try:
        endpoint = ENDPOINTS_BY_PREFIX[record["kind"]]
        samples = [_sample(entry) for entry in record["samples"]]
        generation = endpoint.generation(
            *(endpoint.parse(record["body"]), record["id"], model.name, model.engine.tokenizer),
            record["prompts"],
            samples,
            record["created"],
        )
        for choice, entry in zip(generation.choices, record["samples"], strict=True):
            _restore_choice(choice, entry)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        what = str(error) if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"the snapshot of request {record.get('id')} is damaged: {what}") from error
    unfinished = [sample for sample in samples if generation.choices[sample.index].finish_reason is None]
    generation.num_unfinished = len(unfinished)
    return generation, unfinished


def unfinished_samples(record: dict[str, Any]) -> list[Sample]:
    """The samples of a record that remain to be run."""
    return [_sample(entry) for entry in record["samples"] if entry["finish_reason"] is None]


def is_of(record: dict[str, Any], model: ServedModel) -> bool:
    """Whether a record's tokens are those of the served weights; unknown ones are taken for the same."""
    kept, served = record.get("fingerprint"), model.engine.fingerprint
    return not kept or not served or kept == served


def record_of(generation: Generation[Any], fingerprint: str) -> dict[str, Any]:
    """What `restore` needs. `fingerprint` is that of the weights. Pure."""
    return {
        "version": VERSION,
        "model": generation.model_name,
        "fingerprint": fingerprint,
        "kind": generation.ID_PREFIX,
        "id": generation.request_id,
        "created": generation.created,
        "body": generation.body.model_dump(mode="json", by_alias=True, exclude_none=True, warnings=False),
        "prompts": [list(prompt) for prompt in generation.prompt_token_ids],
        "samples": [_entry(*pair) for pair in zip(generation.samples, generation.choices, strict=True)],
    }


def _entry(sample: Sample, choice: Choice) -> dict[str, Any]:
    # the engine drew a seed for a request that brought none
    params = sample.params if choice.request is None else choice.request.params
    done = choice.finish_reason not in (None, FinishReason.ABORT)
    return {
        "request_id": sample.request_id,
        "index": sample.index,
        "prompt_token_ids": list(sample.prompt_token_ids),
        "params": dataclasses.asdict(params),
        "slo": None if sample.slo is None else dataclasses.asdict(sample.slo),
        "priority": sample.priority,
        "cache_salt": sample.cache_salt,
        "user": sample.user,
        "token_ids": choice.token_ids,
        "logprobs": _plain(choice.logprobs),
        "prompt_logprobs": _plain(choice.prompt_logprobs),
        "finish_reason": choice.finish_reason.value if done and choice.finish_reason is not None else None,
        "text": "".join(choice.text) if done else None,
    }


def _sample(entry: dict[str, Any]) -> Sample:
    user = entry.get("user")  # not in snapshots of earlier versions
    if user is not None and not (isinstance(user, str) and len(user) <= MAX_USER_CHARS):
        raise ValueError(f"user={shown(user)} is no text of at most {MAX_USER_CHARS} characters")
    return Sample(
        request_id=entry["request_id"],
        index=entry["index"],
        prompt_token_ids=entry["prompt_token_ids"],
        params=SamplingParams(**entry["params"]),
        slo=None if entry["slo"] is None else Slo(**entry["slo"]),
        priority=entry["priority"],
        output_token_ids=entry["token_ids"],
        cache_salt=entry.get("cache_salt"),  # not in snapshots of earlier versions
        user=user,
    )


def _restore_choice(choice: Choice, entry: dict[str, Any]) -> None:
    choice.started = bool(entry["token_ids"])
    choice.token_ids = list(entry["token_ids"])
    choice.logprobs = _token_logprobs(entry["logprobs"])
    if entry.get("prompt_logprobs") is not None:  # else the engine finds them again
        choice.prompt_logprobs = _token_logprobs(entry["prompt_logprobs"])
    if entry["finish_reason"] is not None:
        choice.finish_reason = FinishReason(entry["finish_reason"])
        choice.text = [entry["text"]]


def _plain(entries: Sequence[TokenLogprobs] | None) -> list[dict[str, Any]] | None:
    return None if entries is None else [dataclasses.asdict(entry) for entry in entries]


def _token_logprobs(entries: list[dict[str, Any]]) -> LogprobRows:
    return LogprobRows(
        TokenLogprobs(e["token_id"], e["logprob"], e["rank"], tuple((i, p) for i, p in e["top"])) for e in entries
    )
