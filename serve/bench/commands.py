"""`apt-jax bench`: what there is to measure. Imports nothing heavy: the command line shows its help at once."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import OmitSubcommandPrefixes, subcommand

from serve.bench.kernels import BenchKernels
from serve.bench.offline_options import BenchLatency, BenchThroughput
from serve.bench.serving_options import BenchServe

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
