"""transformers on torch: `generate` with its default attention, all prompts as one batch."""

from protocol import serve


def open_peer(folder, dtype, options):
    """See `protocol`."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def generate(prompts, new_tokens):
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            found = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens,
                min_new_tokens=new_tokens, pad_token_id=1,
            )  # fmt: skip
        return found[:, ids.shape[1] :].tolist()

    return generate


if __name__ == "__main__":
    serve(open_peer)
