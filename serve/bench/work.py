"""The requests of a benchmark: lengths from a table, prompts as token ids or as texts of exactly that many tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from apt_jax.files import read_json
from apt_jax.serve.bench.work_options import WorkOptions
from apt_jax.simulation.requests.conversations import UNIFORM, Conversations
from apt_jax.simulation.workload import NAMED, Lengths, load_lengths, recorded_times, shuffled_rows

if TYPE_CHECKING:
    from apt_jax.tokenization.tokenizer import Tokenizer

LOWEST_ID = 10  # those below may be special
DEFAULT_MAX_MODEL_LEN = 2048
MIN_TEXT_TOKENS = 4  # shorter prompts and answers of a ShareGPT file are left out, as vLLM does
TEXT_TRIES = 8
LETTERS = list("abcdefghijklmnopqrstuvwxyz     ")


Content = str | list[int]


@dataclass(frozen=True)
class Work:
    """One request: its prompt, how many tokens that is, and how many to ask for.

    Attributes:
        prompt: in a conversation only the question.
        prompt_tokens: of all that it sends.
        output_tokens: to ask for.
        earlier: of a conversation, who said what before: system, user or assistant.
        then: the conversation's next turn, whose `earlier` is known once this one is answered.
        think_s: seconds from the answer before it until it is sent.
    """

    prompt: Content
    prompt_tokens: int
    output_tokens: int
    earlier: tuple[tuple[str, Content], ...] = ()
    then: "Work | None" = None
    think_s: float = 0.0

    @property
    def num_turns(self) -> int:
        """Requests from this one to the end of its conversation."""
        return 1 + (0 if self.then is None else self.then.num_turns)

    @property
    def said(self) -> tuple[tuple[str, Content], ...]:
        """All that it sends, by who said it."""
        return (*self.earlier, ("user", self.prompt))

    def answered(self, answer: Content) -> "Work":
        """The next turn, after this `answer`."""
        assert self.then is not None
        return replace(self.then, earlier=(*self.said, ("assistant", answer)))


@dataclass(frozen=True)
class Dataset:
    """A table of lengths; `texts` are the prompts where the dataset has its own.

    Of conversations it is the table of their questions and answers, empty if these are uniform.
    """

    lengths: Lengths
    texts: tuple[str, ...] | None = None
    conversations: Conversations | None = None
    max_model_len: int = DEFAULT_MAX_MODEL_LEN

    @property
    def has_arrivals(self) -> bool:
        """Whether arrival times were recorded."""
        return self.lengths.arrival_s is not None

    def rows(self, count: int, *, seed: int, in_order: bool = False) -> NDArray[np.int64]:
        """`[count]` rows of the table: in shuffled passes, or in their order as recorded arrivals need."""
        rows = len(self.lengths.prompt_tokens)
        return np.arange(count) % rows if in_order else shuffled_rows(rows, count, seed=seed)

    def recorded_times(self, count: int, rate: float | None) -> NDArray[np.float64]:
        """`[count]` recorded arrival seconds, stretched to `rate` unless it is None."""
        return recorded_times(self.lengths, count, rate=self.lengths.recorded_rate if rate is None else rate)


def load_dataset(
    options: WorkOptions, *, seed: int, tokenizer: "Tokenizer | None", max_model_len: int | None = None
) -> Dataset:
    """The dataset that `options.dataset` names. Requests longer than `max_model_len` are left out.

    Raises:
        ValueError: it cannot be read, needs a tokenizer, or has no request that fits.
    """
    longest = max_model_len or DEFAULT_MAX_MODEL_LEN
    if options.dataset == "random":
        return Dataset(_random_lengths(options, seed, longest))
    check_dataset(options)
    if (shape := Conversations.parse(options.dataset)) is not None:
        table = Lengths(UNIFORM, *np.zeros((2, 0), np.int64))
        if shape.lengths != UNIFORM:
            table = load_lengths(shape.lengths, longest)
        return Dataset(table, conversations=shape, max_model_len=longest)
    if options.dataset.endswith(".json"):
        return _sharegpt(Path(options.dataset), tokenizer, longest)
    return Dataset(load_lengths(options.dataset, longest))


def check_dataset(options: WorkOptions) -> None:
    """Raises ValueError if `options.dataset` names nothing; checks before a model is loaded."""
    if options.dataset in ("random", *NAMED) or Conversations.parse(options.dataset) is not None:
        return
    for name in [options.dataset] if options.dataset.endswith(".json") else options.dataset.split("+"):
        if name not in NAMED and not Path(name).is_file():
            raise ValueError(f"dataset={name!r} is neither a file nor one of random, {', '.join(NAMED)}, conversations")


def make_work(
    dataset: Dataset, rows: Sequence[int], *, vocab_size: int, tokenizer: "Tokenizer | None", seed: Sequence[int]
) -> list[Work]:
    """Requests of these rows. Prompts are random except for a dataset's own texts; equal seeds give equal prompts."""
    generator = np.random.default_rng(seed)
    made = []
    for row in rows:
        prompt_tokens, output_tokens = (
            int(column[row]) for column in (dataset.lengths.prompt_tokens, dataset.lengths.output_tokens)
        )
        prompt: str | list[int]
        if dataset.texts is not None:
            prompt = dataset.texts[row]
        elif tokenizer is None:
            prompt = generator.integers(LOWEST_ID, vocab_size, prompt_tokens).tolist()
        else:
            prompt, prompt_tokens = text_of_length(tokenizer, prompt_tokens, generator)
        made.append(Work(prompt, prompt_tokens, output_tokens))
    return made


