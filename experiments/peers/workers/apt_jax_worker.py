"""apt-jax itself: the engine, without HTTP."""

from typing import Any

from protocol import Generate, serve


def open_peer(folder: str, dtype: str, options: dict[str, Any]) -> Generate:
    """See `protocol`."""
    from apt_jax.engine_config import EngineConfig
    from apt_jax.serve.bench.offline.measure import checked, open_engine, samples_of
    from apt_jax.serve.bench.work import Work
    from apt_jax.serve.options import LoadOptions
    from apt_jax.serve.runtime.driver import Driver

    numbers = {"dtype": "bfloat16", "quantization": "int8-dynamic"} if dtype == "int8" else {"dtype": dtype}
    alike = {"max_num_seqs": 32, "enable_prefix_caching": False}  # as with other peers: rounds repeat their prompts
    config = EngineConfig(**{**numbers, **alike, **options["engine"]})
    engine = open_engine(folder, LoadOptions(load_format="dummy" if options["dummy"] else "auto"), config)
    engine.warm_up()

    def generate(prompts: list[list[int]], new_tokens: int) -> list[Any]:
        works = [Work(prompt, len(prompt), new_tokens) for prompt in prompts]
        samples = samples_of(works, temperature=0.0, prefix="")
        found: dict[str, list[int]] = {sample.request_id: [] for sample in samples}
        for sample, output in Driver(engine).run(samples):
            found[sample.request_id].extend(checked(output).token_ids)
        return list(found.values())

    return generate


if __name__ == "__main__":
    serve(open_peer)
