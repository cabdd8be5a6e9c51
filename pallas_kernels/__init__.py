"""Attention kernels over the paged hybrid cache: jnp references, Pallas TPU (Mosaic) and GPU (Mosaic GPU).

This package imports nothing of apt_jax; `reference.py` says what each kernel computes.
"""
