"""Flags of a service with replicas. Light, for the help: what they mean is imported when they are used."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apt_jax.routing.autoscaler import AutoscalerOptions

DEFAULT_ROUTER = "pending-time"


@dataclass(frozen=True)
class RayOptions:
    """Where engines run if there are several of them."""

    ray_address: str | None = None
    """Ray cluster to run on, HOST:PORT or auto; default: one of this machine alone, for as long as it is needed."""
    replica_resources: tuple[str, ...] = ()
    """What Ray reserves for each replica, as NAME=NUMBER: GPU=1, TPU=4, CPU=8; default: nothing."""

    def __post_init__(self) -> None:
        parse_resources(self.replica_resources)


@dataclass(frozen=True)
class RayBatchOptions:
    """Several engines for one batch job, by Ray Data."""

    ray: str | None = None
    """Ray cluster to run on, HOST:PORT or auto, or local for one of this machine alone; default: no Ray, one engine."""
    replicas: int = 1
    """Engines, with --ray."""
    replica_resources: tuple[str, ...] = ()
    """What Ray reserves for each of them, as NAME=NUMBER: GPU=1, TPU=4, CPU=8; default: nothing."""

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
    for entry in entries:
        name, _, amount = entry.partition("=")
        try:
            found[name] = float(amount)
        except ValueError:
            found[name] = -1.0
        if not name or found[name] < 0:
            raise ValueError(f"replica_resources has {entry!r}, must be NAME=NUMBER such as GPU=1")
    return found


def ray_arguments(entries: tuple[str, ...]) -> dict[str, Any]:
    """The same, as arguments of Ray's functions."""
    amounts = parse_resources(entries)
    return {"num_cpus": amounts.pop("CPU", 0), "num_gpus": amounts.pop("GPU", 0), "resources": amounts}


@dataclass(frozen=True)
class ReplicaOptions:
    """How many engines serve, and who gets which request."""

    replicas: int = 1
    """Engines behind this server, each a process that Ray starts; needs pip install 'apt-jax[ray]'."""
    max_replicas: int | None = None
    """Add engines, up to so many, while promises are broken or requests queue; default: always --replicas."""
    router: str = DEFAULT_ROUTER
    """Which replica gets a request: pending-time, least-requests, power-of-two, round-robin, random."""
    target_attainment: float = 0.95
    """Add a replica when a smaller share of requests than this keeps its promise."""
    scale_up_delay: float = 5.0
    """Seconds that the replicas must look too few before one is added."""
    scale_down_delay: float = 60.0
    """Seconds that they must look too many before one is removed."""

    def __post_init__(self) -> None:
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
