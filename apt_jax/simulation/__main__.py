"""`python -m apt_jax.simulation`: the simulator without the rest of the command line."""

import sys

from apt_jax.flags.reader import parse
from apt_jax.simulation.cli import run
from apt_jax.simulation.options import SimulateArgs

if __name__ == "__main__":
    try:
        run(parse(SimulateArgs, "python -m apt_jax.simulation"))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
