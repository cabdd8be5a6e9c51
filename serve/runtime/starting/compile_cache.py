"""Where XLA keeps compiled programs between starts."""

import os
from pathlib import Path

from apt_jax.files import kept_folder

DEFAULT_FOLDER = Path("~/.cache/apt-jax/xla")


def use_compile_cache(folder: str | None) -> Path:
    """Make jax keep every compiled program in `folder` and reuse it; call it before anything compiles.

    None takes the environment's JAX_COMPILATION_CACHE_DIR, else ~/.cache/apt-jax/xla, or a temporary folder if that
    cannot be used. Returns the folder used.

    Raises:
        ValueError: a folder that was named cannot be made.
    """
    import jax

    named = folder or os.environ.get("JAX_COMPILATION_CACHE_DIR")
    try:
        if named:
            chosen = Path(named).expanduser()
            chosen.mkdir(parents=True, exist_ok=True)
        else:
            chosen = kept_folder(DEFAULT_FOLDER, "compiled programs")
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(
            f"cannot use {named} for compiled programs ({reason}); choose another --compilation-cache-dir"
        ) from error
    jax.config.update("jax_compilation_cache_dir", str(chosen))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return chosen
