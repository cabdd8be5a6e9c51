"""The dashboard in a real browser: figures, stories and plans of what is served, on a phone too, in dark and light."""

import os
import re
import shutil
import threading

import httpx
import pytest

from apt_jax.serve.http.routes.probes import VERSION
from apt_jax.serve.http.service import Service
from apt_jax.serve.options import ServerOptions
from apt_jax.serve.runtime.engine_thread import EngineThread
from tests.support.fake_engine import CharTokenizer, FakeEngine
from tests.support.live_server import live, until

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
KEY = {"authorization": "Bearer letmein"}
SHOTS = os.environ.get("DASHBOARD_SHOTS")  # a folder to keep screenshots in


@pytest.fixture(scope="module")
def engine():
    return FakeEngine(tokenizer=CharTokenizer())


@pytest.fixture(scope="module")
def url(engine):
    options = ServerOptions(api_key=("letmein",))
    with live(Service.of_engine(EngineThread(lambda: engine), "tiny", options)) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="there is no playwright: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("there is no chromium here: apt install chromium, or name one with CHROMIUM=/path")
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def page(browser, url, request):
    look = {"viewport": {"width": 1180, "height": 900}, **getattr(request, "param", {})}
    context = browser.new_context(**look)
    context.add_init_script("sessionStorage.setItem('apt-jax-key', 'letmein')")
    opened = context.new_page()
    errors = []
    opened.on("console", lambda message: message.type == "error" and errors.append(message.text))
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.goto(url)
    yield opened
    context.close()
    # what the server refused is an error on the browser's console
    assert not [error for error in errors if "Failed to load resource" not in error]


def load(url, count=3):
    """Requests through the API."""
    for _ in range(count):
        body = {"prompt": "a", "max_tokens": 20}
        assert httpx.post(f"{url}/v1/completions", json=body, headers=KEY).status_code == 200


def shot(page, name):
    if SHOTS:
        page.screenshot(path=f"{SHOTS}/{name}.png", full_page=True)


def shows(page, name, wanted):
    """Wait until an element contains a text."""
    from playwright.sync_api import expect

    expect(page.locator(f"#{name}")).to_contain_text(wanted, timeout=10_000)


def text(page, name):
    return page.locator(f"#{name}").inner_text()


def test_it_shows_the_figures_of_what_is_served(page, url):
    load(url)
    shows(page, "attainment", "100%")
    assert "by the p99 of gaps 100%" in text(page, "ended") and "limit 1 s" in text(page, "stall-slo")
    assert text(page, "model") == "tiny" and text(page, "status") == "ready" and "policy fcfs" in text(page, "policy")
    assert f"version {VERSION}, up " in text(page, "about")
    assert text(page, "running") == "0" and "0 wait" in text(page, "waiting")
    assert "refused" not in text(page, "ended") and text(page, "ttft").endswith(" ms")
    assert "1 request decodes its next token" in text(page, "plans") and "limit 1 s" in text(page, "ttft-more")
    shot(page, "wide")


def test_lines_classes_and_sums_are_there_for_whoever_opens_the_page_later(page, url):
    load(url)
    body = {"prompt": "a", "max_tokens": 20, "slo": {"ttft_ms": 500, "tbt_ms": 0.001, "stall_ms": 0.001}}
    assert httpx.post(f"{url}/v1/completions", json=body, headers=KEY).status_code == 200
    assert httpx.post(f"{url}/v1/completions", json={"prompt": "a", "n": 0}, headers=KEY).status_code == 400
    # a line has two points of 5 s at least; the server may have started a moment ago
    until(lambda: httpx.get(f"{url}/debug/state", headers=KEY).json()["uptime_s"] > 10)
    page.reload()
    shows(page, "classes", "first token 500 ms, tokens 0.0 ms, no gap over 0.0 ms")
    rows = page.locator("#classes tr").all_inner_texts()
    assert "worst" in rows[0] and "0%" in rows[0] and "100%" in rows[1] and "worst" not in rows[1]
    assert text(page, "worst") == "0%" and "first token 500 ms" in text(page, "worst-class")
    sums = dict(row.split("\t")[::2] for row in page.locator("#sums tr").all_inner_texts())
    assert int(sums["refused"]) >= 1 and sums["refused"] == sums["not valid"] and sums["errors"] == "0"
    assert int(sums["finished"]) >= 4 and {"preemptions", "prompt tokens found cached", "longest gap"} <= set(sums)
    for name in ("attainment", "requests", "ttft", "gaps", "tokens", "cache", "hits", "trouble"):
        chart = page.locator(f"#chart-{name}")
        labels = chart.locator("svg text").all_text_contents()
        assert "now" in labels and len(labels) >= 5, "a scale in both directions"
        assert chart.locator("[role=img]").get_attribute("aria-label").endswith("Arrow keys move through time.")
    assert page.locator("#chart-tokens path").nth(1).get_attribute("d").count("L") > 0, "a line, at the first look"


