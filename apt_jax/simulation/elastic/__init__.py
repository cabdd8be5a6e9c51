"""Elastic sequence parallelism over instances, after LoongServe (arXiv 2404.09526)."""
