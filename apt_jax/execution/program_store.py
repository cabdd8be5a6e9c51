"""Compiled programs on disk, so that a second start neither traces nor compiles.

JAX's own compilation cache saves the compiler's work but still traces and lowers every program, several seconds for
all shapes. Here the whole executable is kept under a key of everything it depends on: versions, device, source
code of this package, and the program's shapes. The files are pickles: the folder is trusted like JAX's own cache.

An executable that JAX took from its own cache is not kept: on a CPU, XLA writes it without its functions, and it
fails when it is run ("Function ... not found"; seen with jax 0.12).
"""

import hashlib
import logging
import os
import pickle
import platform
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path

import flax
import jax
import jaxlib
from jax.experimental import serialize_executable
from jax.stages import Compiled

import apt_jax
from apt_jax import pallas_kernels
from apt_jax.cpu_kernels.features import cpu_features
from apt_jax.files import read_file, replace_file

_SOURCE = (".py", ".h", ".cc")
_OTHER_FOLDERS = ("scheduling", "simulation", "serve", "checkpoints", "pallas_kernels", "bench")  # make no programs

logger = logging.getLogger(__name__)


class ProgramStore:
    """A folder of executables; one that cannot be read is compiled again, so that no start fails for it."""

    def __init__(self, folder: Path | None, device: jax.Device):
        """Keep programs for `device` in `folder`; None keeps nothing."""
        self._folder = folder
        self._device = device

    @classmethod
    def in_compile_cache(cls, device: jax.Device) -> "ProgramStore":
        """A store in the folder of JAX's compilation cache, if that is in use."""
        folder = jax.config.jax_compilation_cache_dir
        return cls(Path(folder) / "programs" if folder else None, device)

    def get(self, description: str, compile_program: Callable[[], Compiled]) -> Compiled:
        """The stored program, else that of `compile_program`, which is stored.

        Args:
            description: identifies the program among all of this package: name, shapes, static arguments.
        """
        if self._folder is None:
            return compile_program()
        key = hashlib.sha256(f"{_environment(self._device)}\n{description}".encode()).hexdigest()
        path = self._folder / key
        program = self._load(path)
        if program is None:
            hits = _jax_cache_hits()
            program = compile_program()
            if _jax_cache_hits() == hits:
                self._save(path, program)
        return program

    @staticmethod
    def _load(path: Path) -> Compiled | None:
        try:
            return serialize_executable.deserialize_and_load(*pickle.loads(read_file(path)))
        except FileNotFoundError:
            return None
        except Exception as error:
            logger.warning("%s cannot be used (%s: %s); compiling again", path, type(error).__name__, error)
            return None

    @staticmethod
    def _save(path: Path, program: Compiled) -> None:
        try:
            replace_file(path, pickle.dumps(serialize_executable.serialize(program)))
        except Exception as error:
            logger.warning("cannot keep a program at %s (%s: %s)", path, type(error).__name__, error)


_hits = threading.local()


def _count_hit(event: str, **_: str | int) -> None:
    """Listener of JAX's monitoring events, called in the thread that compiles."""
    if event == "/jax/compilation_cache/cache_hits":
        _hits.count = _jax_cache_hits() + 1


def _jax_cache_hits() -> int:
    """Programs that this thread has taken from JAX's own cache."""
    return getattr(_hits, "count", 0)


jax.monitoring.register_event_listener(_count_hit)


def _environment(device: jax.Device) -> str:
    """What a program depends on besides its description."""
    versions = (jax.__version__, jaxlib.__version__, flax.__version__, device.client.platform_version)
    flags = (os.environ.get("XLA_FLAGS"), os.environ.get("LIBTPU_INIT_ARGS"), jax.config.jax_enable_x64)
    place = (device.platform, device.device_kind, device.id, len(jax.devices()), platform.machine(), cpu_features())
    return repr((versions, flags, place, source_hash()))


@cache
def source_hash() -> str:
    """Hash of the source code that programs are made of (scheduling is not): any change invalidates all of them."""
    digest = hashlib.sha256()
    for package in (apt_jax.__path__[0], pallas_kernels.__path__[0]):
        root = Path(package)
        for path in sorted(root.rglob("*.*")):
            if path.suffix in _SOURCE and path.relative_to(root).parts[0] not in _OTHER_FOLDERS:
                digest.update(path.read_bytes())
    return digest.hexdigest()
