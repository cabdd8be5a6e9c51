"""`make bench-peers`: its arithmetic, its folder, and how peers that fail are left out; the peers are not run here."""

import dataclasses
import json
import sys
import time

import psutil
import pytest
import tyro
from jax import numpy as jnp

from apt_jax.checkpoints.load import load_model
from apt_jax.model_config import ModelConfig
from experiments.peers import environments, folder, gpu, servers
from experiments.peers.__main__ import Args, Comparison, main
from experiments.peers.catalogue import OURS, PEERS, Peer
from experiments.peers.comparison import TASKS, agreement, markdown, medians, ratio
from experiments.peers.environments import NotInstalled, python_of, versions_of
from experiments.peers.process import PeerFailed, Process
from tests.support import served_model

WORKER = """
from protocol import serve

def open_peer(folder, dtype, options):
    print("noise that must not be taken for an answer")
    if folder == "missing":
        raise OSError("no such model\\nat all")
    def generate(prompts, new_tokens):
        if new_tokens == 3:
            raise RuntimeError("out of memory")
        return [[prompt[0] + options.get("add", 0)] * (new_tokens % 100) for prompt in prompts]
    return generate

serve(open_peer)
"""


@pytest.fixture
def peer(tmp_path, monkeypatch):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    monkeypatch.setattr(Peer, "script", property(lambda self: script))
    return Peer("other", "worker.py", ())


def started(peer, tmp_path, folder="model", **options):
    return Process(peer, sys.executable, folder, "float32", {"platform": "cpu", **options}, tmp_path / "log")


def test_a_worker_answers_with_tokens_and_its_noise_goes_to_the_log(peer, tmp_path):
    process = started(peer, tmp_path, add=1)
    seconds, tokens = process.generate([[10], [20]], 2)
    assert tokens == [[11, 11], [21, 21]] and seconds >= 0 and process.load_s >= 0
    process.close()
    assert "noise" in (tmp_path / "log").read_text()


def test_a_worker_sleeps_while_nothing_is_asked_of_it(peer, tmp_path):
    process = started(peer, tmp_path)
    try:
        for _ in range(2):
            end = time.monotonic() + 30
            while psutil.Process(process._process.pid).status() != psutil.STATUS_STOPPED:  # a signal takes its time
                assert time.monotonic() < end
                time.sleep(0.01)
            assert process.generate([[10]], 1)[1] == [[10]]
    finally:
        process.close()
    assert process._process.returncode == 0


@pytest.mark.parametrize(
    ("new_tokens", "sentence"),
    [(3, "other failed: RuntimeError: out of memory; see"), (101, r"other gave \[1\] tokens instead of 101")],
)
def test_what_a_worker_cannot_do_is_one_sentence(new_tokens, sentence, peer, tmp_path):
    process = started(peer, tmp_path)
    with pytest.raises(PeerFailed, match=sentence):
        process.generate([[10]], new_tokens)
    process.close()


def test_a_worker_that_cannot_load_is_one_sentence(peer, tmp_path):
    with pytest.raises(PeerFailed, match="other failed: OSError: no such model at all; see"):
        started(peer, tmp_path, folder="missing")


def test_peers_take_turns_and_one_that_fails_is_left_out(peer, monkeypatch, tmp_path):
    monkeypatch.setattr("experiments.peers.__main__.FOLDER", tmp_path)
    monkeypatch.setitem(TASKS, "broken", dataclasses.replace(TASKS["ttft"], name="broken", new_tokens=3))
    comparison = Comparison(Args(rounds=2), "float32")
    comparison.run([(peer, sys.executable)], ["ttft"])
    assert list(comparison.seconds) == [("other", "ttft")] and len(comparison.seconds["other", "ttft"]) == 2
    broken = Comparison(Args(rounds=1), "float32")
    broken.run([(peer, sys.executable)], ["ttft", "broken"])
    assert broken.seconds == {} and "out of memory" in broken.remarks[0]


@pytest.mark.parametrize(("platform", "most"), [("cpu", 2), ("gpu", 1)])
def test_on_a_gpu_one_peer_after_the_other_is_loaded(platform, most, peer, monkeypatch, tmp_path):
    monkeypatch.setattr("experiments.peers.__main__.FOLDER", tmp_path)
    ours = dataclasses.replace(peer, name="apt-jax")
    comparison = Comparison(Args(rounds=1, platform=platform), "float32")
    loaded = []
    do = comparison._do
    monkeypatch.setattr(comparison, "_do", lambda *a, **k: (loaded.append(len(comparison._loaded)), do(*a, **k)))
    comparison.run([(ours, sys.executable), (peer, sys.executable)], ["ttft"])
    assert max(loaded) == most and not comparison._loaded
    assert set(comparison.seconds) == {("apt-jax", "ttft"), ("other", "ttft")}
    assert comparison.agreements["other"].equal == 1


