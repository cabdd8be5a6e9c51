"""Collectives of a program that is split over devices; on one device all of them change nothing.

The functions look at the mesh of the program being traced: inside `jax.shard_map` over the axis `AXIS` they
exchange arrays, elsewhere they return their argument. So the model is written once.
"""

import jax

AXIS = "model"


def num_devices() -> int:
    """Devices that the program being traced is split over; 1 outside `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[AXIS] if AXIS in mesh.manual_axes else 1


def all_reduce(x: jax.Array) -> jax.Array:
    """The sum of all devices' `x`, on each of them."""
    return x if num_devices() == 1 else jax.lax.psum(x, AXIS)


def reduce_scatter(x: jax.Array, axis: int) -> jax.Array:
    """This device's slice along `axis` of the sum of all devices' `x`."""
    return x if num_devices() == 1 else jax.lax.psum_scatter(x, AXIS, scatter_dimension=axis, tiled=True)


def all_gather(x: jax.Array, axis: int) -> jax.Array:
    """All devices' slices concatenated along `axis`, on each device."""
    return x if num_devices() == 1 else jax.lax.all_gather(x, AXIS, axis=axis, tiled=True)


def local_slice(x: jax.Array, axis: int) -> jax.Array:
    """This device's slice along `axis` of an `x` that every device has: nothing is exchanged."""
    devices = num_devices()
    if devices == 1:
        return x
    width = x.shape[axis] // devices
    return jax.lax.dynamic_slice_in_dim(x, device_index() * width, width, axis)


def device_index() -> jax.Array | int:
    """Index of this device in the mesh, from 0."""
    return 0 if num_devices() == 1 else jax.lax.axis_index(AXIS)
