"""What a stage measures with: names what it does before it does it, keeps to its time, and survives what fails."""

import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from apt_jax.engine_config import AttentionBackend
from experiments.device_check.records import Records, begun, read_records
from experiments.device_check.sizes import Sizes

LOST = 3  # exit code: the device no longer computes; what is left of the stage takes a new process
_COMPILE = "/jax/core/compile/backend_compile_duration"
_LOWER = "/jax/core/compile/jaxpr_to_mlir_module_duration"


class NotThere(Exception):
    """Nothing to measure: there is no such kernel here, which is no fault."""


class Session:
    """One process's part of one stage.

    Attributes:
        sizes: what to measure.
        backend: `--attention-backend` of engines.
    """

    def __init__(self, stage: str, path: Path, sizes: Sizes, seconds: float, backend: AttentionBackend = "auto"):
        """`seconds` are left for the stage; measurements in `path` that were begun are not repeated."""
        self.stage, self.sizes, self.backend = stage, sizes, backend
        self.device = jax.devices()[0]
        earlier = read_records(path)
        self._begun = begun(earlier, stage)
        self._results = {(r["stage"], r["check"]): r for r in earlier if r["event"] == "result"}
        self._stages = {r["stage"] for r in earlier if "stage" in r}
        self._copies = [r["copy_bytes_per_s"] for r in earlier if "copy_bytes_per_s" in r]
        self._records = Records(path)
        self._end_s = time.monotonic() + seconds
        self._compiling_s = {_COMPILE: 0.0, _LOWER: 0.0}
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event in self._compiling_s:
            self._compiling_s[event] += duration_secs

    @property
    def left_s(self) -> float:
        """Seconds left for the stage."""
        return self._end_s - time.monotonic()

    @property
    def copy_bytes_per_s(self) -> float | None:
        """Bandwidth of a copy, if that was measured, in this stage or an earlier one."""
        return self._copies[-1] if self._copies else None

    def ran(self, stage: str) -> bool:
        """Whether another stage was begun before this process."""
        return stage in self._stages

    def result_of(self, name: str, stage: str | None = None) -> dict[str, Any] | None:
        """What was measured before this process began, in this stage or another."""
        return self._results.get((stage or self.stage, name))

    def check(
        self, name: str, measure: Callable[[], dict[str, Any]], *, limit_s: float = 60.0, needs_s: float = 0.0
    ) -> dict[str, Any] | None:
        """Measure and record; None if it failed, was begun by an earlier process, or time is too short.

        Args:
            limit_s: after which the process is ended, and a new one goes on with what follows.
            needs_s: with less time left it is not begun.
        """
        if name in self._begun:
            return self.result_of(name)
        if self.left_s < needs_s:
            self._records.add("skipped", stage=self.stage, check=name, reason=f"{self.left_s:.0f} s left of {needs_s}")
            return None
        self._records.add("begins", stage=self.stage, check=name, limit_s=limit_s * self.sizes.patience)
        before, started = dict(self._compiling_s), time.monotonic()

        def spent() -> dict[str, float]:
            """Seconds in all, in XLA's compiler, and lowering to it; programs may compile in several threads."""
            return {
                "seconds": round(time.monotonic() - started, 2),
                "compile_s": round(self._compiling_s[_COMPILE] - before[_COMPILE], 2),
                "lower_s": round(self._compiling_s[_LOWER] - before[_LOWER], 2),
            }

        try:
            found = measure()
        except NotThere as why:
            self._records.add("skipped", stage=self.stage, check=name, reason=str(why))
            return None
        except Exception as error:  # one that fails must not take the others along
            traceback.print_exc()
            text = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]
            self._records.add("error", stage=self.stage, check=name, error=text, **spent())
            self._end_if_lost()
            return None
        self._records.add("result", stage=self.stage, check=name, **found, **spent())
        if "copy_bytes_per_s" in found:
            self._copies.append(found["copy_bytes_per_s"])
        return found

    def _end_if_lost(self) -> None:
        """After a fault of a kernel a GPU computes nothing more in this process."""
        try:
            jax.block_until_ready(jnp.zeros(8) + 1)
        except Exception:
            os._exit(LOST)
