"""Division of memory at start-up: on the device weights, activations and the cache pool; the host's behind the pool."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import psutil

from apt_jax.cache import KINDS, MODE_KINDS, CacheKind, blocks_for
from apt_jax.engine.calibration import GENERIC
from apt_jax.engine_config import EngineConfig
from apt_jax.execution.multihost import smallest_of_all
from apt_jax.execution.platform import Platform
from apt_jax.execution.runner import Runner
from apt_jax.host_limits import unused_memory_bytes
from apt_jax.model_config import ModelConfig, Quantization
from apt_jax.scheduling.costs.cost_model import CostModel
from apt_jax.scheduling.costs.host_copies import worth_restoring
from apt_jax.scheduling.host_tier import HostTier

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes by use on each device, and what the pool holds."""

    device: str
    total_bytes: int
    weight_bytes: int
    activation_bytes: int
    block_bytes: int
    num_blocks: int
    block_size: int
    max_model_len: int
    longest_context_tokens: int
    num_devices: int = 1
    quantization: Quantization = "none"

    @property
    def pool_bytes(self) -> int:
        """Bytes of the cache pool on each device."""
        return self.num_blocks * self.block_bytes

    def tokens(self, kind: CacheKind) -> int:
        """Tokens that the whole pool holds as `kind`."""
        return self.num_blocks // kind.blocks_per_page * self.block_size

    def table(self) -> str:
        """The budget as lines of text for the log."""
        device = self.device if self.num_devices == 1 else f"each of {self.num_devices} x {self.device}"
        rows = (
            ("memory", self.total_bytes, device),
            ("weights", self.weight_bytes, "" if self.quantization == "none" else self.quantization),
            ("activations", self.activation_bytes, "largest compiled step"),
            ("cache pool", self.pool_bytes, f"{self.num_blocks} blocks of {self.block_size} tokens"),
        )
        lines = [f"  {name:<12}{value / 2**20:>12,.1f} MiB  {note}".rstrip() for name, value, note in rows]
        held = " or ".join(f"{self.tokens(kind):,} as {kind.spec.label}" for kind in KINDS)
        lines.append(f"  the pool holds {held.replace(' as', ' tokens as', 1)}")
        longest = self.longest_context_tokens
        lines.append(f"  longest context: {longest:,} tokens (max_model_len {self.max_model_len:,})")
        return "\n".join(lines)


def share_memory(runner: Runner, config: EngineConfig, kinds: tuple[CacheKind, ...]) -> MemoryBudget:
    """Measure the largest programs' memory, then divide the device's; several processes agree on the smallest pool.

    Raises:
        ValueError: see `budget_memory`.
    """
    max_model_len, max_num_seqs, devices = config.max_model_len, config.max_num_seqs, runner.num_devices
    assert max_model_len is not None and max_num_seqs is not None

    def budget(activation_bytes: int) -> MemoryBudget:
        return budget_memory(
            config,
            device=runner.device,
            weight_bytes=runner.weights.nbytes,
            activation_bytes=activation_bytes,
            block_bytes=runner.block_bytes,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            kinds=kinds,
            num_devices=devices,
            sharers=runner.num_local_devices,
        )

    guess = budget(activation_bytes=0)
    found = budget(runner.measure_activations(smallest_of_all(guess.num_blocks)))
    return replace(found, num_blocks=smallest_of_all(found.num_blocks), quantization=runner.weights.quantization)


def check_longest_request(config: EngineConfig, model_config: ModelConfig) -> None:
    """Refuse a number of blocks in which a request of the longest context does not fit, whatever it caches.

    Raises:
        ValueError: with the number that is needed, and the context that would fit.
    """
    if config.num_blocks is None:
        return
    max_model_len = config.max_model_len or model_config.max_position_embeddings
    kind = min(MODE_KINDS[config.cache_mode], key=_blocks_per_page)
    needed = blocks_for(max_model_len, kind, config.block_size)
    if config.num_blocks < needed:
        fits = config.num_blocks // kind.blocks_per_page * config.block_size
        shorter = f", or lower --max-model-len to at most {fits}" if fits else ""
        raise ValueError(
            f"num_blocks={config.num_blocks} cannot hold one request of max_model_len={max_model_len}, which takes "
            f"{needed} blocks of {config.block_size} tokens; raise --num-blocks{shorter}"
        )


