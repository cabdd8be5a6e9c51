"""Follows JSON schemas with one library: reads a line of JSON for each schema, answers with one.

Run by `experiments/peers/grammars.py` with an interpreter that has the library; needs nothing of this project, but for
`apt-jax`, which is llguidance in the processes of grammars that the engine has.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import tokenizers

WHITE_SPACE = r"[ ]?|\n[ ]{0,40}"  # of apt_jax/tokenization/grammars/process.py


class Follower(Protocol):
    """One output in its grammar."""

    def mask(self) -> None:
        """Find the tokens that may come next."""

    def accept(self, token: int) -> bool:
        """Whether the token may come next; it is taken in."""

    def can_end(self) -> bool:
        """Whether the output may end here."""


class LLGuidance:
    """As the engine uses it, with its limits."""

    def __init__(self, path: str, eos: int):
        import llguidance
        import llguidance.numpy as filling

        self._library, self._fill = llguidance, filling.fill_next_token_bitmask
        with open(path, encoding="utf-8") as file:
            self._tokenizer = llguidance.LLTokenizer(file.read(), eos_token=eos)
        self._words = np.zeros((1, -(-self._tokenizer.vocab_size // 32)), np.int32)
        self._limits = llguidance.LLParserLimits(max_items_in_row=500, step_max_items=20_000, max_lexer_states=50_000)

    def compile(self, schema: str) -> None:
        """Raises ValueError if it cannot."""
        make = self._library.LLMatcher
        grammar = make.grammar_from_json_schema(schema, defaults={"whitespace_pattern": WHITE_SPACE})
        self._kept = make(self._tokenizer, grammar, log_level=0, limits=self._limits)
        if self._kept.is_error():
            raise ValueError(self._kept.get_error().strip().splitlines()[0])

    def start(self) -> Follower:
        """At the beginning."""
        matcher, fill, words = self._kept.deep_copy(), self._fill, self._words

        class Own:
            def mask(self) -> None:
                fill(matcher, words)

            def accept(self, token: int) -> bool:
                return bool(words[0, token // 32] >> (token % 32) & 1) and matcher.consume_token(token)

            def can_end(self) -> bool:
                return bool(matcher.is_accepting())

        return Own()


class AptJax:
    """As requests of the engine follow it: each grammar in a process of its own, with its limits."""

    def __init__(self, path: str, eos: int):
        from apt_jax.tokenization.grammars.compiling import Grammars

        with open(path, encoding="utf-8") as file:
            text = file.read()
        self._grammars, self._eos = Grammars(lambda: text, eos), eos
        self._words = np.zeros(-(-tokenizers.Tokenizer.from_str(text).get_vocab_size() // 32), np.int32)

    def compile(self, schema: str) -> None:
        """Raises ValueError if it cannot."""
        self._asked = {"json": json.loads(schema)}
        self._grammars.check(self._asked)

    def start(self) -> Follower:
        """At the beginning."""
        matcher, words, eos = self._grammars.matcher(self._asked), self._words, self._eos

        class Own:
            def mask(self) -> None:
                matcher.allow(words)  # after an error no bit is set

            def accept(self, token: int) -> bool:
                return bool(words[token // 32] >> (token % 32) & 1) and matcher.accept(token) is None

            def can_end(self) -> bool:
                matcher.is_complete or matcher.allow(words)
                return matcher.is_complete or bool(words[eos // 32] >> (eos % 32) & 1)

        return Own()


class XGrammar:
    """With its defaults as vLLM calls it: white space is free."""

    def __init__(self, path: str, eos: int):
        import xgrammar

        self._library = xgrammar
        names = tokenizers.Tokenizer.from_file(path).get_vocab()
        listed = [name for name, _ in sorted(names.items(), key=lambda item: item[1])]
        info = xgrammar.TokenizerInfo(
            listed, vocab_type=xgrammar.VocabType.BYTE_LEVEL, stop_token_ids=[eos], vocab_size=len(listed)
        )
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        self._words = xgrammar.allocate_token_bitmask(1, len(listed))
        self._eos = eos

    def compile(self, schema: str) -> None:
        """Raises what it raises."""
        self._kept = self._compiler.compile_json_schema(schema, strict_mode=False)

    def start(self) -> Follower:
        """At the beginning."""
        matcher, words, eos = self._library.GrammarMatcher(self._kept), self._words, self._eos

        class Own:
            def mask(self) -> None:
                matcher.fill_next_token_bitmask(words)

            def accept(self, token: int) -> bool:
                return bool(matcher.accept_token(token))

            def can_end(self) -> bool:
                return bool(matcher.accept_token(eos))

        return Own()


class OutlinesCore:
    """An index of all states, as it is meant to be used."""

    def __init__(self, path: str, eos: int):
        import outlines_core
        from outlines_core.kernels.numpy import allocate_token_bitmask

        self._library, self._eos = outlines_core, eos
        names = tokenizers.Tokenizer.from_file(path)
        vocabulary: dict[bytes, list[int]] = {}
        table = _bytes_of_characters()
        for name, token in names.get_vocab().items():
            if token != eos and all(letter in table for letter in name):
                vocabulary.setdefault(bytes(table[letter] for letter in name), []).append(token)
        self._vocabulary = outlines_core.Vocabulary(eos, vocabulary)
        self._words = allocate_token_bitmask(names.get_vocab_size())

    def compile(self, schema: str) -> None:
        """Raises what it raises."""
        regex = self._library.json_schema.build_regex_from_schema(schema)
        self._kept = self._library.Index(regex, self._vocabulary)

    def start(self) -> Follower:
        """At the beginning."""
        guide, words = self._library.Guide(self._kept), self._words

        class Own:
            def mask(self) -> None:
                guide.write_mask_into(words.ctypes.data, words.size, 4)

            def accept(self, token: int) -> bool:
                if not guide.accepts_tokens([token]):
                    return False
                guide.advance(token, return_tokens=False)
                return True

            def can_end(self) -> bool:
                return bool(guide.is_finished())

        return Own()


def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's characters for bytes."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in kept}
    others = [byte for byte in range(256) if byte not in kept]
    return {**table, **{chr(256 + place): byte for place, byte in enumerate(others)}}


LIBRARIES: dict[str, Callable[[str, int], Any]] = {
    "llguidance": LLGuidance, "apt-jax": AptJax, "xgrammar": XGrammar, "outlines-core": OutlinesCore,
}  # fmt: skip


def follow(library: Any, schema: str, texts: list[list[int]]) -> dict[str, Any]:
    """Compile a schema, and follow each list of tokens, which is an instance of it."""
    began = time.perf_counter()
    try:
        library.compile(schema)
        first = library.start()
        first.mask()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return {"error": f"{type(error).__name__}: {error}"[:300], "compile_s": time.perf_counter() - began}
    compile_s, masks, accepted = time.perf_counter() - began, [], []
    for tokens in texts:
        follower = library.start()
        taken = True
        for token in tokens:
            began = time.perf_counter()
            follower.mask()
            taken = follower.accept(token)
            masks.append(time.perf_counter() - began)
            if not taken:
                break
        accepted.append(taken and follower.can_end())
    return {"compile_s": compile_s, "masks_s": masks, "accepted": accepted}


def main() -> None:
    """Answer line by line."""
    name, path, eos = sys.argv[1:]
    library = LIBRARIES[name](path, int(eos))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        found = follow(library, asked["schema"], asked["texts"])
        found["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
