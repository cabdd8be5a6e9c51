"""Machines that come and go under one service, which forms its groups anew; after SpotServe (arXiv 2311.15566)."""
