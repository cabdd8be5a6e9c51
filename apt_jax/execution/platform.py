"""The platforms that JAX runs on and how they differ; the only file of `apt_jax` that compares platform names."""

from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class Platform:
    """How the engine serves on one kind of device.

    Attributes:
        max_num_seqs, max_num_batched_tokens, async_scheduling: defaults of the options with these names.
        cache_limit_bytes: most that the cache takes of a machine's memory unless an option asks for more, so that a
            workstation stays usable; None is no limit.
        float32_only: 16-bit arithmetic is slow, so weights are float32 unless a number type is asked for.
        has_float16: float16 can be multiplied; otherwise bfloat16 is used instead.
        call_per_layer: a model on one device keeps arrays of its own for each layer and a step is a call per layer or
            one C++ call, since XLA copies a layer's part of stacked weights before it multiplies.
        unrolls_decode: decode steps write the layers out one after the other. On a GPU the matrix products then read
            the weights where they are, which in a loop XLA copies out of the stack first.
        branches_by_kind: decode steps are compiled for each mix of cache kinds and choose among them before the first
            layer. On a TPU a condition inside the loop copies the weights that it needs out of the stack, in every
            layer.
        slices_lazily: prefill steps on one device slice the key and value kernels out of the stack where they are
            read. On a TPU a kernel that is sliced before a condition is copied to enter it.
        custom_layouts: weights on one device lie in memory as `execution/weights/tpu_layouts.py` says.
        cpp_kernels: the attention kernels are those in C++ (`cpu_kernels`), and Pallas kernels would be interpreted.
    """

    name: str
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    async_scheduling: bool = True
    cache_limit_bytes: int | None = None
    float32_only: bool = False
    has_float16: bool = True
    call_per_layer: bool = False
    unrolls_decode: bool = False
    branches_by_kind: bool = False
    slices_lazily: bool = False
    custom_layouts: bool = False
    cpp_kernels: bool = False

    @classmethod
    def of(cls, device: jax.Device) -> "Platform":
        """The platform of a device; unknown ones get the plainest programs."""
        return PLATFORMS.get(device.platform, cls(device.platform))

    @classmethod
    def of_array(cls, array: jax.Array) -> "Platform":
        """The platform of the devices that hold `array`."""
        return cls.of(next(iter(array.sharding.device_set)))

    def weight_dtype(self, stored: str) -> str:
        """Number type that weights which are stored as `stored` are held in here, unless another is asked for."""
        if self.float32_only:
            return "float32"
        return "bfloat16" if stored == "float16" and not self.has_float16 else stored


PLATFORMS = {
    platform.name: platform
    for platform in (
        Platform(
            "cpu",
            max_num_seqs=64,
            max_num_batched_tokens=512,
            async_scheduling=False,
            cache_limit_bytes=4 * 2**30,
            float32_only=True,
            call_per_layer=True,
            cpp_kernels=True,
        ),
        Platform("gpu", unrolls_decode=True),
        Platform("tpu", has_float16=False, branches_by_kind=True, slices_lazily=True, custom_layouts=True),
    )
}
