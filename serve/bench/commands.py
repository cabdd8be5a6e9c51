"""`apt-jax bench`: what there is to measure. Imports nothing heavy: the command line shows its help at once."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import OmitSubcommandPrefixes, subcommand

from apt_jax.pallas_kernels.bench.kernels import BenchKernels
from apt_jax.serve.bench.offline.options import BenchLatency, BenchThroughput
from apt_jax.serve.bench.serving.options import BenchServe

Measurement = (
    Annotated[BenchServe, subcommand("serve")]
    | Annotated[BenchThroughput, subcommand("throughput")]
    | Annotated[BenchLatency, subcommand("latency")]
    | Annotated[BenchKernels, subcommand("kernels")]
)


@dataclass(frozen=True)
class Bench:
    """Measure a server, the engine alone, or its kernels."""

    what: OmitSubcommandPrefixes[Measurement]

    def run(self) -> int:
        """Measure."""
        return self.what.run()
