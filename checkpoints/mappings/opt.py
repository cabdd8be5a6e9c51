"""Which Hugging Face tensor fills which slice of which parameter of `apt_jax.models.opt.OPT`.

Source: transformers `modeling_opt.py` and `modeling_flax_opt.py` (names and shapes).
"""

from apt_jax.checkpoints.mapping import Layout, Slot, WeightMapping
from apt_jax.model_config import POSITION_OFFSET, ModelConfig

EMBEDDING_NAME = "model.decoder.embed_tokens.weight"
HEAD_NAME = "lm_head.weight"
_BASE = "model.decoder."
_IGNORED = frozenset({"model.decoder.version"})  # a format mark that metaseq exports carry, not a weight


def _slots(config: ModelConfig) -> list[Slot]:
    found = [*_embedding_slots(config)]
    for layer in range(config.num_hidden_layers):
        found += _layer_slots(config, layer)
    if config.has_final_layer_norm:
        found += _norm(config, "final_layer_norm", None)
    if not config.tie_word_embeddings:
        E, V = config.word_embed_proj_dim, config.vocab_size
        found.append(Slot(HEAD_NAME, ("lm_head", "kernel"), None, Layout.LINEAR, (E, V), (E, V)))
    return found


def _canonical_name(stored: str) -> str | None:
    """Exports differ in whether `model.` is in front."""
    name = f"model.{stored}" if stored.startswith("decoder.") else stored
    return None if name in _IGNORED else name


def _embedding_slots(config: ModelConfig) -> list[Slot]:
    D, E, V = config.hidden_size, config.word_embed_proj_dim, config.vocab_size
    rows = config.max_position_embeddings + POSITION_OFFSET
    found = [
        Slot(EMBEDDING_NAME, ("embed_tokens", "embedding"), None, Layout.TABLE, (V, E), (V, E)),
        Slot(
            f"{_BASE}embed_positions.weight",
            ("embed_positions", "embedding"),
            None,
            Layout.TABLE,
            (rows, D),
            (rows, D),
        ),
    ]
    if E != D:
        found.append(Slot(f"{_BASE}project_in.weight", ("project_in", "kernel"), None, Layout.LINEAR, (E, D), (E, D)))
        found.append(Slot(f"{_BASE}project_out.weight", ("project_out", "kernel"), None, Layout.LINEAR, (D, E), (D, E)))
    return found


def _layer_slots(config: ModelConfig, layer: int) -> list[Slot]:
    D, F, N, H = config.hidden_size, config.ffn_dim, config.num_attention_heads, config.head_dim
    found: list[Slot] = []
    for name in ("q_proj", "k_proj", "v_proj"):
        found += _linear(config, f"self_attn.{name}", layer, kernel=(D, N, H), matrix=(D, D), bias=(N, H))
    found += _linear(config, "self_attn.out_proj", layer, kernel=(N, H, D), matrix=(D, D), bias=(D,))
    found += _norm(config, "self_attn_layer_norm", layer)
    found += _linear(config, "fc1", layer, kernel=(D, F), matrix=(D, F), bias=(F,))
    found += _linear(config, "fc2", layer, kernel=(F, D), matrix=(F, D), bias=(D,))
    return found + _norm(config, "final_layer_norm", layer)


def _linear(
    config: ModelConfig,
    module: str,
    layer: int,
    *,
    kernel: tuple[int, ...],
    matrix: tuple[int, int],
    bias: tuple[int, ...],
) -> list[Slot]:
    name, path = f"{_BASE}layers.{layer}.{module}", ("layers", *module.split("."))
    found = [Slot(f"{name}.weight", (*path, "kernel"), layer, Layout.LINEAR, matrix, kernel)]
    if config.enable_bias:
        found.append(Slot(f"{name}.bias", (*path, "bias"), layer, Layout.VECTOR, (matrix[1],), bias))
    return found


def _norm(config: ModelConfig, module: str, layer: int | None) -> list[Slot]:
    if not config.layer_norm_elementwise_affine:
        return []
    width = (config.hidden_size,)
    prefix, path = (_BASE, (module,)) if layer is None else (f"{_BASE}layers.{layer}.", ("layers", module))
    return [
        Slot(f"{prefix}{module}.weight", (*path, "scale"), layer, Layout.VECTOR, width, width),
        Slot(f"{prefix}{module}.bias", (*path, "bias"), layer, Layout.VECTOR, width, width),
    ]


OPT_MAPPING = WeightMapping(_slots, EMBEDDING_NAME, HEAD_NAME, _canonical_name)
