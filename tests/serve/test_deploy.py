"""What the deploy files and the docs tell an operator to type exists."""

import configparser
import contextlib
import functools
import io
import re
from pathlib import Path

import pytest

from apt_jax.serve.cli import OTHER_SPELLINGS, main
from apt_jax.serve.observability.metrics import Metrics
from apt_jax.serve.replicas.fleet_view import FleetMetrics

ROOT = Path(__file__).parents[2]
OTHER_TOOLS = {  # flags of docker, apt-get, useradd, gcloud and uv
    "Dockerfile": {
        "--target",
        "--rm",
        "--stop-timeout",
        "--no-install-recommends",
        "--create-home",
        "--uid",
        "--interval",
        "--timeout",
        "--start-period",
    },
    "deploy/compose.yaml": {"--build"},
    "docs/accelerators.md": {"--results", "--minutes", "--platform", "--stages"},  # of experiments.device_check
    "docs/studies/spatial.md": {"--out"},  # of experiments.systems
    "docs/replicas.md": {"--head"},  # of ray start
    "docs/scale_out.md": {"--xla"},  # of XLA_FLAGS
    "deploy/apt-jax.service": {"--system", "--create-home", "--home-dir", "--now"},
    "docs/operations.md": {"--stop-timeout"},
    "docs/structured_outputs.md": {"--pids-limit"},
    "docs/deployment.md": {
        *("--zone", "--accelerator-type", "--version", "--python", "--net", "--privileged", "--stop-timeout"),
        *("--target", "--rm"),
    },
    "docs/kubernetes.md": {
        *("--target", "--from-literal", "--cluster", "--location", "--node-locations", "--machine-type", "--num-nodes"),
        *("--disk-type", "--tpu-topology", "--placement-policy", "--zone", "--maintenance-policy", "--create-disk"),
    },
    **{f"deploy/kubernetes/{name}.yaml": {"--from-literal"} for name in ("cpu", "gpu", "tpu", "tpu7x")},
    "deploy/skypilot.yaml": {"--python", "--seed"},
    "docs/releasing.md": {"--target"},
    "docs/troubleshooting.md": {"--cpuset-cpus"},
    "docs/from_vllm.md": {  # vLLM's, each beside what apt-jax has instead or lacks
        *("--enable-chunked-prefill", "--scheduler-cls", "--data-parallel-size", "--enforce-eager"),
        *("--cpu-offload-gb", "--pipeline-parallel-size", "--trust-remote-code"),
    },
}
OTHERS_METRICS = {
    "docs/kubernetes.md": {"vllm:gpu_cache_usage_perc", "vllm:lora_requests_info"}
}  # which it says we lack
HIDDEN = {*OTHER_SPELLINGS, "--model", "--kv-offloading-size", "--tyro-print-completion", "--tyro-write-completion"}
OTHER_PROGRAMS = (
    "(?:python -m (?!serve)|make [a-z-]+ ARGS|vllm bench|guidellm run|aiperf profile|locust -f|lm_eval --|ruff |git )"
)
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (*ROOT.glob("*.md"), *(ROOT / ".github").rglob("*.md"), *(ROOT / "docs").rglob("*.md"))
    if path.parent.name != "log"  # dated notes: their commands are those of their day
)
DEPLOYED = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "deploy").rglob("*")
    if path.suffix in (".yaml", ".service") and path.parent.name != "monitoring"
)
FLAG = r"(?<![\w-])--[a-z][a-z0-9-]+"


@functools.cache
def flags_of(*command: str) -> frozenset[str]:
    """Flags that the help of a command shows, and of the commands below it."""
    shown = io.TextIOWrapper(io.BytesIO(), "utf-8")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown):
        patch.setenv("COLUMNS", "120")  # one column, and no flag is broken off
        with pytest.raises(SystemExit):
            main([*command, "--help"])
        shown.flush()
    lines = [line.strip("│ ") for line in shown.buffer.getvalue().decode().splitlines()]
    found = frozenset(flag for line in lines if line.startswith("-") for flag in re.findall(FLAG, line))
    below = [line.split()[1] for line in lines if line.startswith("• ")]
    return found.union(*(flags_of(*command, name) for name in below))


def joined(name: str) -> str:
    """A file's text, each command on one line."""
    return re.sub(r"\\\n\s*", "", (ROOT / name).read_text())


def test_the_help_shows_flags():
    assert {"--max-num-seqs", "--api-key", "--no-calibrate", "--load-format"} <= flags_of("serve")
    assert "--input" in flags_of("run-batch") and "--policies" in flags_of("simulate") and flags_of("bench")
    assert flags_of() > flags_of("serve") | flags_of("bench") | flags_of("convert")


@pytest.mark.parametrize("name", [*PAGES, "Dockerfile", *DEPLOYED])
def test_every_flag_that_is_named_exists(name):
    named = set(re.findall(FLAG, re.sub(rf".*{OTHER_PROGRAMS}.*", "", joined(name))))
    assert named - OTHER_TOOLS.get(name, set()) - HIDDEN <= flags_of()


@pytest.mark.parametrize("name", PAGES)
def test_every_command_takes_the_flags_that_it_is_shown_with(name):
    for command, rest in re.findall(r"apt-jax (serve|run-batch|convert|simulate|bench)([^\n`#]*)", joined(name)):
        for flag in re.findall(FLAG, rest):
            assert flag in flags_of(command), f"{name}: apt-jax {command} has no {flag}"


@pytest.mark.parametrize(
    "name",
    [*PAGES, "deploy/monitoring/grafana.json", "deploy/monitoring/rules.yaml", *DEPLOYED],
)
def test_every_metric_that_is_named_exists(name):
    found = Metrics("tiny").registry.collect()
    families = {family.name: family.type for family in found if not family.name.startswith("process_")}
    endings = {"gauge": ("",), "counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
    wire = {f"{family}{ending}" for family, kind in families.items() for ending in endings[kind]}
    wire |= {f"{f.name}{end}" for f in FleetMetrics("tiny").registry.collect() for end in endings[f.type]}
    wire |= set(re.findall(r"record: (\S+)", (ROOT / "deploy/monitoring/rules.yaml").read_text()))
    wire |= {
        "vllm:cache_config_info",
        "apt:weights_info",
    }  # with the first engine's figures: tests/serve/test_serve_prefix_cache.py
    named = set(re.findall(r"\b(?:vllm|apt):[a-z0-9_:]*[a-z0-9_]", (ROOT / name).read_text()))
    assert named - OTHERS_METRICS.get(name, set()) <= (wire if name.endswith(".json") else wire | set(families))
    if name in ("docs/metrics.md", "deploy/monitoring/grafana.json"):
        assert named, "the names are not found"
    if name == "docs/metrics.md":
        described = named | {metric.removesuffix("_total") for metric in named}
        assert set(families) <= described, "a metric is not described"


def test_the_unit_gives_the_server_longer_to_stop_than_its_requests():
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str
    unit.read(ROOT / "deploy" / "apt-jax.service")
    grace_s = int(re.search(r"--shutdown-timeout (\d+)", unit["Service"]["ExecStart"])[1])
    assert int(unit["Service"]["TimeoutStopSec"]) > grace_s + 5


def test_the_image_copies_every_package_that_the_wheel_has():
    packages = re.search(r"packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text())[1]
    copied = (ROOT / "Dockerfile").read_text()
    for package in re.findall(r'"(\w+)"', packages):
        assert f"COPY {package} {package}\n" in copied
