"""`LLM`: generate from Python, in notebooks and jobs, in vLLM's shapes."""

import dataclasses
import difflib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self, cast

from tqdm import tqdm

from apt_jax.engine_config import EngineConfig
from apt_jax.output import Output, TokenLogprobs
from apt_jax.progress import is_hidden
from apt_jax.request import FinishReason, SamplingParams
from apt_jax.serve.errors import BadRequest
from apt_jax.serve.openai.bodies.chat_requests import parse_chat
from apt_jax.serve.openai.templates.chat_template import NO_TEMPLATE, render
from apt_jax.serve.options import LoadOptions
from apt_jax.serve.runtime.build import build_engine
from apt_jax.serve.runtime.driver import Driver
from apt_jax.serve.runtime.samples import Sample, fan_out
from apt_jax.tokenization.tokenizer import Tokenizer

Prompt = str | Mapping[str, Any]


@dataclass(frozen=True)
class Logprob:
    """Log-probability of a token at one position; `rank` 1 is the most likely, None is unknown."""

    logprob: float
    rank: int | None
    decoded_token: str | None


@dataclass
class CompletionOutput:
    """One sample of one prompt.

    Attributes:
        index: its number among the prompt's samples.
        token_ids: the tokens generated.
        cumulative_logprob: sum over the tokens; None unless logprobs were asked for.
        logprobs: per token, id -> `Logprob` of the chosen and the most likely; None unless asked for.
        finish_reason: stop, length, abort or error.
        stop_reason: the stop string or token id that ended it; None for the end-of-sequence token.
    """

    index: int
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    _text: list[str] | None = None

    @property
    def text(self) -> str:
        """The text generated.

        Raises:
            ValueError: the model has no tokenizer.
        """
        if self._text is None:
            raise ValueError("there is no text: the model's folder has no tokenizer; use token_ids or give tokenizer=")
        return "".join(self._text)