def test_a_peer_that_cannot_be_installed_is_skipped_with_a_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(environments, "ROOT", tmp_path)
    monkeypatch.setattr(environments, "FOLDER", tmp_path / ".venv-peers")
    peer = Peer("other", "worker.py", (), ("nothing-at-all",), "false")  # a Python that makes no environment
    with pytest.raises(NotInstalled, match=r"other is skipped: it cannot be installed here \(see; see .venv-peers/"):
        python_of(peer)
    assert "installing other" in capsys.readouterr().err


def test_versions_are_those_of_the_environment():
    found = versions_of(OURS, python_of(OURS))
    assert found["python"].startswith("3.") and set(found) == {"jax", "jaxlib", "flax", "python"}
    assert versions_of(dataclasses.replace(OURS, distributions=("no-such-thing",)), python_of(OURS)) == {}


def test_unknown_names_are_told_with_the_known_ones():
    for flags, sentence in (({"peers": "vllm"}, "known: transformers, "), ({"tasks": "online"}, "known: offline")):
        with pytest.raises(ValueError, match=sentence):
            main(Args(**flags))


def test_every_peer_has_a_worker():
    assert all(peer.script.is_file() for peer in [OURS, *PEERS.values()])


def test_agreement_is_cut_at_the_first_difference():
    found = agreement([[1, 2, 3, 4], [1, 2, 3, 4]], [[1, 2, 3, 4], [1, 9, 3, 4]])
    assert (found.equal, found.before_first_difference) == (7 / 8, 5 / 8)


def test_figures_are_medians_and_ratios_say_how_many_times_as_fast_we_are():
    seconds = {("apt-jax", "offline"): [4.0, 2.0, 9.0], ("other", "offline"): [8.0], ("apt-jax", "ttft"): [0.5]}
    seconds |= {("other", "ttft"): [0.25]}
    found = medians(seconds)
    assert found["apt-jax", "offline"] == 32 * 128 / 4 and found["other", "ttft"] == 250
    assert ratio("offline", 200, 100) == 2 and ratio("ttft", 200, 100) == 0.5
    table = markdown("float32", found, "apt-jax", {"other": agreement([[1]], [[1]])}).splitlines()
    assert table[2] == "| apt-jax | 1024 | | 500 | |  |"
    assert table[3] == "| other | 512 | 2.00 x | 250 | 0.50 x | 100% |"