def make_conversations(
    dataset: Dataset, num_requests: int, *, vocab_size: int, tokenizer: "Tokenizer | None", seed: Sequence[int]
) -> list[Work]:
    """First turns, with those that follow, of conversations with `num_requests` requests or a few more.

    Lengths and think times are the same for every `seed` that begins alike; its other numbers make other prompts.

    Raises:
        ValueError: they do not fit into the context.
    """
    shape, longest = dataset.conversations, dataset.max_model_len
    assert shape is not None
    table = dataset.lengths if len(dataset.lengths.prompt_tokens) else None
    drawn, wanted = [], num_requests
    for turns in shape.draw(num_requests, table, seed=seed[0], max_model_len=longest):
        if wanted <= 0:
            break
        drawn.append(turns)
        wanted -= len(turns)
    generator = np.random.default_rng(seed)

    def content(tokens: int) -> Content:
        if tokenizer is not None:
            return text_of_length(tokenizer, tokens, generator)[0]
        return generator.integers(LOWEST_ID, vocab_size, tokens).tolist()

    system = (("system", content(shape.system_tokens)),) if shape.system_tokens else ()
    found = []
    for turns in drawn:
        questions = [content(turn.prompt_tokens - turn.earlier_tokens) for turn in turns]
        work: Work | None = None
        for turn, question in zip(reversed(turns), reversed(questions), strict=True):
            work = Work(question, turn.prompt_tokens, turn.output_tokens, (), work, turn.think_s)
        assert work is not None
        found.append(replace(work, earlier=system))
    return found


def text_of_length(tokenizer: "Tokenizer", tokens: int, generator: np.random.Generator) -> tuple[str, int]:
    """A random text of `tokens` tokens, special ones included, and its number of tokens: seldom fewer, never more.

    Raises:
        ValueError: no text is so short.
    """
    ids = tokenizer.encode("".join(generator.choice(LETTERS, 8 * tokens + 16)))
    keep, best = tokens, ("", 0)
    for _ in range(TEXT_TRIES):
        text = tokenizer.decode(ids[:keep])
        found = len(tokenizer.encode(text)) if text else 0
        if best[1] < found <= tokens:
            best = text, found
        if found == tokens:
            break
        keep += tokens - found
    if not best[0]:
        raise ValueError(f"the tokenizer makes no text of {tokens} tokens; ask for longer prompts or send token ids")
    return best


def load_tokenizer(name: str | None) -> "Tokenizer | None":
    """The tokenizer in a folder or hub repository; None gives None.

    Raises:
        ValueError: there is none.
    """
    if name is None:
        return None
    from apt_jax.checkpoints.formats.weight_files import LoadFormat
    from apt_jax.checkpoints.source import resolve
    from apt_jax.tokenization.tokenizer import Tokenizer

    return Tokenizer.from_folder(resolve(name, revision=None, load_format=LoadFormat.DUMMY))


def _random_lengths(options: WorkOptions, seed: int, longest: int) -> Lengths:
    generator = np.random.default_rng([seed, 2])

    def draw(middle: int) -> NDArray[np.int64]:
        spread = int(middle * options.random_range_ratio)
        return generator.integers(max(middle - spread, 1), middle + spread + 1, options.num_prompts)

    prompt, output = draw(options.random_input_len), draw(options.random_output_len)
    if (most := int((prompt + output).max())) > longest:
        raise ValueError(
            f"random requests of up to {most} tokens are more than the {longest} of the model's context; lower "
            "--random-input-len or --random-output-len"
        )
    return Lengths("random", prompt, output)


def _sharegpt(path: Path, tokenizer: "Tokenizer | None", longest: int) -> Dataset:
    """First question and answer of every conversation, as long as the tokenizer says."""
    if tokenizer is None:
        raise ValueError(f"the texts of {path} need a tokenizer to be counted; give --tokenizer")
    try:
        conversations = read_json(path)
        turns = [[str(turn["value"]) for turn in c["conversations"][:2]] for c in conversations]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'{path} is not a ShareGPT file, a JSON list of {{"conversations": [{{"value": TEXT}}, ...]}}: {error!r}'
        ) from error
    texts, prompt, output = [], [], []
    for pair in turns:
        if len(pair) < 2:
            continue
        asked, answered = (len(tokenizer.encode(text)) for text in pair)
        if min(asked, answered) >= MIN_TEXT_TOKENS and asked + answered <= longest:
            texts.append(pair[0])
            prompt.append(asked)
            output.append(answered)
    if not texts:
        raise ValueError(f"{path} has no conversation of two turns and at most {longest} tokens")
    return Dataset(Lengths(str(path), np.array(prompt), np.array(output)), tuple(texts))
