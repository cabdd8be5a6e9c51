"""Compiling, keeping and loading the C++ kernels.

They are compiled for the host's own instructions (one source for AVX-512, AVX2, NEON), which takes about 15 seconds
once; the library is kept in the user's cache folder, under a key of all that decides it.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache
from pathlib import Path

import jax
import jaxlib
from filelock import FileLock
from tqdm import tqdm

from apt_jax.cpu_kernels.features import cpu_features
from apt_jax.files import kept_folder, temporary_folder
from apt_jax.host_limits import usable_processors
from apt_jax.progress import is_hidden

logger = logging.getLogger(__name__)

TARGETS = (
    "apt_kv_decode", "apt_hidden_decode", "apt_kv_decode_int8", "apt_hidden_decode_int8", "apt_chunk", "apt_matmul",
    "apt_matmul_int8", "apt_all_layers", "apt_all_layers_int8", "apt_hand_over",
)  # fmt: skip
_FOLDER = "apt-jax/cpu_kernels"  # in the user's cache folder
_FLAGS = ("-O3", "-std=c++20", "-fPIC")
_WIDE = "-mprefer-vector-width=512"  # GCC and Clang would use half of AVX-512's registers
_COMPILE_TIMEOUT_S = 300
_BUILD = "build-"  # begin of the names of folders in which it is compiled
_SOURCES = Path(__file__).parent


class Unavailable(Exception):
    """The kernels cannot be had here; the message says why."""


@cache
def register() -> Path:
    """Make the kernels known to XLA as `TARGETS`, compiled if need be; returns the library.

    Raises:
        Unavailable: see `built`; or the library cannot be loaded.
    """
    path = built()
    try:
        library = ctypes.CDLL(str(path))
        library.apt_limit_threads(usable_processors())
        for target in TARGETS:
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu")
    except (OSError, AttributeError) as error:
        raise Unavailable(f"{path} cannot be loaded: {error}") from error
    if use_amx(True, library):
        logger.info("the CPU kernels multiply by AMX: --dtype bfloat16 is several times as fast as float32")
    return path


def use_amx(wanted: bool, library: ctypes.CDLL | None = None) -> bool:
    """Whether products are AMX's from now on: if it is wanted, the processor has it and the system permits it.

    `register` asks for it. Nothing may run meanwhile.
    """
    use = (library or ctypes.CDLL(str(register()))).apt_use_amx
    use.argtypes, use.restype = [ctypes.c_bool], ctypes.c_bool
    return bool(use(wanted))


def built() -> Path:
    """The library in the user's cache folder, compiled if it is not there.

    Its name is of all that decides what it computes but not of the compiler, so that a host without one can use what
    another has built for the same processor; headers are jaxlib's, of its version.

    Raises:
        Unavailable: it is not there, and there is no C++ compiler, or it fails.
    """
    sources = sorted(path for path in _SOURCES.iterdir() if path.suffix in (".h", ".cc"))
    flags = (*_FLAGS, *_flags_for_host())
    digest = hashlib.sha256(repr((flags, jaxlib.__version__, platform.machine(), cpu_features())).encode())
    for path in sources:
        digest.update(path.read_bytes())
    name = f"{digest.hexdigest()[:32]}.so"
    folder = kept_folder(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", _FOLDER), "the CPU kernels")
    if (folder / name).exists():
        return folder / name
    command = [_compiler(), *flags, f"-isystem{jax.ffi.include_dir()}"]
    try:
        with FileLock(folder / "lock"):
            if not (folder / name).exists():
                _remove_abandoned(folder)
                _compile(command, folder / name)
    except OSError as error:
        folder = temporary_folder("the CPU kernels", str(error))
        _compile(command, folder / name)
    return folder / name


def _compile(command: list[str], library: Path) -> None:
    """Compile the sources, two or more at once; on a terminal a bar shows how far it is."""
    logger.info("compiling the CPU kernels with %s, once", command[0])
    sources = sorted(_SOURCES.glob("*.cc"))
    with (
        tempfile.TemporaryDirectory(prefix=_BUILD, dir=library.parent) as folder,
        ThreadPoolExecutor(len(sources)) as threads,
        tqdm(total=len(sources) + 1, desc="compiling the CPU kernels", unit="file", disable=is_hidden()) as bar,
    ):
        objects = [str(Path(folder, source.stem + ".o")) for source in sources]
        jobs = [[*command, "-c", "-o", to, str(source)] for to, source in zip(objects, sources, strict=True)]
        for job in as_completed([threads.submit(_run, job) for job in jobs]):
            job.result()
            bar.update()
        new = Path(folder, "new.so")
        _run([*command, "-shared", "-o", str(new), *objects])
        bar.update()
        os.replace(new, library)


def _remove_abandoned(folder: Path) -> None:
    """Remove what compilations that were killed have left; the caller has the folder's lock."""
    for abandoned in folder.glob(f"{_BUILD}*"):
        shutil.rmtree(abandoned, ignore_errors=True)


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S)
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line] or error.stderr.splitlines() or [""]
        raise Unavailable(f"{command[0]} failed: {lines[0]}") from error
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{command[0]} took longer than {_COMPILE_TIMEOUT_S} s") from error


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    raise Unavailable("no C++ compiler is on PATH (on Debian and Ubuntu: apt install g++)")


def _flags_for_host() -> tuple[str, ...]:
    return ("-march=native", _WIDE) if platform.machine() in ("x86_64", "AMD64") else ("-mcpu=native",)
