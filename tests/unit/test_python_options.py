"""The typed keywords of `LLM` are the fields of its configurations, with their types."""

import typing

import pytest

from apt_jax.engine_config import EngineConfig
from apt_jax.serve.options import LoadOptions
from apt_jax.serve.python.options import LLMOptions, engine_options


def test_every_field_is_a_keyword_of_its_type():
    fields = {**typing.get_type_hints(LoadOptions), **typing.get_type_hints(EngineConfig)}
    assert typing.get_type_hints(LLMOptions) == fields


def test_keywords_are_parted():
    loading, config = engine_options({"revision": "main", "max_num_seqs": 3})
    assert loading == {"revision": "main"} and config == EngineConfig(max_num_seqs=3)
    with pytest.raises(ValueError, match="unknown option max_num_seq=3; did you mean max_num_seqs"):
        engine_options({"max_num_seq": 3})
