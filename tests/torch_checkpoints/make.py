"""Make the torch checkpoints beside this file: `PYTHON tests/torch_checkpoints/make.py`.

Any Python that has torch, transformers and safetensors will do; our own package is not imported. Each folder
is a checkpoint as torch and transformers write it, and `expected/` in it the same weights as safetensors.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import OPTConfig, OPTForCausalLM

HERE = Path(__file__).parent
SHAPE = {
    "vocab_size": 72,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "ffn_dim": 24,
    "max_position_embeddings": 8,
    "num_attention_heads": 2,
    "word_embed_proj_dim": 12,
}


def main() -> None:
    """Write every folder anew."""
    # As facebook/opt-* have it: the tied head is stored too, and shares the embedding's storage.
    config, state = model(torch.float16, tie_word_embeddings=True)
    folder = start("whole", config, state)
    torch.save(state, folder / "pytorch_model.bin")

    config, state = model(torch.bfloat16, tie_word_embeddings=False, do_layer_norm_before=False)
    folder = start("sharded", config, state)
    names = list(state)
    weight_map = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        shard = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: state[name] for name in part}, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=1))

    # Written as before torch 1.6, with the base model's keys and metaseq's version mark.
    config, state = model(torch.float32, tie_word_embeddings=True, enable_bias=False)
    folder = start("legacy", config, state)
    base = {name.removeprefix("model."): tensor for name, tensor in state.items() if name != "lm_head.weight"}
    base["decoder.version"] = torch.tensor([3.0])
    torch.save(base, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def model(dtype: torch.dtype, **fields: object) -> tuple[OPTConfig, dict[str, torch.Tensor]]:
    """A config and the state dict of a model of it, with random numbers in every tensor."""
    torch.manual_seed(0)
    config = OPTConfig(**SHAPE, **fields)
    made = OPTForCausalLM(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return config, made.to(dtype).state_dict()


def start(name: str, config: OPTConfig, state: dict[str, torch.Tensor]) -> Path:
    """Write config.json and the expected weights; returns the folder."""
    folder = HERE / name
    dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
    text = json.dumps({**config.to_diff_dict(), "model_type": "opt", "torch_dtype": dtype}, indent=1)
    for place in (folder, folder / "expected"):
        place.mkdir(parents=True, exist_ok=True)
        (place / "config.json").write_text(text + "\n")
    alone = {n: t.contiguous() for n, t in state.items() if n != "lm_head.weight" or not config.tie_word_embeddings}
    save_file(alone, folder / "expected" / "model.safetensors", metadata={"format": "pt"})
    return folder


if __name__ == "__main__":
    main()
