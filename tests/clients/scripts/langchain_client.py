"""langchain-openai: models, streams, structured output, embeddings."""

import sys

from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field

MODEL = "apt-jax-demo"
at = {"base_url": f"{sys.argv[1]}/v1", "api_key": "none", "model": MODEL}


class Thing(BaseModel):
    """Something counted."""

    name: str = Field(max_length=12)
    count: int = Field(ge=0, le=99)


assert OpenAI(**at, max_tokens=8, temperature=0).invoke("def add(")
chat = ChatOpenAI(**at, max_tokens=8, temperature=0)
answer = chat.invoke([("system", "You document code."), ("human", "Open a file.")])
assert answer.content and answer.usage_metadata["output_tokens"] == 8
assert "".join(chunk.content for chunk in chat.stream("Open a file.")) == chat.invoke("Open a file.").content
found = (
    ChatOpenAI(**at, max_tokens=80, seed=1).with_structured_output(Thing, method="json_schema").invoke("Count files.")
)
assert isinstance(found, Thing)
embeddings = OpenAIEmbeddings(**at, check_embedding_ctx_length=False)
assert len(embeddings.embed_documents(["a file", "a socket"])) == 2
print("OpenAI, ChatOpenAI (whole, streamed), with_structured_output, OpenAIEmbeddings")
