"""Fields of OpenAI's and vLLM's requests that are not served, each with the values that change nothing.

A client may send such a value: it is dropped. Another one would change the answer, and is refused by name. The check
of bodies, the OpenAPI document and the table in docs/clients.md go by the tables here. Null is neutral in every field.
"""

import json
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

PYTHON_TYPES: dict[str, type] = {"string": str, "object": dict, "boolean": bool, "array": list}


@dataclass(frozen=True)
class Neutral:
    """The values of a field that change nothing.

    Attributes:
        values: these, and null.
        any_of: JSON's name of a type, all of whose values are neutral.
        instead: what to use instead of the field, for the sentence of a refusal.
    """

    values: tuple[Any, ...] = ()
    _: KW_ONLY
    any_of: str | None = None
    instead: str = ""

    def has(self, value: object) -> bool:
        """Whether `value` changes nothing."""
        if value is None or (self.any_of is not None and isinstance(value, PYTHON_TYPES[self.any_of])):
            return True
        return any(value == known and isinstance(value, bool) is isinstance(known, bool) for known in self.values)

    def schema(self) -> dict[str, Any]:
        """As a JSON schema."""
        return {"enum": [None, *self.values]} if self.any_of is None else {"type": [self.any_of, "null"]}


Fields = Mapping[str, Neutral]

NULL = Neutral()
FALSE, TRUE = Neutral((False,)), Neutral((True,))
NO_TEXT, NO_LIST, NO_OBJECT = Neutral(("",)), Neutral(([],)), Neutral(({},))
ANY_TEXT, ANY_BOOLEAN, ANY_OBJECT = Neutral(any_of="string"), Neutral(any_of="boolean"), Neutral(any_of="object")

