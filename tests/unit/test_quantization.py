"""Weights as 8-bit integers: how far off they are, outlier channels, and what cannot be quantised. No jax arrays."""

import ml_dtypes
import numpy as np
import pytest

from apt_jax.engine_config import EngineConfig
from apt_jax.model_config import as_quantization
from apt_jax.models import quantization
from apt_jax.models.quantization import input_factor, quantise_stack, quantise_table, quantise_weight


def weights(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_weight_is_within_half_a_step(dtype):
    kernel = weights(4, 6, 5, 3).astype(dtype)
    values, scale = quantise_weight(kernel, 2)
    assert (values.dtype, values.shape, scale.dtype, scale.shape) == (np.int8, kernel.shape, np.float32, (5, 3))
    assert (np.abs(values.astype(int)).max((0, 1)) == 127).all() and values.min() >= -127
    assert (np.abs(values * scale - kernel.astype(np.float32)) <= scale / 2 * 1.0001).all()


def test_a_table_has_a_scale_for_each_row():
    table = weights(7, 5) * np.array([[1e-3], [0], [1], [5], [1e4], [1], [2]], np.float32)
    values, scale = quantise_table(table)
    transposed = quantise_weight(table.T, 1)
    assert (values == transposed[0].T).all() and (scale == transposed[1]).all()
    assert scale[1] == 1 and not values[1].any(), "a row of zeros"
    assert (np.abs(values * scale[:, None] - table) <= scale[:, None] / 2 * 1.0001).all()


def test_rows_a_hundred_times_smaller_keep_their_digits():
    """As of an attention whose layer norm makes some channels a hundred times larger."""
    stack = weights(2, 64, 8, 4)
    gain = np.ones((2, 64, 1, 1), np.float32)
    gain[0, [3, 40]], gain[1, [0, 63]] = 100, 100
    found = quantise_stack(stack / gain, 1)
    assert found.factor.shape == (2, 64) and (np.log2(found.factor) % 1 == 0).all() and found.factor.max() <= 1
    assert (found.factor[0, [3, 40]] <= 2**-6).all() and (found.factor[1, [0, 63]] <= 2**-6).all()

    def error(kernel, layer):
        return np.abs(kernel * gain[layer] - stack[layer]).std() / stack.std()

    for layer in (0, 1):
        values, scale = quantise_weight(stack[layer] / gain[layer], 1)
        factor = found.factor[layer][:, None, None]
        assert error(factor * found.values[layer] * found.scale[layer], layer) < 0.01
        assert error(values * scale, layer) > 0.05, "without a factor"


def test_factors_of_equal_rows_and_of_rows_of_zeros_are_one():
    assert (input_factor(np.zeros((3, 2), np.float32), 1) == 1).all()
    assert (input_factor(np.array([[1, -4], [0, 0], [2.5, 1]]), 1) == 1).all()
    assert input_factor(np.array([[1, -4], [1e-9, 0]]), 1).tolist() == [1, 2**-14], "what float16 has"


def test_parts_at_a_time_make_no_difference(monkeypatch):
    stack = weights(3, 30, 11)
    whole = quantise_stack(stack, 1)
    monkeypatch.setattr(quantization, "_CHUNK_NUMBERS", 25)
    assert all((a == b).all() for a, b in zip(whole, quantise_stack(stack, 1), strict=True))
    assert (quantise_table(stack[0])[0] == quantise_weight(stack[0].T, 1)[0].T).all()


@pytest.mark.parametrize("number", [np.inf, np.nan])
def test_weights_that_are_not_finite_are_refused(number):
    stack = weights(2, 4, 3)
    stack[1, 2, 0] = number
    for quantise in (lambda: quantise_stack(stack, 1), lambda: quantise_table(stack[1])):
        with pytest.raises(ValueError, match="not finite, so it cannot be quantised; leave out --quantization"):
            quantise()


def test_names():
    assert as_quantization("int8-dynamic") == "int8-dynamic"
    with pytest.raises(ValueError, match="'awq' is not one of none, int8, int8-dynamic; weights that other tools"):
        as_quantization("awq")


@pytest.mark.parametrize(
    ("field", "value"), [("cache_dtype", None), ("cache_dtype", 8), ("cache_dtype", ""), ("quantization", "")]
)
def test_what_is_no_name_of_a_number_type_is_refused_by_the_fields_name(field, value):
    """It was an AttributeError, and an empty quantization was taken for none."""
    with pytest.raises(ValueError, match=f"{field}={value!r} is not one of"):
        EngineConfig(**{field: value})
