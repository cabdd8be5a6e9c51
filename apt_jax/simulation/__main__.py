"""`python -m apt_jax.simulation`: the simulator without the rest of the command line."""

import sys

import tyro

from apt_jax.simulation.cli import run
from apt_jax.simulation.options import SimulateArgs

if __name__ == "__main__":
    try:
        run(tyro.cli(SimulateArgs, prog="python -m apt_jax.simulation"))
    except ValueError as error:
        sys.exit(f"error: {error}")