def test_a_cursor_shows_the_values_of_a_time(page, url):
    load(url)
    shows(page, "chart-tokens", "all")
    page.locator("#chart-tokens [role=img]").focus()
    page.keyboard.press("ArrowLeft")
    tip = page.locator("#chart-tokens .tip")
    assert "all " in tip.inner_text() and "of kept requests" in tip.inner_text()
    page.locator("#chart-tokens [role=img]").blur()
    assert not page.locator("#chart-tokens .tip").is_visible()


def test_a_range_is_chosen(page, url):
    load(url)
    page.get_by_label("1 day").check()
    shows(page, "classes-range", "last day")
    shows(page, "worst-class", "last day")
    assert text(page, "sums-range") == "1 day"


def test_the_story_of_a_request_is_a_page(page, url):
    body = {"prompt": "hgfedcba" * 9, "max_tokens": 9}  # more than an iteration's 64 tokens
    made = httpx.post(f"{url}/v1/completions", json=body, headers=KEY).json()
    page.goto(f"{url}/requests")
    page.locator("#requests a").first.click()
    shows(page, "stories", "arrives with 73 tokens")
    assert made["id"] in text(page, "stories") and "kept" in text(page, "stories")
    told = page.locator(".events li").all_inner_texts()
    words = [line.split("\n")[1] for line in told]
    assert words == [
        *("arrives with 73 tokens", "admitted with KV cache", "continues its prefill", "has its first token"),
        *("decodes its next token", "ends: as long as asked"),
    ]
    assert "64 tokens" in told[1] and "9 tokens" in told[2] and "8 steps" in told[4] and "9 tokens" in told[5]
    assert page.locator(".story svg rect").count() == 3, "two of the prompt and one of decoding"
    shot(page, "story")
    page.goto(f"{url}/requests?id=cmpl-none")
    shows(page, "stories", "No request of this id is known")


def test_requests_are_listed_by_what_became_of_them(page, url):
    late = {"prompt": "a", "max_tokens": 5, "slo": {"tbt_ms": 0.001}, "request_id": "late"}
    httpx.post(f"{url}/v1/completions", json=late, headers=KEY).raise_for_status()
    load(url, 1)
    page.goto(f"{url}/requests")
    shows(page, "requests", "kept")
    page.get_by_label("Missed").check()
    shows(page, "requests", "cmpl-late")
    assert "kept" not in text(page, "requests")
    page.get_by_label("Under way").check()
    shows(page, "no-requests", "No such request")
    page.fill("#search", "cmpl-late")
    page.keyboard.press("Enter")
    shows(page, "stories", "missed")


def test_plans_are_a_page_with_their_reasons(page, url):
    load(url, 1)
    page.goto(f"{url}/plans")
    shows(page, "plans", "1 request decodes its next token")
    row = page.locator("#plans details").first
    row.locator("summary").click()
    assert "decodes its next token" in row.locator(".inside").inner_text() and text(page, "hold") == "Go on"
    page.get_by_label("With interruptions").check()
    shows(page, "plans", "1 request admitted with KV cache")
    assert "decodes" not in page.locator("#plans").inner_text()
    shot(page, "plans")


@pytest.mark.parametrize(
    ("path", "link"), [("", "#requests a"), ("requests", "#requests a"), ("plans", "#plans summary")]
)
def test_the_keyboard_stays_where_it_is_when_a_list_is_drawn_anew(page, url, path, link):
    load(url, 2)
    page.goto(f"{url}/{path}")
    page.locator(link).nth(1).focus()
    held = page.evaluate("document.activeElement.outerHTML.slice(0, 60)")
    node = page.evaluate_handle("document.activeElement")
    load(url, 1)
    page.wait_for_function("node => !node.isConnected", arg=node, timeout=15_000)
    assert page.evaluate("document.activeElement.outerHTML.slice(0, 60)") == held


def test_a_prompt_streams_its_answer_and_reports_its_promise(page):
    page.fill("#prompt", "A")
    page.fill("#max-tokens", "10")
    page.click("#send")
    shows(page, "report", "finished")
    assert text(page, "answer") == "BCDEFGHIJK"
    assert "finished: length" in text(page, "report") and "SLO kept, cache kv" in text(page, "report")
    page.fill("#max-tokens", "5000")
    page.press("#prompt", "Control+Enter")
    shows(page, "report", "the context holds")


def test_a_wrong_key_is_told_from_none(browser, url):
    with browser.new_context() as context:
        opened = context.new_page()
        opened.goto(url)
        shows(opened, "key-message", "This server asks for an API key.")
        shows(opened, "status", "no API key")
        opened.fill("#key", "guess")
        opened.keyboard.press("Enter")
        shows(opened, "key-message", "This API key is not one of this server's.")
        shows(opened, "status", "wrong API key")
        opened.fill("#key", "letmein")
        opened.keyboard.press("Enter")
        shows(opened, "status", "ready")
        assert not opened.locator("#key-form").is_visible()


