"""Several processes that serve one model: how they join, and the role of each."""

from apt_jax.serve.options import DistributedOptions


def join(options: DistributedOptions) -> bool:
    """Join the processes that `options` name, if any; whether this one is process 0, which answers requests.

    Must come before anything else asks jax for its devices.

    Raises:
        ValueError: options are missing, or the others do not come.
    """
    address = options.coordinator_address
    if address is None:
        return True
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # only looked at where devices are CPUs
    named = {} if address == "auto" else {"coordinator_address": address}
    try:
        jax.distributed.initialize(
            **named, num_processes=options.num_processes, process_id=options.process_id  # type: ignore[arg-type]
        )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"cannot join the processes at coordinator_address={address} ({reason}); give --num-processes and "
            "--process-id, the same address everywhere, and start all of them"
        ) from error
    return jax.process_index() == 0
