"""deploy/kubernetes: valid for Kubernetes, and true of the server; and what an endpoint picker reads from it."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from apt_jax.scheduling.costs.cost_model import CostModel
from apt_jax.scheduling.costs.hardware import HARDWARE, MODELS
from apt_jax.serve.http.routes.table import ROUTES
from tests.support.asgi_service import run, serving
from tests.support.fake_engine import CharTokenizer, FakeEngine

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
VERSIONS = ("1.30", "1.34", "1.37")  # sleep of preStop: from 1.30 on
OWN = {"InferencePool"}  # kinds that Kubernetes itself does not know
SETS = ("cpu", "gpu", "tpu", "tpu7x")
FIRST_PROBE_S = 120  # what importing JAX may take on a slow machine, and more


def documents():
    """Every object, with the name of its file; the adapter's values are no object."""
    for path in sorted(FOLDER.glob("*.yaml")):
        for number, found in enumerate(yaml.safe_load_all(path.read_text())):
            if "kind" in found:
                yield pytest.param(found, id=f"{path.stem}-{number}-{found['kind']}")


def stateful_set(name):
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


@pytest.mark.parametrize("found", list(documents()))
def test_kubernetes_takes_it(found):
    validate = pytest.importorskip(
        "kubernetes_validate", reason="there is no kubernetes-validate (119 MB): pip install kubernetes-validate"
    )
    if found["kind"] in OWN:
        pytest.skip(f"{found['kind']} is a custom resource, of which kubernetes-validate has no schema")
    for version in VERSIONS:
        validate.validate(found, version, strict=True)


