"""The model that is served, and its tokenizer: /v1/models, /tokenize, /detokenize."""

from array import array
from collections.abc import Iterator
from functools import cache

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from apt_jax.serve.errors import BadRequest
from apt_jax.serve.http.service import Service
from apt_jax.serve.json_text import Joined, json_pieces, parse_json
from apt_jax.serve.openai.bodies.strict import parse_body
from apt_jax.serve.openai.bodies.token_requests import DetokenizeRequest, TokenizeRequest, parse_tokenize
from apt_jax.serve.openai.prompts import check_model
from apt_jax.serve.openai.templates.chat_template import render
from apt_jax.tokenization.tokenizer import Tokenizer

LONG_TOKENS = 4096  # more are answered in pieces


async def models(service: Service, http: Request) -> Response:
    """GET /v1/models."""
    return JSONResponse({"object": "list", "data": [_model(service, name) for name in service.names]})


async def model(service: Service, http: Request) -> Response:
    """GET /v1/models/NAME."""
    name = http.path_params["name"]
    check_model(name, service.names)
    return JSONResponse(_model(service, name))


async def tokenize(service: Service, http: Request) -> Response:
    """POST /tokenize: token ids of a text or a chat."""
    data = await service.read_body(http)
    body = await service.off_loop(lambda: parse_tokenize(parse_json(data)))
    check_model(body.model, service.names)
    tokenizer = _tokenizer(service, "prompt")
    token_ids = await service.off_loop(_encode, service, body, tokenizer)
    answer = {
        "count": len(token_ids),
        "max_model_len": service.backend.ready_engine().max_model_len,
        "tokens": Joined(_slices(token_ids)),
        "token_strs": Joined(_strings(token_ids, tokenizer)) if body.return_token_strs else None,
    }
    return await _written(service, answer, len(token_ids))


async def detokenize(service: Service, http: Request) -> Response:
    """POST /detokenize: text of token ids, special ones too."""
    data = await service.read_body(http)
    body = await service.off_loop(lambda: parse_body(parse_json(data), DetokenizeRequest))
    check_model(body.model, service.names)
    text = _tokenizer(service, "tokens").decode_pieces(body.tokens)
    return await _written(service, {"prompt": Joined(text, is_text=True)}, len(body.tokens))


async def _written(service: Service, answer: dict[str, object], num_tokens: int) -> Response:
    """The answer as one piece of JSON, or in pieces where it is long."""
    pieces = json_pieces(answer)
    if num_tokens > LONG_TOKENS:
        return StreamingResponse(service.pieces(pieces), media_type="application/json")
    return Response(b"".join(await service.off_loop(list, pieces)), media_type="application/json")


def _encode(service: Service, body: TokenizeRequest, tokenizer: Tokenizer) -> array[int]:
    """Token ids, four bytes each."""
    if body.messages is None:
        assert body.prompt is not None
        text, param, special = body.prompt, "prompt", body.add_special_tokens is not False
    else:
        generate = body.add_generation_prompt is not False
        text = render(body.messages, tokenizer, service.chat_template, generate=generate)
        param, special = "messages", body.add_special_tokens is True
    found = array("I")
    try:
        for ids in tokenizer.encode_pieces(text, add_special_tokens=special):
            found.extend(ids)
    except ValueError as error:
        raise BadRequest(str(error), param) from error
    return found


def _slices(token_ids: array[int]) -> Iterator[list[int]]:
    return (token_ids[at : at + LONG_TOKENS].tolist() for at in range(0, len(token_ids), LONG_TOKENS))


def _strings(token_ids: array[int], tokenizer: Tokenizer) -> Iterator[list[str]]:
    text_of = cache(tokenizer.token_text)
    return ([text_of(i) for i in ids] for ids in _slices(token_ids))


def _tokenizer(service: Service, param: str) -> Tokenizer:
    tokenizer = service.backend.ready_engine().tokenizer
    if tokenizer is None:
        raise BadRequest("this model has no tokenizer; give its folder with --tokenizer", param)
    return tokenizer


def _model(service: Service, name: str) -> dict[str, object]:
    engine = service.backend.engine
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "apt-jax",
        "max_model_len": None if engine is None else engine.max_model_len,
        "quantization": None if engine is None else engine.config.quantization or "none",
    }