def test_the_folder_is_a_model_that_loads_and_is_the_same_for_a_seed(tmp_path, monkeypatch):
    small = ModelConfig(
        vocab_size=300, num_hidden_layers=2, hidden_size=32, num_attention_heads=4, ffn_dim=64, word_embed_proj_dim=32,
        max_position_embeddings=64,
    )  # fmt: skip
    monkeypatch.setitem(folder.MODELS, "small", small)
    written = folder.write_folder(tmp_path / "model", model="small")
    loaded = load_model(str(folder.without_tokenizer(written)), dtype="float32")
    assert loaded.config.num_hidden_layers == 2 and loaded.config.vocab_size == 300
    embedding = loaded.model.embed_tokens.embedding[...]
    assert jnp.array_equal(embedding, folder.weights(small, 0)["model.decoder.embed_tokens.weight"])
    vocabulary = json.loads((tmp_path / "model/tokenizer.json").read_text())["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(300))
    dummy = folder.without_tokenizer(folder.write_folder(tmp_path / "dummy", model="small", dummy=True))
    assert sorted(path.name for path in dummy.iterdir()) == ["config.json"]
    assert load_model(str(dummy), load_format="dummy", dtype="float32").config == loaded.config
    assert not jnp.array_equal(embedding, folder.weights(small, 1)["model.decoder.embed_tokens.weight"])


def test_servers_that_sleep_and_wake_and_one_client(tmp_path, monkeypatch, capsys):
    """A small benchmark, to see that it works: a real server, stopped but while it is measured."""
    monkeypatch.setattr(servers, "FOLDER", tmp_path)
    monkeypatch.setattr(servers, "write_folder", lambda folder, **_: folder)
    plot, output = tmp_path / "a.png", tmp_path / "a.json"
    args = servers.Args(
        servers="apt-jax", rates="20,40", num_prompts=4, dataset="random", max_model_len=128, max_num_seqs=1,
        cache_bytes=2**20, folder=served_model.write_folder(tmp_path / "model"),
        serve="--load-format dummy --max-num-batched-tokens 32 --cache-mode kv --no-calibrate",
        bench="--random-input-len 20 --random-output-len 8", output=output, plot=plot,
    )  # fmt: skip
    assert servers.main(args) == 0
    found = json.loads(output.read_text())
    loads = [(20, 0), (20, 1), (40, 0), (40, 1)]
    assert [(run["server"], run["rate"], run["seed"]) for run in found["runs"]] == [
        ("apt-jax", *load) for load in loads
    ]
    assert all(run["completed"] == 4 and run["strict_attainment"] == run["attainment"] == 1 for run in found["runs"])
    assert found["effective_throughput"] == found["effective_throughput_paper"]
    assert plot.stat().st_size > 10_000
    shown = capsys.readouterr().out
    assert "| apt-jax | 100% (100%, 100%) | 100% (100%, 100%) | 40.00 |" in shown and "worst quartile" in shown
    started = time.monotonic()
    assert servers.main(dataclasses.replace(args, rates="20")) == 0, "nothing is left to measure: no server starts"
    assert time.monotonic() - started < 5 and json.loads(output.read_text())["runs"] == found["runs"]
    with pytest.raises(ValueError, match=r"a\.json was measured with num_prompts=4, not 5; give another --output"):
        servers.main(dataclasses.replace(args, num_prompts=5))


def test_shares_of_servers_are_means_over_seeds():
    def run(server, rate, seed, strict, worst):
        quartiles = {"prompt_quartile": [{"strict_attainment": 1.0}], "output_quartile": [{"strict_attainment": worst}]}
        shares = {"strict_attainment": strict, "attainment": 1.0, "attainment_by_class": quartiles}
        return {"server": server, "rate": rate, "seed": seed, **shares}

    runs = [run("a", 2.0, 1, 0.5, 0.0), run("a", 2.0, 0, 0.75, 0.25), run("b", 1.0, 0, 1.0, 1.0)]
    assert servers.points_of(runs, "a", "strict_attainment") == [(2.0, 0.625)]
    shown = servers.tables(
        runs, ["a", "b"], {reading: {"a": {"0.9": 0.0}, "b": {"0.9": 1.0}} for reading in servers.READINGS}
    )
    assert "| attained strictly | 1/s | 2/s | req/s at 90% |" in shown
    assert "| a | - | 62% (75%, 50%) | 0.00 |\n| b | 100% | - | 1.00 |" in shown
    assert "| a | - | 12% (25%, 0%) |" in shown


def test_a_server_that_nobody_knows(tmp_path, monkeypatch):
    monkeypatch.setattr(servers, "FOLDER", tmp_path)
    monkeypatch.setattr(servers, "write_folder", lambda folder, **_: folder)
    with pytest.raises(ValueError, match="unknown 'tgi'; known: apt-jax, apt-jax-fcfs, vllm-cpu"):
        servers.main(servers.Args(servers="tgi"))


def test_every_part_on_a_gpu_is_a_command_that_its_program_takes(tmp_path):
    parts = gpu.commands(gpu.Args(results=tmp_path, model="opt-6.7b"))
    offline = tyro.cli(Args, args=parts["offline"][3:])
    assert (offline.platform, offline.model, offline.dummy, offline.dtypes) == ("gpu", "opt-6.7b", True, "bfloat16")
    assert all(PEERS[name].on_gpu for name in offline.peers.split(","))
    serving = tyro.cli(servers.Args, args=parts["serving"][3:])
    assert (serving.cache_bytes, serving.ttft_slo_ms, serving.dtype) == (10_000_000_000, 1000, "bfloat16")
    assert (
        parts["steps"][1:5] == ["-m", "apt_jax.serve.cli", "bench", "kernels"] and "--allow-cpu" not in parts["steps"]
    )


def test_parts_on_a_gpu_fail_and_end_one_by_one(tmp_path, monkeypatch, capsys):
    # a shell's background job, such as a whole run of these tests may be, ignores SIGINT, and so would what it starts
    endless = "import signal, time; signal.signal(signal.SIGINT, signal.default_int_handler); time.sleep(60)"
    code = {"a": "pass", "b": "raise SystemExit(3)", "c": endless, "d": "pass"}
    monkeypatch.setattr(gpu, "commands", lambda args: {n: [sys.executable, "-c", c] for n, c in code.items()})
    assert gpu.main(gpu.Args(results=tmp_path / "r", parts="a,b,c,d", part_minutes=0.02)) == 1
    ends = capsys.readouterr().out.splitlines()[-4:]
    assert ends == ["a done", "b failed with exit code 3", "c was ended after 0.02 minutes", "d done"]
    with pytest.raises(ValueError, match="unknown 'e'; known: a, b, c, d"):
        gpu.main(gpu.Args(results=tmp_path, parts="e"))
