"""Blocks of the cache pool in the host's memory, by slot: pinned, so that the device copies them by itself.

A block is `[L, S, D]` in one piece, megabytes for a large model, so each is copied alone. Copies are started in the
order of the programs around them, and the host waits for none.
"""

from collections.abc import Sequence

import jax
from jax.sharding import Sharding

from apt_jax.execution.pool import Block

PINNED = "pinned_host"


class HostMemory:
    """`num_slots` slots, all empty; `sharding` is that of the pool."""

    def __init__(self, num_slots: int, sharding: Sharding):
        self._blocks: list[Block | None] = [None] * num_slots
        self._on_device, self._here = sharding, sharding.with_memory_kind(PINNED)

    @property
    def num_slots(self) -> int:
        """Blocks that fit."""
        return len(self._blocks)

    def put(self, slots: Sequence[int], blocks: Sequence[Block]) -> None:
        """Copy blocks from the device to slots; what was there is lost."""
        for slot, block in zip(slots, blocks, strict=True):
            self._blocks[slot] = None  # first, so that never more than all slots is taken
            self._blocks[slot] = jax.device_put(block, self._here)

    def get(self, slots: Sequence[int]) -> list[Block]:
        """Copies of what is in slots, on the device."""
        return [jax.device_put(self._block(slot), self._on_device) for slot in slots]

    def wait(self) -> None:
        """Until everything is copied."""
        jax.block_until_ready([block for block in self._blocks if block is not None])

    def _block(self, slot: int) -> Block:
        block = self._blocks[slot]
        assert block is not None, f"slot {slot} is empty"
        return block
