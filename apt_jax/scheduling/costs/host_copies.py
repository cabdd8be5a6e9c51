"""What copies between device and host memory cost, against computing the same tokens again."""

from apt_jax.cache import KINDS
from apt_jax.scheduling.costs.cost_model import CostModel
from apt_jax.scheduling.costs.step_load import StepLoad

PROMPT_TOKENS = 2048  # of the chunk whose time says what computing a token costs: more than reading weights takes


def worth_restoring(cost_model: CostModel, block_size: int, copy_s: float) -> list[bool]:
    """By kind: whether copying a page back, `copy_s` seconds a block, is quicker than computing its tokens.

    Computing is charged as a part of a long prompt, which is the least it costs.
    """
    whole, half = (
        cost_model.step_s(StepLoad(prefill_tokens=count, prefill_pairs=count * (count + 1) // 2))
        for count in (PROMPT_TOKENS, PROMPT_TOKENS // 2)
    )
    page_s = block_size * (whole - half) / (PROMPT_TOKENS - PROMPT_TOKENS // 2)
    return [kind.blocks_per_page * copy_s < page_s for kind in KINDS]
