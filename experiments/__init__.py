"""Studies and measurements that need no device; each is one command: `python -m experiments.NAME`."""
