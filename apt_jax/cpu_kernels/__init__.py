"""C++ kernels for a CPU, called by XLA: attention of decode rows and within prefill chunks, products with the weights.

`library.py` compiles the sources in this folder for the host's processor when they are first needed; `calls.py` has the
functions for use inside compiled programs. Without a compiler XLA does the same work, more slowly.
"""