def budget_memory(
    config: EngineConfig,
    *,
    device: jax.Device,
    weight_bytes: int,
    activation_bytes: int,
    block_bytes: int,
    max_model_len: int,
    max_num_seqs: int,
    kinds: tuple[CacheKind, ...],
    num_devices: int = 1,
    sharers: int = 1,
) -> MemoryBudget:
    """Divide a device's memory: how many blocks the pool gets.

    All bytes are of one device, also where the model is split over `num_devices`. `weight_bytes` are already allocated
    there; `block_bytes` counts one block over all layers. `sharers` is for devices of a CPU, see `device_memory`.

    Raises:
        ValueError: what is left cannot hold one request of `max_model_len` tokens; names the bytes and the flags.
    """
    total, free = device_memory(device, weight_bytes, sharers)
    cheapest = min(kinds, key=lambda kind: kind.blocks_per_page)
    needed = blocks_for(max_model_len, cheapest, config.block_size)
    useful = max_num_seqs * blocks_for(max_model_len, max(kinds, key=_blocks_per_page), config.block_size)
    left = free - activation_bytes
    used = (
        f"weights ({_mib(weight_bytes)}) and activations ({_mib(activation_bytes)}) leave {_mib(max(left, 0))} "
        f"of {_mib(total)}"
    )
    room, flag = _room(config, device, total, free, activation_bytes, sharers)
    fitting = max(room, 0) // block_bytes
    num_blocks = min(fitting, useful) if config.num_blocks is None else config.num_blocks
    if config.num_blocks is None and num_blocks < needed:
        fits = fitting // cheapest.blocks_per_page * config.block_size
        shorter = f", or lower --max-model-len to at most {fits}" if fits else ""
        raise ValueError(
            f"max_model_len={max_model_len} needs {_mib(needed * block_bytes)} of cache, {_mib(max(room, 0))} are "
            f"meant for it; {used}: {flag}{shorter}"
        )
    if num_blocks * block_bytes > left:
        taken = _mib(num_blocks * block_bytes)
        if config.num_blocks is not None:
            raise ValueError(f"num_blocks={num_blocks} takes {taken}, but {used}; lower --num-blocks")
        raise ValueError(
            f"cache_memory_bytes={config.cache_memory_bytes} would take {taken}, but {used}; lower --cache-memory-bytes"
        )
    longest = min(max_model_len, num_blocks // cheapest.blocks_per_page * config.block_size)
    return MemoryBudget(
        device=f"{device.platform}: {device.device_kind}",
        total_bytes=total,
        weight_bytes=weight_bytes,
        activation_bytes=activation_bytes,
        block_bytes=block_bytes,
        num_blocks=num_blocks,
        block_size=config.block_size,
        max_model_len=max_model_len,
        longest_context_tokens=longest,
        num_devices=num_devices,
    )


def _room(
    config: EngineConfig, device: jax.Device, total: int, free: int, activation_bytes: int, sharers: int
) -> tuple[int, str]:
    """Bytes meant for the cache (negative if weights and activations take more), and what to do to get more."""
    if config.cache_memory_bytes is not None:
        return config.cache_memory_bytes, f"raise --cache-memory-bytes (now {config.cache_memory_bytes})"
    share = config.device_memory_utilization
    room = int(total * share) - (total - free) - activation_bytes
    limit = Platform.of(device).cache_limit_bytes
    if limit is not None and room > limit // sharers:
        return limit // sharers, "raise --cache-memory-bytes"
    return room, f"raise --device-memory-utilization (now {share}), lower --max-num-batched-tokens"


def device_memory(device: jax.Device, weight_bytes: int, sharers: int = 1) -> tuple[int, int]:
    """Bytes of `device` that count as its memory, and those free now.

    A GPU or TPU reports it; on a CPU it is what is available on the machine and within the process's control groups,
    weights already loaded added, in equal parts for the `sharers` devices that one model is split over there.
    """
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"], stats["bytes_limit"] - stats["bytes_in_use"]
    available = host_memory_left()
    return available // sharers + weight_bytes, available // sharers


def host_memory_left() -> int:
    """Bytes of this machine's memory that this process may still take."""
    allowed, available = unused_memory_bytes(), int(psutil.virtual_memory().available)
    return available if allowed is None else min(available, allowed)


def _blocks_per_page(kind: CacheKind) -> int:
    return kind.blocks_per_page


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def host_tier(
    runner: Runner, config: EngineConfig, kinds: Sequence[CacheKind], cost_model: CostModel
) -> HostTier | None:
    """Host memory as `config` asks for it, with its copies measured; None without. Of several processes all call it.

    Raises:
        ValueError: fewer bytes than one block, or more than this machine has left.
    """
    if not config.host_cache_bytes:
        return None
    codes = config.host_cache_dtype == "int8"
    of_block = runner.host_block_bytes(codes=codes)
    slots = smallest_of_all(config.host_cache_bytes // of_block)
    if slots < 1:
        raise ValueError(
            f"host_cache_bytes={config.host_cache_bytes} is less than one block of the cache, {of_block} bytes; "
            "raise --host-cache-bytes or leave it out"
        )
    left = host_memory_left()
    if config.host_cache_bytes > left:
        raise ValueError(
            f"host_cache_bytes={config.host_cache_bytes} is more than the {left} bytes of memory that this machine has "
            "left; lower --host-cache-bytes"
        )
    runner.use_host(slots, codes=codes)
    save_s, restore_s = runner.measure_copies()
    is_known = cost_model.hardware is not GENERIC  # else copies are taken to be quicker than products
    worth = worth_restoring(cost_model, config.block_size, restore_s) if is_known else None
    tier = HostTier(slots, worth, block_s=restore_s)
    kept = ", ".join(kind.spec.label for kind in kinds if tier.restores[kind.index])
    logger.info(
        "host memory: %d blocks, %.2f GB/s from the device and %.2f GB/s to it; pages kept there: %s",
        slots, of_block / save_s / 1e9, of_block / restore_s / 1e9, kept or "none, to compute them is quicker",
    )  # fmt: skip
    return tier
