"""openvino-genai's continuous batching; the model is converted once by optimum."""

import os
import subprocess
import sys
from typing import Any

from protocol import Generate, serve


def open_peer(folder: str, dtype: str, options: dict[str, Any]) -> Generate:
    """See `protocol`."""
    import numpy
    import openvino
    import openvino_genai

    weights = "int8" if dtype == "int8" else "fp32"
    target = folder + "-openvino" + ("-int8" if dtype == "int8" else "")
    if not os.path.isfile(os.path.join(target, "openvino_model.xml")):
        exporter = os.path.join(os.path.dirname(sys.executable), "optimum-cli")
        flags = ["--model", folder, "--task", "text-generation-with-past", "--weight-format", weights, target]
        subprocess.run([exporter, "export", "openvino", *flags], check=True, stdout=sys.stderr)
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = 2  # GB
    scheduler.max_num_seqs = 32
    scheduler.enable_prefix_caching = False
    hint = {"float32": "f32", "bfloat16": "bf16"}.get(dtype)  # with int8 weights it chooses itself
    properties = {} if hint is None else {"INFERENCE_PRECISION_HINT": hint, "KV_CACHE_PRECISION": hint}
    pipeline = openvino_genai.ContinuousBatchingPipeline(target, scheduler, "CPU", properties)

    def generate(prompts: list[list[int]], new_tokens: int) -> list[Any]:
        config = openvino_genai.GenerationConfig(max_new_tokens=new_tokens, min_new_tokens=new_tokens)
        config.ignore_eos, config.do_sample = True, False
        tensors = [openvino.Tensor(numpy.array([prompt], numpy.int64)) for prompt in prompts]
        results = pipeline.generate(tensors, [config] * len(prompts))
        return [result.m_generation_ids[0] for result in results]

    return generate


if __name__ == "__main__":
    serve(open_peer)
