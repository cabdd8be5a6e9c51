"""The SLO of a request: in its body, in its headers, or the server's."""

from collections.abc import Mapping

from pydantic import Field

from apt_jax.request import Slo
from apt_jax.serve.errors import BadRequest
from apt_jax.serve.json_text import shown
from apt_jax.serve.openai.bodies.strict import Strict

MIN_SLO_MS, MAX_SLO_MS = 0.001, 1e9
# Parts of an SLO, and the headers that carry each: vLLM's users know the second as TPOT.
SLO_HEADERS = {
    "ttft": ("x-slo-ttft-ms",),
    "tbt": ("x-slo-tbt-ms", "x-slo-tpot-ms"),
    "stall": ("x-slo-stall-ms",),
}


class SloBody(Strict):
    """Latency SLO of one request, in milliseconds; a missing part takes the server's default."""

    ttft_ms: float | None = Field(default=None, ge=MIN_SLO_MS, le=MAX_SLO_MS)
    tbt_ms: float | None = Field(default=None, ge=MIN_SLO_MS, le=MAX_SLO_MS)
    stall_ms: float | None = Field(default=None, ge=MIN_SLO_MS, le=MAX_SLO_MS)


def slo_of(body: SloBody | None, headers: Mapping[str, str], default: Slo) -> Slo:
    """The SLO of a request, part by part: its body's `slo`, else the `SLO_HEADERS`, else `default`.

    A header that came several times is one with its values separated by commas, as proxies may write it too.

    Raises:
        BadRequest: a header is not a number of milliseconds from MIN_SLO_MS to MAX_SLO_MS, even if it is not needed,
            or its values, or those of two spellings, differ.
    """
    chosen: dict[str, float] = {}
    for part, names in SLO_HEADERS.items():
        given = {name: _milliseconds(name, headers[name]) for name in names if name in headers}
        if len({*given.values()}) > 1:
            both = " and ".join(f"{name}={value:g}" for name, value in given.items())
            raise BadRequest(f"headers {both} mean the same and differ; send one of them", names[0])
        in_body = None if body is None else getattr(body, f"{part}_ms")
        given_ms = next(iter(given.values()), None) if in_body is None else in_body
        if given_ms is not None:
            chosen[f"{part}_s"] = given_ms / 1000
    return default.with_parts(**chosen)


def _milliseconds(name: str, text: str) -> float:
    values = []
    for part in text.split(","):
        try:
            values.append(float(part))
        except ValueError:
            values.append(float("nan"))
    if not all(MIN_SLO_MS <= value <= MAX_SLO_MS for value in values):
        raise BadRequest(
            f"header {name}: {shown(text)} must be a number of milliseconds greater than 0, up to 1e9", name
        )
    if len({*values}) > 1:
        raise BadRequest(f"header {name} came several times, with {shown(text)}; send it once", name)
    return values[0]
