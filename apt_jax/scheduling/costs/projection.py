"""When a request that is to have KV takes a cached hidden prefix by projecting it, instead of computing its prompt."""

from apt_jax.scheduling.costs.cost_model import CostModel

PROGRAM_TOKENS = 256  # that one call of the program projects, padded (`execution/arguments.py`)
MOST_TOKENS = 4096


def least_projected_tokens(model: CostModel) -> int | None:
    """The fewest cached hidden tokens that are projected in less time than they are computed from their ids. Pure.

    The calls of the program are padded, and each is taken to cost the host what an iteration does. None where it never
    pays, or changes tokens: keys and values projected from rounded vectors (an int8 cache) are not those of a prompt.
    """
    if model.cache_dtype == "int8":
        return None
    scale = model.scales.dense * model.scales.compute
    for tokens in range(1, MOST_TOKENS + 1):
        calls = -(-tokens // PROGRAM_TOKENS)
        project_s = calls * (PROGRAM_TOKENS * model.projection_s * scale + model.overhead_s)
        if project_s < tokens * model.token_s * scale:
            return tokens
    return None
