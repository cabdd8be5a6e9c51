"""Simulated studies of cache kinds and scheduling, each one command: `python -m experiments.studies NAME`."""
