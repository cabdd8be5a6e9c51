"""transformers on torch: `generate` with its default attention, all prompts as one batch."""

from typing import Any

from protocol import Generate, serve


def load(folder: str, dtype: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """The model, and the device that it is on."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    device = torch.device("cuda" if options["platform"] == "gpu" else "cpu")
    if not options["dummy"]:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval().to(device), device
    with device:
        return AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder), dtype=getattr(torch, dtype)
        ).eval(), device


def open_peer(folder: str, dtype: str, options: dict[str, Any]) -> Generate:
    """See `protocol`."""
    import torch

    model, device = load(folder, dtype, options)

    def generate(prompts: list[list[int]], new_tokens: int) -> list[Any]:
        ids = torch.tensor(prompts, device=device)
        with torch.inference_mode():
            found = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens,
                min_new_tokens=new_tokens, pad_token_id=1,
            )  # fmt: skip
        return found[:, ids.shape[1] :].tolist()

    return generate


if __name__ == "__main__":
    serve(open_peer)
