"""The pages for people: links lead somewhere, named files and make targets exist, and guides stay short."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (*ROOT.glob("*.md"), *(ROOT / ".github").rglob("*.md"), *(ROOT / "docs").rglob("*.md"))
)
NOTES = [page for page in PAGES if page.startswith("docs/log/")]  # dated: they name the files of their day
GUIDES = [page for page in PAGES if page not in NOTES]
MAX_WORDS = 1300
LONGER = {"docs/studies/README.md": 1500, "CHANGELOG.md": 2500}  # the summary of 15 studies, one paragraph each
FOLDERS = {"apt_jax", "checkpoints", "pallas_kernels", "serve", "tests", "experiments", "docs", "deploy", ".github"}
UNWRITTEN = {"apt_jax_manifest.json"}  # written by a command


def prose(page: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", (ROOT / page).read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: str) -> set[str]:
    """What GitHub makes of a page's headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+)$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        count = sum(slug == other or re.fullmatch(rf"{re.escape(slug)}-\d+", other) is not None for other in found)
        found.add(f"{slug}-{count}" if count else slug)
    return found


def test_every_page_is_found():
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/README.md", "docs/api.md"} <= set(GUIDES)
    assert NOTES and ".github/pull_request_template.md" in GUIDES
    assert {"folders", "life-of-a-request", "glossary"} <= anchors("docs/architecture.md")


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_and_a_heading(page):
    for link in re.findall(r"!?\[[^\]]*\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), f"{page} links to {link}"
        if anchor:
            assert anchor in anchors(str(target.resolve().relative_to(ROOT))), f"{page} links to {link}"


@pytest.mark.parametrize("page", GUIDES)
def test_every_path_that_is_named_exists(page):
    for named in re.findall(r"`([\w.*/-]+/[\w.*-]*)`", prose(page)):
        if named.split("/")[0] in FOLDERS and Path(named).name not in UNWRITTEN:
            assert list(ROOT.glob(named.rstrip("/"))), f"{page} names {named}"


@pytest.mark.parametrize("page", GUIDES)
def test_every_module_that_is_run_exists(page):
    for module in re.findall(r"python3? -m ((?:apt_jax|experiments|tests)[\w.]*)", (ROOT / page).read_text("utf-8")):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), f"{page} runs {module}"


@pytest.mark.parametrize("page", GUIDES)
def test_every_make_target_exists(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for named in re.findall(r"(?:^|`|&& )make ([a-z-]+)", (ROOT / page).read_text("utf-8"), re.MULTILINE):
        assert named in targets, f"{page} names make {named}"


@pytest.mark.parametrize("page", [page for page in GUIDES if page.startswith("docs/")])
def test_every_page_can_be_reached_from_the_index(page):
    reached, new = set(), {"docs/README.md"}
    while new:
        reached |= new
        links = {
            ((ROOT / source).parent / link.partition("#")[0]).resolve()
            for source in new
            for link in re.findall(r"\]\(([^)\s:]+)\)", prose(source))
            if link.partition("#")[0].endswith(".md")
        }
        new = {str(link.relative_to(ROOT)) for link in links} - reached
    assert page in reached


@pytest.mark.parametrize("page", GUIDES)
def test_no_guide_is_longer_than_it_may_be(page):
    shown = re.sub(r"^<!-- .* -->$", "", (ROOT / page).read_text("utf-8"), flags=re.MULTILINE)
    words = [word for word in shown.split() if any(c.isalnum() for c in word)]
    assert len(words) <= LONGER.get(page, MAX_WORDS)


def source_of(target: str) -> str:
    """Code of the module that a make target runs, and of the package it is in; empty for pytest."""
    recipe = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert recipe is not None, target
    module = re.search(r"python -m ((?:experiments|tests)[\w.]*)", recipe[1])
    if module is None:
        script = re.search(r"python (\S+\.py)", recipe[1])
        return "" if script is None else (ROOT / script[1]).read_text("utf-8")
    path = ROOT / module[1].replace(".", "/")
    files = path.glob("*.py") if path.is_dir() else [path.with_suffix(".py")]
    return "\n".join(file.read_text("utf-8") for file in files)


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_given_to_a_make_target_is_one_of_its_program(page):
    for target, arguments in re.findall(r'make ([a-z-]+) ARGS="([^"]*)"', (ROOT / page).read_text("utf-8")):
        if target in ("serve", "test"):  # flags of `apt-jax serve` and pytest
            continue
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", arguments):
            field = flag.removeprefix("--").replace("-", "_")
            assert re.search(rf'"{flag}"|^    {field}:', source_of(target), re.MULTILINE), f"{page}: {target} {flag}"


def test_the_troubleshooting_page_quotes_messages_of_the_code():
    """Capitals, `...` and `X` stand for what a message fills in; the words between them must be in the code."""
    code = "".join(
        path.read_text("utf-8") for top in ("apt_jax", "serve", "checkpoints") for path in (ROOT / top).rglob("*.py")
    )
    code = re.sub(r'"\n\s*f?"', "", code)  # a message that is written on several lines
    quoted = [
        fragment.strip(" ,;:'.\"")
        for message in re.findall(r"^\|[^|]*?`([^`|]* [^`|]*)`[^|]*\|", prose("docs/troubleshooting.md"), re.MULTILINE)
        for fragment in re.split(r"\b[A-Z]\b|\b[A-Z]{3,}\b|\.\.\.|[\"'()?:;=]", message)
    ]
    fragments = [fragment for fragment in quoted if len(fragment.split()) > 2]
    assert len(fragments) > 20
    assert [fragment for fragment in fragments if fragment not in code] == []
