"""The committed demo checkpoint: it is small, loads, predicts text that it never saw, and writes words."""

import json
import math
import re
from functools import cache
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tokenizers import Tokenizer

from apt_jax.checkpoints.demo_training.demo_sample import generate
from apt_jax.checkpoints.load import Loaded, load_model
from apt_jax.checkpoints.source import DEMO_FOLDER
from apt_jax.models.interface import causal_attention

LARGEST_FOLDER = 12 * 2**20  # bytes

# Written for this test in the manner of the library's documentation; it is not part of the training text.
UNSEEN_TEXT = '''Return a list of the names in the given directory.

If path is None, the current directory is used. The names are sorted. If the directory does not exist, an
OSError is raised. The default value of the optional argument is False, and the result is always a new list
object. This method should be called before the file is closed.

def read_names(self, path=None, default=False):
    """Read the names from the file and return them as a list of strings."""
    if path is None:
        path = self.path
    with open(path) as file:
        for line in file:
            name = line.strip()
            if not name:
                continue
            self.names.append(name)
    return self.names
'''
LARGEST_LOSS = 4.0  # nats per token; a uniform guess gives ln(3072) = 8.03


@cache
def demo() -> Loaded:
    return load_model(None, dtype="float32")


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO_FOLDER / "tokenizer.json"))


def test_folder_is_complete_and_small() -> None:
    files = {path.name: path.stat().st_size for path in DEMO_FOLDER.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "training.json"} <= set(
        files
    )
    assert sum(files.values()) <= LARGEST_FOLDER


def loss_from(position: int) -> float:
    """Mean loss (nats per token) on the unseen text when it begins at `position`."""
    ids = jnp.array(tokenizer().encode(UNSEEN_TEXT).ids)
    model = demo().model
    positions = position + jnp.arange(len(ids) - 1)
    hidden, _ = model(ids[None, :-1], positions[None], causal_attention, None)
    return float(optax.softmax_cross_entropy_with_integer_labels(model.logits(hidden)[0], ids[1:]).mean())


@pytest.mark.parametrize("position", [0, 300, 600, 780])
def test_predicts_unseen_text_at_every_part_of_the_context(position: int) -> None:
    assert position + len(tokenizer().encode(UNSEEN_TEXT).ids) <= demo().config.max_position_embeddings
    assert loss_from(position) < LARGEST_LOSS


def test_losses_on_record_are_those_of_a_trained_model() -> None:
    facts = json.loads((DEMO_FOLDER / "training.json").read_text(encoding="utf-8"))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(jax.tree.map(jnp.asarray, _parameters())))
    assert facts["parameters"] == parameters
    assert facts["validation_loss_nats_per_token"] < LARGEST_LOSS
    assert facts["uniform_loss_nats_per_token"] == pytest.approx(math.log(demo().config.vocab_size))


def _parameters() -> object:
    from flax import nnx

    return nnx.state(demo().model, nnx.Param)


@pytest.mark.parametrize(
    "text",
    ["", "hello", " two  spaces ", "def f(x):\n    return x\n\n\n", "na\u00efve \U0001f600 \u4f60\u597d", "\t\x00"],
)
def test_tokenizer_puts_the_end_token_first_and_loses_nothing(text: str) -> None:
    ids = tokenizer().encode(text).ids
    assert ids[0] == 2
    assert tokenizer().decode(ids) == text


def test_transformers_gives_the_same_ids() -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(DEMO_FOLDER)
    for text in ("hello", "", UNSEEN_TEXT, "</s>a<pad>", "na\u00efve \U0001f600"):
        assert theirs(text).input_ids == tokenizer().encode(text).ids
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (2, 2, 1)


def test_writes_words_over_the_whole_context() -> None:
    known = set(re.findall(r"[a-z]+", " ".join(topics.values()).lower()))
    ids = tokenizer().encode("Return the").ids
    written = generate(demo().model, demo().config, ids, 1024, temperature=0.8, seed=1)
    for part in (written[:512], written[512:]):
        words = re.findall(r"[a-z]+", tokenizer().decode(part).lower())
        assert np.mean([word in known for word in words]) > 0.7
        assert len(set(words)) > 40
