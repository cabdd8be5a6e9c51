"""`LLM`: generate from Python, in notebooks and jobs, in vLLM's shapes."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Self, Unpack

import numpy as np
from tqdm import tqdm

from apt_jax.engine.interface import ServingEngine
from apt_jax.output import Output
from apt_jax.progress import is_hidden
from apt_jax.request import FinishReason, SamplingParams
from apt_jax.sampling.params import PoolingParams
from apt_jax.serve.openai.prompts_only.embeddings import unit
from apt_jax.serve.python.chats import chat_prompts
from apt_jax.serve.python.options import LLMOptions, engine_options
from apt_jax.serve.python.outputs import (
    PoolingOutput,
    PoolingRequestOutput,
    RequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
)
from apt_jax.serve.python.prompts import Prompt, Prompted, RenderedChat, one_for_each, shown
from apt_jax.serve.runtime.build import build_engine
from apt_jax.serve.runtime.driver import Driver
from apt_jax.serve.runtime.samples import Sample
from apt_jax.tokenization.tokenizer import Tokenizer

Progress = bool | Callable[..., tqdm]


class LLM:
    """A model and its engine.

    Args:
        model: hub id, Hugging Face folder or converted folder; None is the bundled demo model.
        options: `tokenizer`, `revision`, `load_format`, and every field of `EngineConfig`, as on the command line.

    Raises:
        ValueError: an unknown option (the nearest known one is named), a bad value, or a model that cannot be loaded.
    """

    def __init__(self, model: str | None = None, **options: Unpack[LLMOptions]):
        loading, config = engine_options(options)
        config.check_offline()
        self._engine: ServingEngine | None = build_engine(model, engine_config=config, **loading)
        self.engine.warm_up(progress=True)
        self._numbers = itertools.count()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the model and its cache back; the object cannot generate any more. Also at the end of a `with`."""
        if self._engine is not None and self._engine.tokenizer is not None:
            self._engine.tokenizer.grammars.close()
        self._engine = None

    @property
    def engine(self) -> ServingEngine:
        """The engine.

        Raises:
            ValueError: this was closed.
        """
        if self._engine is None:
            raise ValueError("this LLM was closed, by close() or the end of its `with`; make a new one")
        return self._engine

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
        use_tqdm: Progress = True,
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
        listed = _listed(prompts, "prompts")
        given = next(
            (found for found in (sampling_params, params) if found is not None), self.get_default_sampling_params()
        )
        each = one_for_each(given, SamplingParams, len(listed), "params")
        priorities = one_for_each(0 if priority is None else priority, int, len(listed), "priority")
        prompted = self._prepare(listed, each, priorities)
        by_id = {sample.request_id: one for one in prompted for sample in one.samples}
        for sample, output in self._run(prompted, use_tqdm):
            by_id[sample.request_id].take(sample, output)
        return [one.result for one in prompted]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: Progress = True,
        lora_request: None = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        priority: int | Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Answer chats; the results are in their order.

        `messages` is one chat, a list of `{"role": ..., "content": ...}`, or a list of chats. They become text by
        `chat_template`, a Jinja template, or by the tokenizer's own; OPT models come without one. See `generate`.

        Raises:
            ValueError: there is no template, or it refuses the messages; otherwise as `generate`.
        """
        prompts = chat_prompts(messages, self.engine.tokenizer, chat_template, generate=add_generation_prompt)
        return self.generate(prompts, sampling_params, use_tqdm, lora_request, priority)

    def encode(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        normalize: bool = True,
        use_tqdm: Progress = True,
        priority: int | Sequence[int] | None = None,
    ) -> list[PoolingRequestOutput]:
        """The vector of each prompt: the model's last hidden state after its last token, of length 1 if `normalize`.

        So vLLM pools a model for text. It is made by the generating model as it is: whether near vectors mean like
        texts is for the model's users to find out.

        Raises:
            ValueError: a prompt cannot be served.
            RuntimeError: the engine failed on a prompt.
        """
        listed = _listed(prompts, "prompts")
        priorities = one_for_each(0 if priority is None else priority, int, len(listed), "priority")
        prompted = self._prepare(listed, [PoolingParams()] * len(listed), priorities)
        found: dict[str, np.ndarray] = {}
        for sample, output in self._run(prompted, use_tqdm):
            if output.finish_reason is FinishReason.ERROR:
                raise RuntimeError(f"the engine failed on request {sample.request_id}: {output.error}")
            if output.hidden is not None:
                found[sample.request_id] = unit(output.hidden) if normalize else output.hidden
        return [
            PoolingRequestOutput(
                one.result.request_id,
                one.result.prompt_token_ids,
                PoolingOutput(found[one.samples[0].request_id]),
            )
            for one in prompted
        ]

    def embed(self, prompts: Prompt | Sequence[Prompt], *, use_tqdm: Progress = True) -> list[PoolingRequestOutput]:
        """`encode`, under vLLM's other name; `.outputs.embedding` is the vector as numbers."""
        return self.encode(prompts, use_tqdm=use_tqdm)

    def score(
        self,
        data_1: Prompt | Sequence[Prompt],
        data_2: Prompt | Sequence[Prompt],
        *,
        use_tqdm: Progress = True,
    ) -> list[ScoringRequestOutput]:
        """How alike pairs of texts are: the cosine between their vectors. One text on the left is paired with each.

        Raises:
            ValueError: the numbers of texts do not fit, or one cannot be served.
            RuntimeError: the engine failed on one.
        """
        left, right = _listed(data_1, "data_1"), _listed(data_2, "data_2")
        if not left or not right:
            return []
        if len(left) not in (1, len(right)):
            raise ValueError(f"{len(left)} texts on the left and {len(right)} on the right; give one, or as many")
        vectors = self.encode([*left, *right], use_tqdm=use_tqdm)
        firsts, seconds = vectors[: len(left)], vectors[len(left) :]
        return [
            ScoringRequestOutput(
                f"{first.request_id}_{second.request_id}",
                [*first.prompt_token_ids, *second.prompt_token_ids],
                ScoringOutput(float(np.dot(first.outputs.data, second.outputs.data))),
            )
            for first, second in zip(firsts * (len(right) if len(left) == 1 else 1), seconds, strict=True)
        ]

    def _prepare(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams], priorities: Sequence[int]
    ) -> list[Prompted]:
        return [
            Prompted.prepare(
                prompt, each, self.engine, request_id=str(next(self._numbers)), number=number, priority=one
            )
            for number, (prompt, each, one) in enumerate(zip(prompts, params, priorities, strict=True))
        ]

    def _run(self, prompted: Sequence[Prompted], use_tqdm: Progress) -> Iterator[tuple[Sample, Output]]:
        """The outputs of all samples as they come.

        Raises:
            ValueError: the engine refuses one.
        """
        samples = [sample for one in prompted for sample in one.samples]
        numbers = {sample.request_id: number for number, one in enumerate(prompted) for sample in one.samples}
        tokens = 0
        make_bar = use_tqdm if callable(use_tqdm) else partial(tqdm, disable=is_hidden(use_tqdm))
        with make_bar(total=len(samples), desc="Generating", unit="sample") as bar:
            for sample, output in Driver(self.engine).run(samples):
                if isinstance(output, ValueError):
                    number = numbers[sample.request_id]
                    raise ValueError(f"prompt {number} of {len(prompted)}: {output}") from output
                yield sample, output
                tokens += len(output.token_ids)
                if output.finish_reason is not None:
                    bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-6):.0f} tokens/s", refresh=False)
                    bar.update()


def _listed(prompts: Prompt | Sequence[Prompt], name: str) -> list[Prompt]:
    if isinstance(prompts, str | Mapping | RenderedChat):
        return [prompts]
    if isinstance(prompts, bytes) or not isinstance(prompts, Iterable):
        raise ValueError(
            f"{name}={shown(prompts)} must be a text, {{'prompt_token_ids': [...]}}, or a list of these, one for each "
            "prompt"
        )
    return list(prompts)