def test_ids_that_are_none_show_that_or_the_list(page, url):
    load(url, 1)
    page.goto(f"{url}/requests?id=")
    shows(page, "requests", "cmpl")
    for asked in (".", "..", "%3Cimg%20src=x%20onerror=alert(1)%3E"):
        page.goto(f"{url}/requests?id={asked}")
        shows(page, "stories", "No request of this id is known")
        assert page.locator("#stories img").count() == 0


def test_a_key_that_no_header_can_hold_is_wrong_too(browser, url):
    with browser.new_context() as context:
        opened = context.new_page()
        opened.goto(url)
        shows(opened, "key-message", "This server asks for an API key.")
        opened.fill("#key", "ключ")
        opened.keyboard.press("Enter")
        shows(opened, "key-message", "This API key is not one of this server's.")
        opened.fill("#key", "letmein")
        opened.keyboard.press("Enter")
        shows(opened, "status", "ready")


@pytest.mark.parametrize("path", ["", "requests", "plans"])
def test_a_page_goes_on_after_the_page_of_a_proxy(page, url, path):
    """While a server restarts, the proxy before it answers in HTML."""
    page.goto(f"{url}/{path}")
    shows(page, "status", "ready")
    page.route("**/debug/**", lambda route: route.fulfill(status=502, content_type="text/html", body="<h1>Bad gateway"))
    shows(page, "status", "no answer of the server: HTTP 502")
    page.unroute("**/debug/**")
    shows(page, "status", "ready")


def test_pages_have_an_icon_and_take_nothing_from_elsewhere(url):
    for path in ("/", "/requests", "/plans"):
        reply = httpx.get(url + path)
        assert reply.headers["content-type"] == "text/html; charset=utf-8"
        policy = reply.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        named = re.findall(r'(?:href|src)="([^"]+)"', reply.text)
        assert "favicon.svg" in named and not [name for name in named if "//" in name or name.startswith("/")]
        for name in named:
            assert httpx.get(f"{url}/{name}").status_code == 200, name
    assert httpx.get(f"{url}/favicon.ico").headers["content-type"] == "image/svg+xml"
    assert httpx.get(f"{url}/pages/secret.js").status_code in (401, 404)


def test_stop_ends_the_request_in_the_engine(page, engine):
    step, gate = engine.step, threading.Event()
    engine.step = lambda: (gate.wait(0.05), step())[1]
    try:
        page.fill("#prompt", "A")
        page.fill("#max-tokens", "100")
        page.click("#send")
        shows(page, "answer", "BCD")
        page.click("#stop")
        shows(page, "report", "stopped")
        until(lambda: engine.is_idle)
    finally:
        engine.step = step


LOOKS = [
    {"viewport": {"width": width, "height": 740}, "device_scale_factor": 2, "color_scheme": scheme}
    for width, scheme in ((320, "light"), (320, "dark"), (390, "dark"), (768, "light"))
]


@pytest.mark.parametrize("page", LOOKS, indirect=True, ids=["320-light", "320-dark", "390-dark", "768-light"])
def test_every_page_fits_a_phone_and_can_be_read(page, url, request):
    load(url)
    name = {"prompt": "a", "max_tokens": 3, "request_id": "an-id-of-many-letters-that-does-not-fit-beside-others" * 2}
    made = httpx.post(f"{url}/v1/completions", json=name, headers=KEY).json()
    story = f"requests?id={made['id']}"
    for path, shown in (("", "plans"), ("requests", "requests"), (story, "stories"), ("plans", "plans")):
        page.goto(f"{url}/{path}")
        shows(page, "status", "ready")
        shows(page, shown, "cmpl" if "requests" in path else "decodes")
        page.wait_for_timeout(100)
        width = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert width[0] <= width[1], f"{path}: something sticks out"
        assert min(page.evaluate(CONTRAST)) >= 4.5, f"{path}: WCAG AA"
        unnamed = page.evaluate(UNNAMED)
        assert unnamed == [], f"{path}: a screen reader does not know what these are"
        shot(page, f"{request.node.callspec.id}-{path.partition('?')[0] or 'overview'}")


UNNAMED = """() => [...document.querySelectorAll("input, textarea, button, a, svg[role=img], div[role=img], fieldset")]
  .filter(node => !node.getAttribute("aria-label") && !node.textContent.trim() && !(node.labels && node.labels.length))
  .map(node => node.outerHTML)"""

CONTRAST = """() => {
  const light = text => {
    const [r, g, b] = text.match(/[0-9.]+/g).slice(0, 3).map(x => x / 255)
      .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = node => {
    for (; node; node = node.parentElement) {
      const color = getComputedStyle(node).backgroundColor;
      if (!color.endsWith(", 0)") && color !== "transparent") return color;
    }
  };
  const enabled = [...document.querySelectorAll(
    "h1, h2, td, th, dt, dd, time, label, span, a, button:enabled, .figure, .soft, .tag, .bad, .good")];
  return enabled.filter(node => node.textContent.trim()).map(node => {
    const [a, b] = [light(getComputedStyle(node).color), light(behind(node))].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  });
}"""
