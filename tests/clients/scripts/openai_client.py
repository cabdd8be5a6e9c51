"""The openai client, of whatever version is installed: completions, chats, streams, schemas, embeddings and more."""

import json
import sys

import openai

SCHEMA = {
    "type": "object", "additionalProperties": False, "required": ["name", "count"],
    "properties": {"name": {"type": "string", "maxLength": 12}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
}  # fmt: skip

client = openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none")
(model,) = [found.id for found in client.models.list()]
whole = client.completions.create(model=model, prompt="def add(", max_tokens=12, temperature=0, logprobs=2, echo=True)
assert whole.choices[0].text.startswith("def add(") and whole.usage.completion_tokens == 12
assert len(whole.choices[0].logprobs.tokens) == whole.usage.total_tokens
options = {"include_usage": True}
chunks = [
    *client.completions.create(
        model=model, prompt="def add(", max_tokens=12, temperature=0, stream=True, stream_options=options
    )
]
streamed = "".join(choice.text for chunk in chunks for choice in chunk.choices)
assert "def add(" + streamed == whole.choices[0].text and chunks[-1].usage.completion_tokens == 12
messages = [{"role": "system", "content": "You document code."}, {"role": "user", "content": "Open a file."}]
chat = client.chat.completions.create(
    model=model, messages=messages, max_tokens=12, n=2, seed=1, logprobs=True, top_logprobs=2
)
assert len(chat.choices) == 2 and chat.choices[0].message.role == "assistant"
assert len(chat.choices[0].logprobs.content[0].top_logprobs) == 2
deltas = client.chat.completions.create(model=model, messages=messages, max_tokens=12, stream=True)
assert "".join(chunk.choices[0].delta.content or "" for chunk in deltas if chunk.choices)
shape = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
made = json.loads(
    client.chat.completions.create(model=model, messages=messages, max_tokens=80, response_format=shape)
    .choices[0]
    .message.content
)
assert made.keys() == {"name", "count"} and 0 <= made["count"] <= 99
extra = {"structured_outputs": {"choice": ["yes", "no"]}}
picked = client.completions.create(model=model, prompt="Is it?", max_tokens=5, extra_body=extra)
assert picked.choices[0].text in ("yes", "no")
vectors = client.embeddings.create(model=model, input=["a file", "a socket"]).data
assert len(vectors) == 2 and abs(sum(x * x for x in vectors[0].embedding) - 1) < 1e-3
if hasattr(client, "responses"):
    answer = client.responses.create(model=model, input="Open a file.", max_output_tokens=12, temperature=0)
    assert answer.status in ("completed", "incomplete") and answer.usage.output_tokens <= 12
    events = list(
        client.responses.create(model=model, input="Open a file.", max_output_tokens=12, temperature=0, stream=True)
    )
    told = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert told == answer.output_text == events[-1].response.output_text
    text = {"format": {"type": "json_schema", "name": "thing", "schema": SCHEMA, "strict": True}}
    shaped = client.responses.create(model=model, input="A thing.", max_output_tokens=80, text=text)
    assert json.loads(shaped.output_text).keys() == {"name", "count"}
found = client.post("/score", body={"text_1": "def add(", "text_2": ["a, b):", "banana"]}, cast_to=object)
assert len(found["data"]) == 2 and all(entry["score"] < 0 for entry in found["data"])
for fields, kind, code in (
    ({"prompt": "x" * 9000}, openai.BadRequestError, "context_length_exceeded"),
    ({"prompt": "x", "model": "other"}, openai.NotFoundError, "model_not_found"),
    ({"prompt": "x", "temperature": -1}, openai.BadRequestError, None),
):
    try:
        client.completions.create(**{"model": model, "max_tokens": 5, **fields})
    except kind as error:
        assert error.code == code, error
    else:
        raise AssertionError(f"{fields} was taken")
print("completions, chats, streams, log-probabilities, a JSON schema, embeddings, responses, scores, errors")