@dataclass
class RequestOutput:
    """Outputs of one prompt; `prompt` is None if it was given as token ids.

    `prompt_logprobs` has per prompt token id -> `Logprob` of the token itself and the most likely, None for the first
    token; it is None unless asked for.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None

    @property
    def finished(self) -> bool:
        """Whether every sample has ended."""
        return all(output.finish_reason is not None for output in self.outputs)


class LLM:
    """A model and its engine.

    Args:
        model: hub id, Hugging Face folder or converted folder; None is the bundled demo model.
        options: `tokenizer`, `revision`, `load_format`, and every field of `EngineConfig`, as on the command line.

    Raises:
        ValueError: an unknown option (the nearest known one is named), a bad value, or a model that cannot be loaded.
    """

    def __init__(self, model: str | None = None, **options: Any):
        _check_known(options)
        loading = {f.name: options.pop(f.name) for f in dataclasses.fields(LoadOptions) if f.name in options}
        config = EngineConfig(**options)
        config.check_offline()
        self.engine = build_engine(model, engine_config=config, **loading)
        self.engine.warm_up(progress=True)
        self._numbers = itertools.count()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the model and its cache back; the object cannot generate any more. Also at the end of a `with`."""
        self.__dict__.pop("engine", None)

    def get_tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, with `encode` and `decode`; None if it has none."""
        return self.engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """The model's own defaults (generation_config.json, see `generation_config=`) over vLLM's."""
        return SamplingParams(**self.engine.sampling_defaults)  # type: ignore[arg-type]

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., tqdm] = True,
        lora_request: None = None,
        priority: int | Sequence[int] | None = None,
        *,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Generate for every prompt; the results are in the prompts' order.

        `prompts` is one or a list of texts, `{"prompt": TEXT}` or `{"prompt_token_ids": [...]}`; `sampling_params` one
        for all or one for each (default: `get_default_sampling_params()`), and `params` another name of it; `priority`
        likewise, for policies that look at it. `use_tqdm` may be a class of progress bars. LoRA is not served.

        Raises:
            ValueError: a prompt or its parameters cannot be served; nothing is left running.
            RuntimeError: the engine failed on a prompt.
        """
        if lora_request is not None:
            raise ValueError("lora_request: LoRA adapters are not served; leave it out")
        if params is not None and sampling_params is not None:
            raise ValueError("params and sampling_params are two names of one argument; give one of them")
        listed = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        given = next(
            (found for found in (sampling_params, params) if found is not None), self.get_default_sampling_params()
        )
        each = _one_for_each(given, SamplingParams, len(listed), "params")
        priorities = _one_for_each(0 if priority is None else priority, int, len(listed), "priority")
        results: list[RequestOutput] = []
        targets: dict[str, tuple[RequestOutput, CompletionOutput]] = {}
        samples: list[Sample] = []
        for number, (prompt, param, prio) in enumerate(zip(listed, each, priorities, strict=True)):
            result, fanned = self._prepare(number, prompt, param, prio)
            results.append(result)
            samples.extend(fanned)
            targets.update((s.request_id, (result, o)) for s, o in zip(fanned, result.outputs, strict=True))
        self._run(samples, targets, len(listed), use_tqdm)
        return results

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., tqdm] = True,
        lora_request: None = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
    ) -> list[RequestOutput]:
        """Answer chats; the results are in their order.

        `messages` is one chat, a list of `{"role": ..., "content": ...}`, or a list of chats. They become text by
        `chat_template`, a Jinja template, or by the tokenizer's own; OPT models come without one. See `generate`.

        Raises:
            ValueError: there is no template, or it refuses the messages; otherwise as `generate`.
        """
        tokenizer = self.engine.tokenizer
        if tokenizer is None:
            raise ValueError("this model has no tokenizer, so it cannot chat; use generate, or give tokenizer=")
        chats = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        prompts: list[Prompt] = []
        for number, chat in enumerate(chats):
            try:
                body = parse_chat({"messages": list(chat)})
                text = render(body.messages, tokenizer, chat_template, generate=add_generation_prompt)
            except BadRequest as error:
                cure = "give chat_template=, or use generate" if str(error) == NO_TEMPLATE else None
                reason = f"this model has no chat template; {cure}" if cure else error
                raise ValueError(f"chat {number} of {len(chats)}: {reason}") from error
            token_ids = tokenizer.encode(text, add_special_tokens=False)  # the template writes the special ones
            prompts.append({"prompt": text, "prompt_token_ids": token_ids})
        return self.generate(prompts, sampling_params, use_tqdm, lora_request)

    def _prepare(
        self, number: int, prompt: Prompt, params: SamplingParams, priority: int
    ) -> tuple[RequestOutput, list[Sample]]:
        tokenizer = self.engine.tokenizer
        cache_salt = None
        if isinstance(prompt, Mapping):
            cache_salt = prompt.get("cache_salt")
            prompt = {name: value for name, value in prompt.items() if name != "cache_salt"}
            if cache_salt is not None and not isinstance(cache_salt, str):
                raise ValueError(f"prompt {number} has cache_salt={cache_salt!r}; give a text")
        text, token_ids = _parse(prompt, number, tokenizer)
        if params.stop and tokenizer is None:
            raise ValueError("stop needs a tokenizer and this model has none; use stop_token_ids or give tokenizer=")
        request_id = str(next(self._numbers))
        samples = fan_out(request_id, [token_ids], params, priority=priority, cache_salt=cache_salt)
        outputs = [
            CompletionOutput(
                sample.index,
                cumulative_logprob=None if params.logprobs is None else 0.0,
                logprobs=None if params.logprobs is None else [],
                _text=None if tokenizer is None else [],
            )
            for sample in samples
        ]
        return RequestOutput(request_id, text, list(token_ids), outputs), samples

    def _run(
        self,
        samples: list[Sample],
        targets: dict[str, tuple[RequestOutput, CompletionOutput]],
        num_prompts: int,
        use_tqdm: bool | Callable[..., tqdm],
    ) -> None:
        tokens = 0
        make_bar = use_tqdm if callable(use_tqdm) else partial(tqdm, disable=is_hidden(use_tqdm))
        with make_bar(total=len(samples), desc="Generating", unit="sample") as bar:
            for sample, output in Driver(self.engine).run(samples):
                if isinstance(output, ValueError):
                    number = int(sample.request_id.partition("-")[0]) - int(samples[0].request_id.partition("-")[0])
                    raise ValueError(f"prompt {number} of {num_prompts}: {output}") from output
                if output.finish_reason is FinishReason.ERROR:
                    raise RuntimeError(f"the engine failed on request {sample.request_id}: {output.error}")
                output = output.without_answer() if sample.params.is_prompt_only else output
                result, target = targets[sample.request_id]
                self._take(target, output)
                if output.prompt_logprobs is not None:
                    result.prompt_logprobs = [None, *map(self._logprobs, output.prompt_logprobs)]
                tokens += len(output.token_ids)
                if output.finish_reason is not None:
                    bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-6):.0f} tokens/s", refresh=False)
                    bar.update()

    def _take(self, target: CompletionOutput, output: Output) -> None:
        target.token_ids.extend(output.token_ids)
        if target._text is not None:
            target._text.append(output.text)
        if target.logprobs is not None:
            assert target.cumulative_logprob is not None
            for entry in output.logprobs:
                target.logprobs.append(self._logprobs(entry))
                target.cumulative_logprob += entry.logprob
        if output.finish_reason is not None:
            target.finish_reason = output.finish_reason.value
            target.stop_reason = output.request.stop_reason if output.finish_reason is FinishReason.STOP else None

    def _logprobs(self, entry: TokenLogprobs) -> dict[int, Logprob]:
        ranked = {token_id: (logprob, rank) for rank, (token_id, logprob) in enumerate(entry.top, start=1)}
        ranked = {entry.token_id: (entry.logprob, entry.rank), **ranked}
        tokenizer = self.engine.tokenizer
        return {
            token_id: Logprob(logprob, rank, None if tokenizer is None else tokenizer.token_text(token_id))
            for token_id, (logprob, rank) in ranked.items()
        }


