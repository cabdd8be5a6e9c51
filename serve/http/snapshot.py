"""Snapshot file of requests unfinished at shutdown, which the next start can finish with the same tokens.

One JSON object per line: the body as it was sent, and for each sample its prompt, its sampling parameters with the seed
that was used, and the tokens so far.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from apt_jax.output import TokenLogprobs
from apt_jax.request import FinishReason, SamplingParams, Slo
from apt_jax.serve.errors import BadRequest
from apt_jax.serve.openai.endpoints import ENDPOINTS_BY_PREFIX
from apt_jax.serve.openai.generation import Choice, Generation, ServedModel
from apt_jax.serve.runtime.samples import Sample

VERSION = 1


def write_snapshot(path: Path, records: Iterable[dict[str, Any]]) -> int:
    """Write records, readable for the owner only, replacing the file in one go; returns how many.

    Raises:
        OSError: it cannot be written.
    """
    lines = [json.dumps(record) for record in records]
    draft = path.with_name(f"{path.name}.draft")
    draft.unlink(missing_ok=True)
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write("".join(f"{line}\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    return len(lines)


def read_snapshot(path: Path) -> list[dict[str, Any]]:
    """The records of a file; `restore` makes one a generation again. No file is no record.

    Raises:
        ValueError: it is not such a file, or of another version; one sentence.
        OSError: it cannot be read.
    """
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            version, kind = record["version"], record["kind"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} line {number} is no snapshot of a request; choose another file") from error
        if version != VERSION or kind not in ENDPOINTS_BY_PREFIX:
            raise ValueError(f"{path} line {number} is of version {version}, this server reads {VERSION}")
        records.append(record)
    return records


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
    except (KeyError, TypeError, BadRequest) as error:
        raise ValueError(f"the snapshot of request {record.get('id')} is damaged: {error!r}") from error
    unfinished = [sample for sample in samples if generation.choices[sample.index].finish_reason is None]
    generation.num_unfinished = len(unfinished)
    return generation, unfinished


def record_of(generation: Generation[Any]) -> dict[str, Any]:
    """What `restore` needs. Pure."""
    return {
        "version": VERSION,
        "kind": generation.ID_PREFIX,
        "id": generation.request_id,
        "created": generation.created,
        "body": generation.body.model_dump(mode="json", exclude_none=True, warnings=False),
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
        "token_ids": choice.token_ids,
        "logprobs": _plain(choice.logprobs),
        "prompt_logprobs": _plain(choice.prompt_logprobs),
        "finish_reason": choice.finish_reason.value if done and choice.finish_reason is not None else None,
        "text": "".join(choice.text) if done else None,
    }


def _sample(entry: dict[str, Any]) -> Sample:
    return Sample(
        request_id=entry["request_id"],
        index=entry["index"],
        prompt_token_ids=entry["prompt_token_ids"],
        params=SamplingParams(**entry["params"]),
        slo=None if entry["slo"] is None else Slo(**entry["slo"]),
        priority=entry["priority"],
        output_token_ids=entry["token_ids"],
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


def _token_logprobs(entries: list[dict[str, Any]]) -> list[TokenLogprobs]:
    return [TokenLogprobs(e["token_id"], e["logprob"], e["rank"], tuple((i, p) for i, p in e["top"])) for e in entries]
