"""Scheduling: pure host code, without jax, clock or asyncio. Engine and simulator call the same functions."""
