"""The dashboard in a real browser: it shows what is served, streams a prompt, and fits on a phone in dark and light."""

import os
import shutil
import threading

import httpx
import pytest

from apt_jax.serve.http.service import Service
from apt_jax.serve.options import ServerOptions
from apt_jax.serve.runtime.engine_thread import EngineThread
from tests.support.fake_engine import CharTokenizer, FakeEngine
from tests.support.live_server import live, until

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
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
    headers = {"authorization": "Bearer letmein"}
    for _ in range(count):
        body = {"prompt": "a", "max_tokens": 20}
        assert httpx.post(f"{url}/v1/completions", json=body, headers=headers).status_code == 200


def shows(page, name, wanted):
    """Wait until an element contains a text."""
    from playwright.sync_api import expect

    expect(page.locator(f"#{name}")).to_contain_text(wanted, timeout=10_000)


def text(page, name):
    return page.locator(f"#{name}").inner_text()


def test_it_shows_the_figures_of_what_is_served(page, url):
    load(url)
    shows(page, "attainment", "100%")
    assert "by the P99 of gaps 100%" in text(page, "ended") and text(page, "stall-slo") == "1000 ms"
    assert text(page, "model") == "tiny" and text(page, "status") == "ready" and "policy fcfs" in text(page, "policy")
    assert text(page, "waiting") == "0" and text(page, "free") == "64 (100%)"
    assert float(text(page, "kept-tokens")) > 0 and "refused" not in text(page, "ended")
    for name in ("ttft-p50", "ttft-p99", "tbt-p90", "longest-gap"):
        assert text(page, name).endswith(" ms")
    assert "decodes its next token" in text(page, "plans") and "1000 ms" in text(page, "ttft-slo")
    if SHOTS:
        page.screenshot(path=f"{SHOTS}/wide.png", full_page=True)


def test_a_prompt_streams_its_answer_and_reports_its_promise(page):
    page.fill("#prompt", "A")
    page.fill("#max-tokens", "10")
    page.click("#send")
    shows(page, "report", "finished")
    assert text(page, "answer") == "BCDEFGHIJK"
    assert "finished: length" in text(page, "report") and "SLO attained, cache kv" in text(page, "report")
    page.fill("#max-tokens", "5000")
    page.press("#prompt", "Control+Enter")
    shows(page, "report", "the context holds")


def test_a_wrong_key_is_asked_for(browser, url):
    with browser.new_context() as context:
        opened = context.new_page()
        opened.goto(url)
        opened.wait_for_selector("#key")
        opened.fill("#key", "letmein")
        opened.keyboard.press("Tab")
        shows(opened, "status", "ready")


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


PHONE = {"viewport": {"width": 375, "height": 740}, "device_scale_factor": 2}


LOOKS = [{**PHONE, "color_scheme": "light"}, {**PHONE, "color_scheme": "dark"}]


@pytest.mark.parametrize("page", LOOKS, indirect=True, ids=["light", "dark"])
def test_it_fits_a_phone_and_can_be_read(page, url, request):
    load(url)
    shows(page, "status", "ready")
    shows(page, "plans", "decodes")
    width = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert width[0] <= width[1], "nothing sticks out"
    contrast = page.evaluate(CONTRAST)
    assert min(contrast) >= 4.5, "WCAG AA"
    if SHOTS:
        page.screenshot(path=f"{SHOTS}/phone-{request.node.callspec.id}.png", full_page=True)


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
  const enabled = [...document.querySelectorAll("h1, h2, td, th, label, span, button:enabled, .figure, .soft")];
  return enabled.filter(node => node.textContent.trim()).map(node => {
    const [a, b] = [light(getComputedStyle(node).color), light(behind(node))].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  });
}"""
