"""litellm: completions, streams, and a fallback to a model with a larger context."""

import sys

import litellm

litellm.suppress_debug_info = True
large, small = sys.argv[1:3]
TEXT = [{"role": "user", "content": "a word " * 120}]


def at(url: str) -> dict[str, str]:
    return {"model": "openai/apt-jax-demo", "api_base": f"{url}/v1", "api_key": "none"}


answer = litellm.completion(**at(large), messages=TEXT, max_tokens=8)
assert answer.usage.completion_tokens == 8
chunks = litellm.completion(**at(large), messages=TEXT, max_tokens=8, temperature=0, stream=True)
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
try:
    litellm.completion(**at(small), messages=TEXT, max_tokens=8)
except litellm.ContextWindowExceededError:
    pass
else:
    raise AssertionError("a prompt of 240 tokens was taken by a context of 128")
router = litellm.Router(
    model_list=[{"model_name": name, "litellm_params": at(url)} for name, url in (("small", small), ("large", large))],
    context_window_fallbacks=[{"small": ["large"]}],
    num_retries=0,
)
answer = router.completion(model="small", messages=TEXT, max_tokens=8)
assert answer.usage.prompt_tokens > 128 and answer.usage.completion_tokens == 8
vectors = litellm.embedding(**at(large), input=["a file"], encoding_format="float")
assert len(vectors.data) == 1
print("completion, stream, embedding, ContextWindowExceededError, Router with context_window_fallbacks")
