"""`python -m apt_jax`: the `apt-jax` command, where it is not on the PATH."""

from apt_jax.serve.cli import main

if __name__ == "__main__":
    main()
