"""Number types that the C++ kernels do not compute in are refused by the kernels themselves."""

import jax
import jax.numpy as jnp
import pytest

from apt_jax.batching.arrays import Rows
from apt_jax.cpu_kernels import calls, library

try:
    library.register()
except library.Unavailable as error:
    pytest.skip(f"the C++ kernels cannot be had here: {error}", allow_module_level=True)


def test_numbers_of_other_types_are_refused():
    """float16 has as many bits as bfloat16, and was taken for it."""
    floats, blocks, length = jnp.zeros((2, 32)), jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32)
    pool = jnp.zeros((1, 4, 32))
    half_pool, half_kernel = jnp.zeros((1, 4, 32), jnp.float16), jnp.zeros((1, 32, 32), jnp.float16)

    def layers(x, pool, *parameters):
        shape = calls.LayersShape(2, 32, 1, True, [False] * 6)
        rows = Rows(*(jnp.zeros(1, jnp.int32),) * 7, (blocks, blocks))
        return jax.jit(lambda x, pool: calls.all_layers(x, pool, rows, [*parameters, *[floats] * 28][:28], shape))(
            x, pool
        )

    wrong = "of F32 or BF16, not of F16; convert the numbers"
    for message, call in [
        (f"a pool {wrong}", lambda: calls.kv_decode(jnp.zeros((1, 2, 16)), half_pool, blocks, blocks, length)),
        (f"a pool {wrong}", lambda: calls.hidden_decode(jnp.zeros((1, 2, 32)), half_pool, blocks, length)),
        (f"a kernel {wrong}", lambda: calls.matmul(floats, half_kernel, 32)),
        (f"a residual stream {wrong}", lambda: layers(floats.astype(jnp.float16), half_pool)),
        ("a pool of the residual stream's type, not of F16", lambda: layers(floats, half_pool)),
        ("a kernel of F32 here, not of F16", lambda: layers(floats, pool, floats, floats, half_kernel)),
        ("a parameter of F32 here, not of BF16", lambda: layers(floats, pool, floats.astype(jnp.bfloat16))),
    ]:
        with pytest.raises(jax.errors.JaxRuntimeError, match=f"the CPU kernels take .*{message}"):
            jax.block_until_ready(call())
