"""transformers on torch: its continuous batching, over a paged cache."""

from typing import Any

from protocol import Generate, serve
from transformers_worker import load


def open_peer(folder: str, dtype: str, options: dict[str, Any]) -> Generate:
    """See `protocol`."""
    from transformers import GenerationConfig

    model, _ = load(folder, dtype, options)

    def generate(prompts: list[list[int]], new_tokens: int) -> list[Any]:
        config = GenerationConfig(do_sample=False, max_new_tokens=new_tokens, eos_token_id=-1, pad_token_id=1)
        found = model.generate_batch(inputs=prompts, generation_config=config)
        by_prompt = {tuple(output.prompt_ids): output for output in found.values()}
        outputs = [by_prompt[tuple(prompt)] for prompt in prompts]
        for output in outputs:
            if output.error:
                raise RuntimeError(output.error)
        return [output.generated_tokens for output in outputs]

    return generate


if __name__ == "__main__":
    serve(open_peer)
