"""Speed compared with other engines on the same machine, weights and work: `make bench-peers`."""
