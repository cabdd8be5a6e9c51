"""One of the processes of an engine that is split over two; `tests/model/test_tensor_parallel.py` starts them.

    PYTHONPATH=.:tests python tests/support/two_processes.py FOLDER ADDRESS NUMBER

Every process prints the bytes that it read for the weights and the share of them that it holds; process 0 also the
tokens that it generated, all as JSON.
"""

import json
import math
import os
import sys
from pathlib import Path

if __name__ == "__main__":  # before jax is imported
    os.environ |= {"XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu"}

import apt_jax.checkpoints.formats.orbax_store
import apt_jax.serve.runtime.build
from apt_jax.checkpoints.load import load_model
from apt_jax.engine_config import EngineConfig
from apt_jax.request import SamplingParams
from apt_jax.serve.options import DistributedOptions
from apt_jax.serve.runtime.starting.distributed import join
from tests.support.engines import finish
from tests.support.sharded_engines import few_shapes

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, prompt_logprobs=1)
PROMPTS = ([5, 6, 7], [9] * 20, list(range(3, 43)))
# few shapes; a pool for about two requests, so that some wait, are preempted and converted
OPTIONS = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "num_blocks": 20, "block_size": 8, "max_model_len": 64}


def make_engine(folder: str, num_devices: int):
    config = EngineConfig(tensor_parallel_size=num_devices, scheduling_policy="fcfs", **OPTIONS)
    return apt_jax.serve.runtime.build.build_engine(folder, engine_config=config)


def generate(engine) -> list[list[int]]:
    seen = []  # the hidden states after prompts come from both processes
    engine.policy.uses_prompt_states, engine.policy.saw_prompt = True, lambda _, state: seen.append(state.sum())
    requests = [engine.add(p, GREEDY, request_id=str(i)) for i, p in enumerate(PROMPTS)]
    finish(engine)
    assert len(seen) == len(PROMPTS) and all(map(math.isfinite, seen))
    assert sum(r.num_preemptions + r.num_conversions for r in requests) > 0
    return [r.output_token_ids for r in requests]


def bytes_read() -> int:
    """By this process so far, from files and everything else."""
    return int(Path("/proc/self/io").read_text().split()[1])


def measured_load(*args, **options):
    before = bytes_read()
    loaded = load_model(*args, **options)
    held = sum(shard.data.nbytes for leaf in _leaves(loaded.model) for shard in leaf.addressable_shards)
    share = held / loaded.weight_bytes
    print(json.dumps({"read": bytes_read() - before, "bytes": loaded.weight_bytes, "held": share}), flush=True)
    return loaded


def _leaves(model):
    import jax
    from flax import nnx

    return jax.tree.leaves(nnx.state(model))


def main(folder: str, address: str, number: str) -> None:
    is_first = join(DistributedOptions(address, 2, int(number)))
    few_shapes()
    apt_jax.serve.runtime.build.load_model = measured_load
    engine = make_engine(folder, 2)
    assert is_first
    engine.warm_up()
    print(json.dumps({"tokens": generate(engine), "recompiles": engine.figures().num_recompiles}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
