"""Effective throughput in the simulator: the search for it, and the bound that no policy can pass."""
