"""llama-index: OpenAILike, whole and streamed, and embeddings."""

import sys

from llama_index.core.llms import ChatMessage
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike

at = {"api_base": f"{sys.argv[1]}/v1", "api_key": "none"}
model = OpenAILike(model="apt-jax-demo", max_tokens=8, temperature=0, context_window=1024, is_chat_model=False, **at)
assert model.complete("def add(").text
assert "".join(part.delta for part in model.stream_complete("def add(")) == model.complete("def add(").text
chat = OpenAILike(model="apt-jax-demo", max_tokens=8, temperature=0, context_window=1024, is_chat_model=True, **at)
messages = [ChatMessage(role="user", content="Open a file.")]
assert chat.chat(messages).message.content
assert "".join(part.delta or "" for part in chat.stream_chat(messages)) == chat.chat(messages).message.content
vectors = OpenAILikeEmbedding(model_name="apt-jax-demo", embed_batch_size=2, **at).get_text_embedding_batch(
    ["a", "b", "c"]
)
assert len(vectors) == 3
print("OpenAILike (complete, chat, streams), OpenAILikeEmbedding")
