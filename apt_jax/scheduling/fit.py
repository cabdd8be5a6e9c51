"""Fit the cost model's scales to measured iterations: non-negative least squares on relative errors.

The dense term bends where matrix products overtake weight reads. The place of the bend is searched on a grid; all
other scales are linear and solved for. Each row is divided by its measured time, so a 1 ms and a 100 ms iteration
count alike.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from apt_jax.scheduling.cost_model import CostModel, Scales, StepLoad

_BENDS = tuple(float(x) for x in np.geomspace(0.02, 50.0, 29))
MAX_OBSERVATIONS = 4096


@dataclass(frozen=True)
class Observation:
    """One measured iteration."""

    load: StepLoad
    seconds: float


def fit(model: CostModel, observations: Sequence[Observation]) -> CostModel:
    """`model` with the scales that explain `observations` best.

    Raises:
        ValueError: fewer than 8 observations, or one that took no time.
    """
    if len(observations) < 8:
        raise ValueError(f"{len(observations)} observations are too few to fit the cost model; give at least 8")
    seconds = np.array([o.seconds for o in observations])
    if not seconds.min() > 0:
        raise ValueError(f"an observation took {seconds.min()} s; every iteration takes more than 0 s")
    base = model.with_scales(Scales())
    best: tuple[float, Scales] | None = None
    for bend in _BENDS:
        terms = _terms(base, observations, bend)
        used = terms.any(axis=0)
        weighted = terms / seconds[:, None]
        size = np.where(used, np.sqrt((weighted**2).sum(axis=0)), 1.0)  # columns of one size: well conditioned
        solution = nnls(weighted[:, used] / size[used], np.ones(len(seconds)))
        scale = np.ones(terms.shape[1])
        scale[~used & (np.arange(terms.shape[1]) == 5)] = 0.0
        scale[used] = solution / size[used]
        error = float(np.abs(weighted[:, used] @ scale[used] - 1).mean())
        if best is None or error < best[0] - 1e-12:
            overhead, dense, kv, hidden, pairs, per_request = map(float, scale)
            best = error, Scales(overhead, dense, bend, kv, hidden, pairs, per_request)
    assert best is not None
    return model.with_scales(best[1])


def nnls(matrix: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """x >= 0 that minimises |matrix x - target|.

    Source: Lawson and Hanson, "Solving Least Squares Problems", chapter 23 (the active-set algorithm).
    """
    columns = matrix.shape[1]
    x = np.zeros(columns)
    passive = np.zeros(columns, np.bool_)
    for _ in range(10 * columns):
        gradient = matrix.T @ (target - matrix @ x)
        gradient[passive] = -np.inf
        if passive.all() or gradient.max() <= 1e-10:
            break
        passive[int(gradient.argmax())] = True
        while True:
            trial = np.zeros(columns)
            trial[passive] = np.linalg.lstsq(matrix[:, passive], target, rcond=None)[0]
            if trial[passive].min() > 0:
                break
            shrinking = passive & (trial <= 0)
            step = float((x[shrinking] / (x[shrinking] - trial[shrinking])).min())
            x = x + step * (trial - x)
            passive &= x > 1e-14
            x[~passive] = 0.0
            if not passive.any():
                break
        if not passive.any():
            break
        x = trial
    return x


def relative_errors(model: CostModel, observations: Sequence[Observation]) -> NDArray[np.float64]:
    """|predicted - measured| / measured of each observation."""
    return np.array([abs(model.step_s(o.load) - o.seconds) / o.seconds for o in observations])


class Calibration:
    """Observations of one model on one device, the fit to them, and its file.

    `observe` keeps the newest 4096 real iterations and fits again after every `refit_every` of them.
    """

    def __init__(self, model: CostModel, observations: Sequence[Observation] = (), *, refit_every: int = 256):
        self.model = fit(model, observations) if len(observations) >= 8 else model
        self._observations = list(observations)[-MAX_OBSERVATIONS:]
        self._refit_every = refit_every
        self._since_fit = 0

    @property
    def num_observations(self) -> int:
        """Iterations kept."""
        return len(self._observations)

    def observe(self, load: StepLoad, seconds: float) -> None:
        """Add one real iteration; now and then `model` is fitted again."""
        if not seconds > 0:
            return
        self._observations.append(Observation(load, seconds))
        del self._observations[:-MAX_OBSERVATIONS]
        self._since_fit += 1
        if self._since_fit >= self._refit_every:
            self._since_fit = 0
            self.model = fit(self.model, self._observations)

    def save(self, path: Path) -> None:
        """Write the observations to `path` as JSON, parent folders included."""
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{**asdict(o.load), "seconds": o.seconds} for o in self._observations]
        path.write_text(json.dumps({"version": 1, "observations": rows}), encoding="utf-8")

    @classmethod
    def load(cls, path: Path, model: CostModel) -> "Calibration | None":
        """The calibration stored at `path`; None if there is none, or it cannot be read."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            rows = [dict(row) for row in raw["observations"]] if raw["version"] == 1 else []
            return cls(model, [Observation(seconds=row.pop("seconds"), load=StepLoad(**row)) for row in rows])
        except (OSError, ValueError, KeyError, TypeError):
            return None


def _terms(model: CostModel, observations: Sequence[Observation], bend: float) -> NDArray[np.float64]:
    """`[observations, 6]` seconds of each term at scale 1: overhead, dense, kv, hidden, pairs, requests."""
    rows = []
    for load in (o.load for o in observations):
        tokens = load.prefill_tokens + load.decode_requests
        compute = tokens * model.token_s + load.samples * model.logits_s + load.projected_tokens * model.projection_s
        rows.append(
            (
                model.overhead_s,
                max(model.weights_s, compute * bend),
                load.kv_tokens * model.kv_token_s,
                load.hidden_tokens * model.hidden_token_s,
                load.prefill_pairs * model.pair_s,
                float(load.decode_requests),
            )
        )
    return np.array(rows)