@pytest.mark.parametrize("name", SETS)
def test_a_pod_has_longer_to_stop_than_its_requests(name):
    pod = stateful_set(name)["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    arguments = container["args"]
    shutdown_s = int(arguments[arguments.index("--shutdown-timeout") + 1])
    asleep_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert asleep_s > 2 * container["readinessProbe"]["periodSeconds"] - 1, "the pod is out of the service by then"
    assert pod["terminationGracePeriodSeconds"] >= asleep_s + shutdown_s + 5 + 10


@pytest.mark.parametrize("name", SETS)
def test_probes_ask_open_routes_and_a_start_is_not_cut_off(name):
    (container,) = stateful_set(name)["spec"]["template"]["spec"]["containers"]
    probes = {kind: container[f"{kind}Probe"] for kind in ("startup", "liveness", "readiness")}
    open_paths = {route.path for route in ROUTES if route.is_open and route.is_probe}
    assert {probe["httpGet"]["path"] for probe in probes.values()} <= open_paths
    assert probes["liveness"]["httpGet"]["path"] == "/health" and probes["readiness"]["httpGet"]["path"] == "/ready"
    assert probes["startup"]["periodSeconds"] * probes["startup"]["failureThreshold"] >= FIRST_PROBE_S
    named = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert {probe["httpGet"]["port"] for probe in probes.values()} <= set(named) and named["http"] == 8000


@pytest.mark.parametrize("name", SETS)
def test_files_agree_with_each_other_and_with_the_dockerfile(name):
    found = stateful_set(name)
    labels = found["spec"]["template"]["metadata"]["labels"]
    assert found["spec"]["selector"]["matchLabels"].items() <= labels.items()
    service, headless, budget = yaml.safe_load_all((FOLDER / "service.yaml").read_text())
    assert service["spec"]["selector"] == budget["spec"]["selector"]["matchLabels"] == labels
    assert headless["metadata"]["name"] == found["spec"]["serviceName"]
    target = yaml.safe_load((FOLDER / "hpa.yaml").read_text())["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == (found["kind"], found["metadata"]["name"])
    pool = yaml.safe_load((FOLDER / "inference-pool.yaml").read_text())["spec"]
    assert pool["selector"]["matchLabels"] == labels and pool["targetPorts"] == [{"number": 8000}]
    (container,) = found["spec"]["template"]["spec"]["containers"]
    stage = container["image"].removeprefix("apt-jax:")
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert f"FROM base AS {stage}\n" in dockerfile
    assert container["volumeMounts"][0]["mountPath"] == "/data" and '"/data/unfinished.jsonl"' in dockerfile
    is_root = "USER 10001" not in dockerfile.partition(f"AS {stage}\n")[2].partition("FROM ")[0]
    assert is_root == ("runAsNonRoot" not in found["spec"]["template"]["spec"]["securityContext"])


@pytest.mark.parametrize("name", SETS)
def test_a_pod_s_disk_holds_its_model(name):
    """Half as much again as the weights: the download, and compiled programs."""
    found = stateful_set(name)["spec"]
    model = found["template"]["spec"]["containers"][0]["args"][0].removeprefix("facebook/")
    if model not in MODELS:
        pytest.skip("the demo model comes with the image")
    (disk,) = found["volumeClaimTemplates"]
    held = int(disk["spec"]["resources"]["requests"]["storage"].removesuffix("Gi")) * 2**30
    assert held > 1.5 * CostModel(MODELS[model], HARDWARE["tpu7x"]).weight_bytes


def adapter_rules():
    """Name of each metric of the autoscaler, and the query that finds it."""
    rules = yaml.safe_load((FOLDER / "prometheus-adapter.yaml").read_text())["rules"]
    for rule in (*rules["external"], *rules["custom"]):
        yield rule["name"]["as"], rule["metricsQuery"]


def test_the_autoscaler_s_metrics_are_those_of_the_adapter():
    metrics = yaml.safe_load((FOLDER / "hpa.yaml").read_text())["spec"]["metrics"]
    names = [metric[metric["type"].lower()]["metric"]["name"] for metric in metrics]
    assert names == [name for name, _ in adapter_rules()]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="Prometheus is not installed: apt-get install prometheus")
def test_the_adapter_s_queries_find_the_missed_share_and_the_use_of_the_cache(tmp_path):
    """2 of 10 a minute missed; nothing at all is a share of 0; the cache's use is averaged over five minutes."""
    rules = [
        {
            "record": f"job:{name}",
            "expr": query.replace("<<.LabelMatchers>>", 'namespace="a"').replace("<<.GroupBy>>", "pod"),
        }
        for name, query in adapter_rules()
    ]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "hpa", "rules": rules}]}))

    def case(steps, missed, kept, share):
        labels = 'namespace="a",pod="x"'
        found = [
            {"series": f'apt:slo_missed_total{{slo="strict",{labels}}}', "values": f"0+{missed}x{steps}"},
            {"series": f'apt:slo_attained_total{{slo="strict",{labels}}}', "values": f"0+{kept}x{steps}"},
            {"series": f'apt:slo_missed_total{{slo="ttft",{labels}}}', "values": f"0+7x{steps}"},
            {"series": f"vllm:kv_cache_usage_perc{{{labels}}}", "values": f"0.6x{steps}"},
        ]
        wanted = [
            {
                "expr": "job:apt_slo_missed_share",
                "eval_time": "10m",
                "exp_samples": [{"labels": "job:apt_slo_missed_share", "value": share}],
            },
            {
                "expr": "round(job:apt_cache_usage, 0.001)",
                "eval_time": "10m",
                "exp_samples": [{"labels": '{pod="x"}', "value": 0.6}],
            },
        ]
        return {"interval": "1m", "input_series": found, "promql_expr_test": wanted}

    tests = {
        "rule_files": ["rules.yaml"],
        "evaluation_interval": "1m",
        "tests": [case(10, 2, 8, 0.2), case(10, 0, 0, 0)],
    }
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump(tests))
    done = subprocess.run(["promtool", "test", "rules", tmp_path / "tests.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


PROTOCOL = {  # of the model server protocol of the Gateway API inference extension: what vLLM calls it, type, labels
    "TotalQueuedRequests": ("vllm:num_requests_waiting", "gauge", set()),
    "TotalRunningRequests": ("vllm:num_requests_running", "gauge", set()),
    "KVCacheUtilization": ("vllm:kv_cache_usage_perc", "gauge", set()),
    "BlockSize": ("vllm:cache_config_info", "gauge", {"block_size"}),
    "NumGPUBlocks": ("vllm:cache_config_info", "gauge", {"num_gpu_blocks"}),
}


def test_an_endpoint_picker_finds_what_it_reads():
    """As the protocol has it: the kind of each metric, one series of each, and OpenAI's completions and chats."""
    page = (ROOT / "docs" / "kubernetes.md").read_text()

    async def main():
        engine = FakeEngine(tokenizer=CharTokenizer())
        async with serving(engine) as client:
            await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 3})
            text = (await client.get("/metrics")).text
            families = {family.name: family for family in text_string_to_metric_families(text)}
            for meaning, (name, kind, labels) in PROTOCOL.items():
                found = families[name]
                if name != "vllm:cache_config_info":  # whose labels are the engine's
                    (sample,) = found.samples
                    assert found.type == kind and 0 <= sample.value <= 1
                else:
                    assert labels - {"num_gpu_blocks"} <= set(found.samples[0].labels)
                assert meaning in page and f"`{name}`" in page
            assert "vllm:lora_requests_info" not in families and "vllm:lora_requests_info" in page

    run(main)
    assert {"/v1/completions", "/v1/chat/completions"} <= {route.path for route in ROUTES}


def test_recipes_that_were_not_run_say_so():
    assert "Not run" in (ROOT / "deploy" / "skypilot.yaml").read_text()
    page = (ROOT / "docs" / "kubernetes.md").read_text()
    for block in re.finditer(r"^(.*)\n```\n((?:.*\n)*?)```", page, re.MULTILINE):
        assert block[1].startswith("<!-- not run: "), block[2]
