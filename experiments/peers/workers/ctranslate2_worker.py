"""CTranslate2: converted once with its own converter; prompts and answers are names of tokens."""

import os
from typing import Any

from protocol import Generate, serve


def open_peer(folder: str, dtype: str, options: dict[str, Any]) -> Generate:
    """See `protocol`."""
    import ctranslate2
    from ctranslate2.converters import TransformersConverter

    target = folder + "-ctranslate2"
    if not os.path.isfile(os.path.join(target, "model.bin")):
        TransformersConverter(folder).convert(target, force=True)
    threads = os.cpu_count()
    generator = ctranslate2.Generator(target, device="cpu", compute_type=dtype, intra_threads=threads)
    names = _names(folder)

    def generate(prompts: list[list[int]], new_tokens: int) -> list[Any]:
        results = generator.generate_batch(
            [[names[token] for token in prompt] for prompt in prompts], max_length=new_tokens, min_length=new_tokens,
            sampling_topk=1, beam_size=1, include_prompt_in_result=False, max_batch_size=0,
        )  # fmt: skip
        return [result.sequences_ids[0] for result in results]

    return generate


def _names(folder: str) -> list[str]:
    from transformers import AutoTokenizer

    vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
    return sorted(vocabulary, key=vocabulary.__getitem__)


if __name__ == "__main__":
    serve(open_peer)
