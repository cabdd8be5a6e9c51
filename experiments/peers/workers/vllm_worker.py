"""vLLM for CPUs, in this process; its memory allocator is tcmalloc where that is installed."""

import os

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from typing import Any

from protocol import Generate, serve


def open_peer(folder: str, dtype: str, options: dict[str, Any]) -> Generate:
    """See `protocol`."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=folder, dtype=dtype, max_model_len=2048, max_num_seqs=32, enable_prefix_caching=False,
        skip_tokenizer_init=True, disable_log_stats=True,
    )  # fmt: skip

    def generate(prompts: list[list[int]], new_tokens: int) -> list[Any]:
        params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        results = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return [result.outputs[0].token_ids for result in results]

    return generate


if __name__ == "__main__":
    serve(open_peer)
