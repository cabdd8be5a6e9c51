"""Where XLA keeps compiled programs between starts."""

import os
from pathlib import Path

DEFAULT_FOLDER = Path("~/.cache/apt-jax/xla")


def use_compile_cache(folder: str | None) -> Path:
    """Make jax keep every compiled program in `folder` and reuse it; call it before anything compiles.

    None takes the environment's JAX_COMPILATION_CACHE_DIR, else ~/.cache/apt-jax/xla. Returns the folder used.

    Raises:
        ValueError: the folder cannot be made.
    """
    import jax

    chosen = Path(folder or os.environ.get("JAX_COMPILATION_CACHE_DIR") or DEFAULT_FOLDER).expanduser()
    try:
        chosen.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"cannot use {chosen} for compiled programs ({error.strerror}); choose another --compilation-cache-dir"
        ) from error
    jax.config.update("jax_compilation_cache_dir", str(chosen))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return chosen
