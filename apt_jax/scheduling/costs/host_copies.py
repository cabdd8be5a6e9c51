"""What copies between device and host memory cost, against computing the same tokens again."""

from dataclasses import dataclass

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


@dataclass(frozen=True)
class CopyForm:
    """How blocks go to host memory and back. The defaults are the engine's; studies vary them.

    Attributes:
        share: of a block's bytes that are moved and kept: 0.5 if 16-bit numbers were stored as int8 ones.
        calls_s: seconds of a block beyond its bytes, where it goes by copies of its own, not with all others of a step.
        saves_beside, restores_beside: whether copies run beside the device's work, or before it. Pages that a plan
            fetches ahead of need always come beside it.
        retains: whether the host keeps the copy of what came back (`HostTier`).
    """

    share: float = 1.0
    calls_s: float = 0.0
    saves_beside: bool = True
    restores_beside: bool = False
    retains: bool = True

    def seconds(self, step_s: float, saves_s: float, restores_s: float, fetches_s: float = 0.0) -> float:
        """Seconds of an iteration with work of `step_s`, copies included; each direction has a link of its own."""
        before_s = saves_s * (not self.saves_beside) + restores_s * (not self.restores_beside)
        return max(before_s + step_s, saves_s, restores_s + fetches_s)