def _one_for_each[T](given: T | Sequence[T], kind: type[T], count: int, name: str) -> list[T]:
    """One value for all prompts, or a list with one for each.

    Raises:
        ValueError: the list has another length.
    """
    each = [given] * count if isinstance(given, kind) else list(cast(Sequence[T], given))
    if len(each) != count:
        raise ValueError(f"{count} prompts but {len(each)} {name}; give one for all or one for each")
    return each


def _check_known(options: Mapping[str, Any]) -> None:
    """Raise ValueError for a keyword that is neither an engine's nor a model's option."""
    known = [f.name for kind in (EngineConfig, LoadOptions) for f in dataclasses.fields(kind)]
    for name, value in options.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
            raise ValueError(f"unknown option {name}={value!r}{hint}")


def _parse(prompt: Prompt, number: int, tokenizer: Tokenizer | None) -> tuple[str | None, list[int]]:
    """Text (None if token ids were given) and token ids of one prompt."""
    if isinstance(prompt, Mapping):
        match {name: value for name, value in prompt.items() if value is not None}:
            case {"prompt_token_ids": token_ids, **rest} if rest.keys() <= {"prompt"}:
                return rest.get("prompt"), [int(token_id) for token_id in token_ids]
            case {"prompt": str(text), **rest} if not rest:
                prompt = text
            case _:
                raise ValueError(
                    f"prompt {number} has the keys {sorted(map(str, prompt))}; give either prompt or prompt_token_ids"
                )
    if not isinstance(prompt, str):
        raise ValueError(f"prompt {number} is a {type(prompt).__name__}; give a text or {{'prompt_token_ids': [...]}}")
    if not prompt:
        raise ValueError(f"prompt {number} is empty; give at least one character or token id")
    if tokenizer is None:
        raise ValueError("this model has no tokenizer; give prompts as {'prompt_token_ids': [...]} or tokenizer=")
    return prompt, tokenizer.encode(prompt)
