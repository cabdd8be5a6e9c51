"""The model that is served, and its tokenizer: /v1/models, /tokenize, /detokenize."""

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from apt_jax.serve.errors import BadRequest, ModelNotFound
from apt_jax.serve.http.service import Service
from apt_jax.serve.openai.chat_template import render
from apt_jax.serve.openai.generation import check_model
from apt_jax.serve.openai.json_text import parse_json
from apt_jax.serve.openai.requests import parse_body
from apt_jax.serve.openai.token_requests import DetokenizeRequest, TokenizeRequest, parse_tokenize
from apt_jax.tokenization.tokenizer import Tokenizer


async def models(service: Service, http: Request) -> Response:
    """GET /v1/models."""
    return JSONResponse({"object": "list", "data": [_model(service)]})


async def model(service: Service, http: Request) -> Response:
    """GET /v1/models/NAME."""
    name, served = http.path_params["name"], service.model_name
    if name != served:
        raise ModelNotFound(f"the model {name!r} is not served here; use {served!r}", "model")
    return JSONResponse(_model(service))


async def tokenize(service: Service, http: Request) -> Response:
    """POST /tokenize: token ids of a text or a chat."""
    body = parse_tokenize(parse_json(await service.read_body(http)))
    check_model(body.model, service.model_name)
    tokenizer = _tokenizer(service, "prompt")
    token_ids = await run_in_threadpool(_encode, service, body, tokenizer)
    strings = [tokenizer.token_text(i) for i in token_ids] if body.return_token_strs else None
    max_model_len = service.backend.ready_engine().max_model_len
    return JSONResponse(
        {"count": len(token_ids), "max_model_len": max_model_len, "tokens": token_ids, "token_strs": strings}
    )


async def detokenize(service: Service, http: Request) -> Response:
    """POST /detokenize: text of token ids, special ones too."""
    body = parse_body(parse_json(await service.read_body(http)), DetokenizeRequest)
    check_model(body.model, service.model_name)
    tokenizer = _tokenizer(service, "tokens")
    text = await run_in_threadpool(tokenizer.decode, body.tokens, skip_special_tokens=False)
    return JSONResponse({"prompt": text})


def _encode(service: Service, body: TokenizeRequest, tokenizer: Tokenizer) -> list[int]:
    if body.messages is None:
        assert body.prompt is not None
        return tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
    generate = body.add_generation_prompt is not False
    text = render(body.messages, tokenizer, service.chat_template, generate=generate)
    return tokenizer.encode(text, add_special_tokens=body.add_special_tokens is True)


def _tokenizer(service: Service, param: str) -> Tokenizer:
    tokenizer = service.backend.ready_engine().tokenizer
    if tokenizer is None:
        raise BadRequest("this model has no tokenizer; give its folder with --tokenizer", param)
    return tokenizer


def _model(service: Service) -> dict[str, object]:
    engine = service.backend.engine
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "apt-jax",
        "max_model_len": None if engine is None else engine.max_model_len,
    }
