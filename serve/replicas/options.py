"""Flags of a service with replicas. Light, for the help: what they mean is imported when they are used."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tyro.conf import UseAppendAction

from apt_jax.ranges import check_at_least, check_finite
from apt_jax.serve.options import listed

if TYPE_CHECKING:
    from apt_jax.routing.autoscaler import AutoscalerOptions

DEFAULT_ROUTER = "pending-time"


@dataclass(frozen=True)
class RayOptions:
    """The Ray cluster that replicas run on."""

    ray_address: str | None = None
    """Ray cluster, HOST:PORT or auto; default: a local Ray of this machine, which ends with the server."""
    replica_resources: UseAppendAction[tuple[str, ...]] = ()
    """Resources that Ray reserves for each replica, as NAME=NUMBER,...: GPU=1,CPU=8 or TPU=4; default: none."""

    def __post_init__(self) -> None:
        parse_resources(self.replica_resources)


@dataclass(frozen=True)
class RayBatchOptions:
    """Several engines for one batch job, with Ray Data."""

    ray: str | None = None
    """Ray cluster, HOST:PORT or auto; local: a Ray of this machine; default: no Ray, one engine."""
    replicas: int = 1
    """Number of engines, with --ray."""
    replica_resources: UseAppendAction[tuple[str, ...]] = ()
    """Resources that Ray reserves for each engine, as NAME=NUMBER,...: GPU=1,CPU=8 or TPU=4; default: none."""

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ValueError(f"replicas={self.replicas} must be at least 1")
        if self.replicas > 1 and self.ray is None:
            raise ValueError(f"replicas={self.replicas} needs --ray ADDRESS, or --ray local")
        parse_resources(self.replica_resources)


def parse_resources(entries: tuple[str, ...]) -> dict[str, float]:
    """Amount by name.

    Raises:
        ValueError: an entry is not NAME=NUMBER.
    """
    found = {}
    for entry in listed("replica_resources", entries):
        name, _, amount = entry.partition("=")
        try:
            found[name] = float(amount)
        except ValueError:
            found[name] = -1.0
        if not name or not 0 <= found[name] < math.inf:
            raise ValueError(f"replica_resources has {entry!r}, must be NAME=NUMBER such as GPU=1")
    return found


def ray_arguments(entries: tuple[str, ...]) -> dict[str, Any]:
    """The same, as arguments of Ray's functions."""
    amounts = parse_resources(entries)
    return {"num_cpus": amounts.pop("CPU", 0), "num_gpus": amounts.pop("GPU", 0), "resources": amounts}


@dataclass(frozen=True)
class ReplicaOptions:
    """Number of engines behind one server, and the routing of requests to them."""

    replicas: int = 1
    """Number of engines behind this server, each a process started by Ray; needs pip install 'apt-jax[ray]'."""
    max_replicas: int | None = None
    """Upper limit for autoscaling on SLO attainment and memory; default: no autoscaling."""
    router: str = DEFAULT_ROUTER
    """How a replica is chosen for a request: pending-time, least-requests, power-of-two, round-robin, random, prefix
    (where prompts' beginnings were sent before)."""
    target_attainment: float = 0.95
    """Add a replica when a smaller share of requests than this attains its SLO strictly (see --stall-slo-ms)."""
    scale_up_delay: float = 5.0
    """Seconds for which more replicas must be needed before one is added."""
    scale_down_delay: float = 60.0
    """Seconds for which fewer replicas must suffice before one is removed."""

    def __post_init__(self) -> None:
        check_finite(self)
        check_at_least(self, 0, ("target_attainment", "scale_up_delay", "scale_down_delay"))
        if self.replicas < 1:
            raise ValueError(f"replicas={self.replicas} must be at least 1")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas={self.max_replicas} must be at least replicas={self.replicas}")
        if self.router != DEFAULT_ROUTER:
            from apt_jax.routing.catalogue import make_router

            make_router(self.router)
        if self.uses_ray:
            self.autoscaler()

    @property
    def uses_ray(self) -> bool:
        """Whether engines run in processes of their own."""
        return self.replicas > 1 or self.max_replicas is not None

    def autoscaler(self) -> "AutoscalerOptions":
        """When to change the number.

        Raises:
            ValueError: a figure is out of range.
        """
        from apt_jax.routing.autoscaler import AutoscalerOptions

        return AutoscalerOptions(
            min_instances=self.replicas,
            max_instances=self.max_replicas or self.replicas,
            target_attainment=self.target_attainment,
            up_delay_s=self.scale_up_delay,
            down_delay_s=self.scale_down_delay,
        )
