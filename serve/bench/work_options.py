"""Which requests a benchmark makes: flags that `bench serve` and `bench throughput` share."""

from dataclasses import dataclass

from apt_jax.ranges import check_at_least, check_at_most

MOST_REQUESTS = 10**7  # of one run
MOST_TOKENS = 10**9


@dataclass(frozen=True)
class WorkOptions:
    """Lengths and texts of the requests."""

    dataset: str = "random"
    """random; lengths of sharegpt, humaneval, longbench or azure; a CSV file with prompt_tokens, output_tokens and,
    optionally, arrival_s; a ShareGPT JSON file (needs --tokenizer); or, for serve, conversations, whose turns send
    the earlier ones and their answers, with options as conversations:turns=4:system_tokens=500:think_s=5."""
    num_prompts: int = 200
    """Number of requests in a run."""
    random_input_len: int = 128
    """Prompt tokens, for --dataset random."""
    random_output_len: int = 128
    """Output tokens, for --dataset random."""
    random_range_ratio: float = 0.0
    """Lengths are uniform between LEN x (1 - ratio) and LEN x (1 + ratio), for --dataset random."""
    vocab_size: int = 256
    """Without --tokenizer, prompts are token ids from 10 up to this, which must not exceed the model's vocabulary."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, ("num_prompts", "random_input_len", "random_output_len"))
        check_at_most(self, MOST_REQUESTS, ("num_prompts",))
        check_at_most(self, MOST_TOKENS, ("random_input_len", "random_output_len", "vocab_size"))
        if not 0 <= self.random_range_ratio < 1:
            raise ValueError(f"random_range_ratio={self.random_range_ratio} must be at least 0 and less than 1")
        if self.vocab_size < 11:
            raise ValueError(f"vocab_size={self.vocab_size} must be at least 11")
