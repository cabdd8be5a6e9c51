"""Simulated requests: what they are promised, and their counters in arrays."""
