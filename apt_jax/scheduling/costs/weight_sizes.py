"""Weights of a model that an iteration reads: how many, in how many bytes, and how fast they are multiplied.

Under `--quantization` the projections of the layers and the vocabulary are 8-bit numbers, with a float32 scale for each
output and a float32 factor for each input (`apt_jax/models/quantization.py`); everything else stays in 16 bits.
"""

from dataclasses import dataclass

from apt_jax.model_config import ModelConfig, Quantization
from apt_jax.scheduling.costs.decode_kernels import NUMBER_BYTES

_SCALE_BYTES = 4


@dataclass(frozen=True)
class WeightSizes:
    """Weights of one model, stored as `quantization` says."""

    model: ModelConfig
    quantization: Quantization = "none"

    @property
    def layer_matrices(self) -> int:
        """Numbers of a layer's projections."""
        c = self.model
        return 4 * c.hidden_size**2 + 2 * c.hidden_size * c.ffn_dim

    @property
    def layer_others(self) -> int:
        """Numbers of a layer's biases and norms."""
        return 9 * self.model.hidden_size + self.model.ffn_dim

    @property
    def vocabulary(self) -> int:
        """Numbers of the output embedding."""
        return self.model.vocab_size * self.model.word_embed_proj_dim

    @property
    def count(self) -> int:
        """Weights that every iteration reads: the layers and the output embedding."""
        return self.model.num_hidden_layers * (self.layer_matrices + self.layer_others) + self.vocabulary

    @property
    def nbytes(self) -> int:
        """Bytes of them."""
        if self.quantization == "none":
            return self.count * NUMBER_BYTES
        c = self.model
        # inputs and outputs of q, k, v, out, fc1 and fc2
        scales = 10 * c.hidden_size + 2 * c.ffn_dim
        layer = self.layer_matrices + _SCALE_BYTES * scales + NUMBER_BYTES * self.layer_others
        return c.num_hidden_layers * layer + self.vocabulary + _SCALE_BYTES * c.vocab_size

    @property
    def number_bytes(self) -> float:
        """Bytes of a number of a projection."""
        return NUMBER_BYTES if self.quantization == "none" else 1

    def layer_work(self, int8_rate: float) -> float:
        """Weights of a layer, those counted less that are multiplied as int8, `int8_rate` times as fast as 16 bits.

        Not those of keys and values, whose products always take 16-bit activations.
        """
        work = float(self.layer_matrices + self.layer_others)
        if self.quantization != "int8-dynamic":
            return work
        int8 = self.layer_matrices - 2 * self.model.hidden_size**2
        return work - int8 * (1 - 1 / int8_rate)

    def vocabulary_work(self, int8_rate: float) -> float:
        """The same of the output embedding."""
        return self.vocabulary / (int8_rate if self.quantization == "int8-dynamic" else 1)
