"""Fanning a request out into engine samples."""

from apt_jax.request import SamplingParams, Slo
from apt_jax.serve.runtime.samples import Sample, fan_out, sample_seed


def test_one_prompt_and_one_sample_keep_id_and_seed():
    (sample,) = fan_out("r", [[1, 2]], SamplingParams(seed=7))
    assert (sample.request_id, sample.index, sample.prompt_token_ids, sample.params.seed) == ("r", 0, [1, 2], 7)
    assert (sample.slo, sample.priority, sample.arrival_s, sample.output_token_ids) == (None, 0, None, ())
    assert sample == Sample("r", 0, [1, 2], SamplingParams(seed=7))


def test_every_prompt_gets_n_samples_with_ids_indices_and_seeds():
    samples = fan_out("r", [[1], [2]], SamplingParams(n=3, seed=7), slo=Slo(2.0, 3.0), priority=5, arrival_s=1.5)
    assert [s.request_id for s in samples] == ["r-0-0", "r-0-1", "r-0-2", "r-1-0", "r-1-1", "r-1-2"]
    assert [s.index for s in samples] == list(range(6))
    assert [s.prompt_token_ids for s in samples] == [[1]] * 3 + [[2]] * 3
    assert all(s.params.n == 1 and s.slo == Slo(2.0, 3.0) and s.priority == 5 and s.arrival_s == 1.5 for s in samples)
    seeds = [s.params.seed for s in samples]
    assert seeds[:3] == seeds[3:]
    assert seeds[0] == 7 and len(set(seeds)) == 3


def test_seeds_depend_on_seed_and_sample_and_stay_in_range():
    seeds = {sample_seed(seed, i) for seed in (0, 1, -5, 2**63 - 1) for i in range(50)}
    assert len(seeds) == 200
    assert all(-(2**63) <= seed < 2**63 for seed in seeds if seed is not None)
    assert sample_seed(3, 1) == sample_seed(3, 1)


def test_without_a_seed_no_sample_gets_one():
    assert [s.params.seed for s in fan_out("r", [[1]], SamplingParams(n=2))] == [None, None]
