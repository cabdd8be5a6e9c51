"""Devices and models by name for studies, those with a starved pool beside those with headroom.

All policies of a setting have the same share of memory. `hidden_attention` is what this package runs there, except in
those whose name ends in `one-pass`: that kernel does not exist. `python -m experiments.studies.settings` prints them.
"""

from dataclasses import dataclass

from apt_jax.cache import CacheKind
from apt_jax.model_config import ModelConfig
from apt_jax.scheduling.costs.cost_model import HiddenMode
from apt_jax.scheduling.costs.decode_kernels import NUMBER_BYTES
from apt_jax.scheduling.costs.hardware import MODELS
from apt_jax.simulation.experiment import Experiment

SHARE = 0.92  # of the device's memory: vLLM's
CAP_BYTES = 10e9  # of the pool


@dataclass(frozen=True)
class Setting:
    """One device and model. `is_starved` says that memory, not time, ends a KV server's growth there."""

    experiment: Experiment
    is_starved: bool
    hidden_attention: HiddenMode = "absorbed"

    @property
    def kv_tokens(self) -> int:
        """Tokens that the pool holds as KV."""
        return self.experiment.pool_blocks() // CacheKind.KV.blocks_per_page * self.experiment.block_size


def capped_blocks(model: ModelConfig, block_size: int = 16) -> int:
    """Blocks of a pool of `CAP_BYTES`."""
    return int(CAP_BYTES // (model.num_hidden_layers * model.hidden_size * NUMBER_BYTES * block_size))


def _on(hardware: str, model: str, num_blocks: int | None = None) -> Experiment:
    """Without the prefix cache: nothing begins alike but conversations, which say for themselves what they keep."""
    return Experiment(
        model=model, hardware=hardware, num_blocks=num_blocks, device_memory_utilization=SHARE,
        enable_prefix_caching=False,
    )  # fmt: skip


SETTINGS = {
    "v6e-13b": Setting(_on("tpu-v6e", "opt-13b"), is_starved=True),
    "v6e-6.7b": Setting(_on("tpu-v6e", "opt-6.7b"), is_starved=False),
    "v5e-6.7b": Setting(_on("tpu-v5e", "opt-6.7b"), is_starved=True),
    "h200-13b-10gb": Setting(_on("h200", "opt-13b", capped_blocks(MODELS["opt-13b"])), is_starved=True),
    "h200-13b": Setting(_on("h200", "opt-13b"), is_starved=False),
    "a100-13b": Setting(_on("a100-40gb", "opt-13b"), is_starved=True),
    "a100-13b-one-pass": Setting(_on("a100-40gb", "opt-13b"), is_starved=True, hidden_attention="one-pass"),
    "a100-6.7b-one-pass": Setting(_on("a100-40gb", "opt-6.7b"), is_starved=False, hidden_attention="one-pass"),
}


def main() -> None:
    """Print a table."""
    print("| setting | device | model | hidden attention | tokens as KV | as hidden | pool |")
    print("|---|---|---|---|---:|---:|---|")
    for name, setting in SETTINGS.items():
        e, tokens = setting.experiment, setting.kv_tokens
        pool = "starved" if setting.is_starved else "headroom"
        hidden = e.pool_blocks() * e.block_size
        print(
            f"| `{name}` | {e.hardware} | {e.model} | {setting.hidden_attention} | {tokens:,} | {hidden:,} | {pool} |"
        )


if __name__ == "__main__":
    main()