EITHER: Fields = {
    # OpenAI's
    "metadata": ANY_OBJECT,
    "moderation": NULL,
    "prompt_cache_key": ANY_TEXT,
    "prompt_cache_options": ANY_OBJECT,
    "prompt_cache_retention": ANY_TEXT,
    "safety_identifier": ANY_TEXT,
    "service_tier": Neutral(("auto", "default")),
    "store": FALSE,
    # vLLM's
    "guided_choice": Neutral(instead="choice in structured_outputs"),
    "guided_decoding_backend": NULL,
    "guided_grammar": Neutral(instead="grammar in structured_outputs"),
    "guided_json": Neutral(instead="json in structured_outputs"),
    "guided_regex": Neutral(instead="regex in structured_outputs"),
    "guided_whitespace_pattern": NULL,
    "kv_transfer_params": NULL,
    "length_penalty": Neutral((1,)),
    "logits_processors": NO_LIST,
    "lora_path": NULL,
    "min_new_tokens": Neutral((0,)),
    "repetition_detection": NULL,
    "spaces_between_special_tokens": TRUE,
    "use_beam_search": Neutral((False,), instead="n samples, of which logprobs say how likely each is"),
    "vllm_xargs": NO_OBJECT,
}
OF_COMPLETIONS: Fields = {
    **EITHER,
    "best_of": Neutral((1,), instead="n"),
    "max_completion_tokens": Neutral(instead="in /v1/completions, it is called max_tokens"),
    "messages": Neutral(instead="it is a field of /v1/chat/completions; a completion has a prompt"),
    "prompt_embeds": NULL,
    "suffix": NO_TEXT,
    "top_logprobs": Neutral(instead="in /v1/completions, logprobs is the number of likely tokens"),
}
OF_TEMPLATES: Fields = {
    "chat_template": Neutral(instead="the server's --chat-template"),
    "chat_template_kwargs": NO_OBJECT,
    "continue_final_message": FALSE,
    "documents": NO_LIST,
    "media_io_kwargs": NO_OBJECT,
    "mm_processor_kwargs": NO_OBJECT,
    "tools": NO_LIST,
}
OF_CHATS: Fields = {
    **EITHER,
    **OF_TEMPLATES,
    "audio": NULL,
    "best_of": Neutral((1,), instead="n"),
    "echo": Neutral((False,), instead="it is a field of /v1/completions"),
    "function_call": Neutral(("none", "auto")),
    "functions": NO_LIST,
    "include_reasoning": ANY_BOOLEAN,
    "modalities": Neutral((["text"],)),
    "parallel_tool_calls": ANY_BOOLEAN,
    "prediction": NULL,
    "prompt": Neutral(instead="it is a field of /v1/completions; a chat has messages"),
    "reasoning_effort": Neutral(("none",)),
    "return_prompt_text": FALSE,
    "suffix": NO_TEXT,
    "thinking_token_budget": NULL,
    "tool_choice": Neutral(("none", "auto")),
    "verbosity": Neutral(("medium",)),
    "web_search_options": NULL,
}
OF_MESSAGES: Fields = {
    # what a client sends back of an answer
    "annotations": NO_LIST,
    "audio": NULL,
    "function_call": NULL,
    "provider_specific_fields": NO_OBJECT,
    "reasoning": NO_TEXT,
    "reasoning_content": NO_TEXT,
    "refusal": NULL,
    "thinking_blocks": NO_LIST,
    "tool_call_id": NULL,
    "tool_calls": NO_LIST,
}
OF_TEXT_PARTS: Fields = {"annotations": NO_LIST, "cache_control": ANY_OBJECT}
OF_STRUCTURED_OUTPUTS: Fields = {
    "disable_additional_properties": FALSE,
    "disable_any_whitespace": FALSE,
    "disable_fallback": FALSE,
    "whitespace_pattern": NULL,
}
OF_RESPONSES: Fields = {
    **{name: field for name, field in EITHER.items() if name not in ("metadata", "store")},
    "background": FALSE,
    "conversation": Neutral(instead="nothing is kept; send earlier messages in input"),
    "max_tool_calls": NULL,
    "parallel_tool_calls": ANY_BOOLEAN,
    "previous_response_id": Neutral(instead="nothing is kept; send earlier messages in input"),
    "prompt": Neutral(instead="input"),
    "reasoning": Neutral(({}, {"effort": "none"})),
    "store": Neutral((False,), instead="nothing is kept"),
    "tool_choice": Neutral(("none", "auto")),
    "tools": NO_LIST,
    "truncation": Neutral(("disabled",), instead="truncate_prompt_tokens"),
}
OF_RESPONSE_TEXT: Fields = {"verbosity": Neutral(("medium",))}
OF_INPUT_MESSAGES: Fields = {"id": ANY_TEXT, "phase": ANY_TEXT, "status": ANY_TEXT}
OF_INPUT_PARTS: Fields = {"annotations": NO_LIST, "logprobs": Neutral(any_of="array")}
OF_STREAM_OPTIONS: Fields = {"include_obfuscation": FALSE}

OF_EMBEDDINGS: Fields = {
    "dimensions": NULL,
    "embed_dtype": Neutral(("float32",)),
    "endianness": Neutral(("native", "little")),
    "safety_identifier": ANY_TEXT,
    "use_activation": TRUE,
}

OF_SCORES: Fields = {
    "activation": NULL,
    "mm_processor_kwargs": NO_OBJECT,
    "softmax": NULL,
    "use_activation": NULL,
}

ALL = (
    *(OF_COMPLETIONS, OF_CHATS, OF_MESSAGES, OF_TEXT_PARTS, OF_STREAM_OPTIONS, OF_STRUCTURED_OUTPUTS),
    *(OF_RESPONSES, OF_RESPONSE_TEXT),
)


def without_neutral(value: Mapping[str, Any], fields: Fields) -> dict[str, Any]:
    """`value` without those of `fields` whose values change nothing. Pure."""
    return {name: given for name, given in value.items() if not (name in fields and fields[name].has(given))}


def refused(name: str, field: Neutral) -> str:
    """The sentence for a value that would change the answer."""
    neutral = f"; {' and '.join(map(json.dumps, field.values))} would change nothing" if field.values else ""
    instead = f" ({field.instead})" if field.instead else ""
    return f"field {name} is not supported; leave it out{neutral}{instead}"
