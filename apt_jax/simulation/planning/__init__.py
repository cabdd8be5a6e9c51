"""`apt-jax plan`: which devices, and how many, keep a promise, at what cost."""
