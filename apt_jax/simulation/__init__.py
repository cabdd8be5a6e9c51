"""A simulator: virtual clock and cost model around the real scheduler."""
