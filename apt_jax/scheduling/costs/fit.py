"""Fit the cost model's scales to measured iterations: non-negative least squares on relative errors.

The dense term bends where matrix products overtake weight reads. The place and the sharpness of the bend are searched
on a grid; all other scales are linear and solved for, in a few passes that trust outliers less (Cauchy weights: a busy
machine or a page fault should not bend the model). Each row is divided by its measured time, so a 1 ms and a 100 ms
iteration count alike.

Such a fit predicts what an iteration usually takes. Queues grow by what iterations take altogether, which is more on a
machine that others share: `pace` is the ratio of the two over the iterations that served, and multiplies all scales.
"""

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from operator import mul
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from apt_jax.cache import KINDS
from apt_jax.files import read_json, replace_file
from apt_jax.scheduling.costs.cost_model import CostModel, Scales
from apt_jax.scheduling.costs.host_times import HostTime
from apt_jax.scheduling.costs.step_load import Chunk, StepLoad

MIN_OBSERVATIONS = 8
RECENT_OBSERVATIONS = 512  # real iterations kept in addition to those measured at start-up
_BENDS = tuple(float(x) for x in np.geomspace(0.02, 50.0, 29))
_KNEES = (1.0, 2.0, 4.0, 16.0)
_ROBUST_PASSES = 5
_VERSION, _BY_KIND = 4, ("context_tokens", "decodes")  # of a stored calibration
_TYPICAL_ERROR = 0.15  # relative; observations much further off lose their weight
_MOST_PACE = 4.0  # times what was predicted that one iteration may count for in the pace

Row = tuple[float, ...]  # an iteration's terms at scale 1: see `_row`


@dataclass(frozen=True)
class Observation:
    """One measured iteration: of a batch alone, or one that served and was chosen among unfinished `candidates`."""

    load: StepLoad
    seconds: float
    candidates: int = 0


def fit(
    model: CostModel,
    observations: Sequence[Observation],
    around: Scales | None = None,
    rows: Sequence[Row] | None = None,
) -> CostModel:
    """`model` with the scales that explain `observations` best.

    Args:
        model: physics and padded sizes; its scales do not matter.
        observations: at least `MIN_OBSERVATIONS`.
        around: an earlier answer: search the bend near its bend only, which takes milliseconds.
        rows: `_row` of each observation, where they are known.

    Raises:
        ValueError: too few observations, or one that took no time.
    """
    if len(observations) < MIN_OBSERVATIONS:
        raise ValueError(
            f"{len(observations)} observations are too few to fit the cost model; give at least {MIN_OBSERVATIONS}"
        )
    seconds = np.array([o.seconds for o in observations])
    if not seconds.min() > 0:
        raise ValueError(f"an observation took {seconds.min()} s; every iteration takes more than 0 s")
    base = model.with_scales(Scales())
    terms = np.array([_row(base, o) for o in observations] if rows is None else rows)
    compute_s, others = terms[:, 0], terms[:, 1:]
    weights_s = np.full(len(terms), base.weights_s)
    if around is None:
        grid = [(bend, knee) for bend in _BENDS for knee in _KNEES]
    else:
        grid = [(around.compute * float(step), around.knee) for step in np.geomspace(0.8, 1.25, 5)]
    best: tuple[float, Scales] | None = None
    unseen = [1.0, 1.0, *(1.0 for _ in KINDS), *base.request_s, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    for bend, knee in grid:
        dense = base.blend(weights_s, compute_s * bend, knee)
        error, scale = _solve(np.column_stack([dense, others]) / seconds[:, None], unseen)
        if best is None or error < best[0] - 1e-12:
            dense_scale, overhead, *per_kind, pairs, exchange, mixing, prefix, iteration_s, candidate_s = scale
            attention, per_request_s = tuple(per_kind[: len(KINDS)]), tuple(per_kind[len(KINDS) :])
            best = error, Scales(
                overhead, dense_scale, bend, knee, attention, pairs, per_request_s, exchange, mixing, prefix,
                HostTime(iteration_s, candidate_s),
            )  # fmt: skip
    assert best is not None
    return model.with_scales(best[1])


def _solve(relative: NDArray[np.float64], unseen: Sequence[float]) -> tuple[float, list[float]]:
    """Scales x >= 0 that bring `relative @ x` close to 1, and the typical error; as in `unseen` where nothing tells."""
    from scipy.optimize import nnls  # takes a while to import

    used = relative.any(axis=0)
    size = np.sqrt((relative[:, used] ** 2).sum(axis=0))  # columns of one size: well conditioned
    trust = np.ones(len(relative))
    scale = np.array(unseen)
    for _ in range(_ROBUST_PASSES):
        solution, _ = nnls(trust[:, None] * relative[:, used] / size, trust)
        scale[used] = solution / size
        off = np.abs(relative @ scale - 1)
        trust = 1 / np.sqrt(1 + (off / _TYPICAL_ERROR) ** 2)
    return float(np.median(off) + 0.1 * np.minimum(off, 1.0).mean()), [float(x) for x in scale]


def _row(model: CostModel, observation: Observation) -> Row:
    """Seconds at scale 1: products, overhead, context by kind, requests by kind (their number), pairs, exchange,
    mixing, prefixes, and the host's two counts: an iteration that served, and its candidates."""
    load = model.sizes.pad(observation.load)
    return (
        model.compute_s(load),
        model.overhead_s,
        *map(mul, load.context_tokens, model.attention_s),
        *map(float, load.decodes),
        load.prefill_pairs * model.pair_s,
        model.exchange_s(load),
        model.mixing_s(load),
        model.prefixes_s(load),
        float(observation.candidates > 0),
        float(observation.candidates),
    )


def _seconds(model: CostModel, terms: NDArray[np.float64]) -> NDArray[np.float64]:
    """`[n]` predicted seconds of iterations with these `_row`s, those of the host included."""
    s = model.scales
    requests_s = model.with_scales(Scales()).request_s if s.per_request_s is None else s.per_request_s
    host = s.host.iteration_s, s.host.candidate_s
    linear = np.array([s.overhead, *s.attention, *requests_s, s.pairs, s.exchange, s.mixing, s.prefix, *host])
    read_s = np.full(len(terms), model.weights_s)
    return np.asarray(s.dense * model.blend(read_s, terms[:, 0] * s.compute, s.knee) + terms[:, 1:] @ linear)


def relative_errors(model: CostModel, observations: Sequence[Observation]) -> NDArray[np.float64]:
    """`[n]` |predicted - measured| / measured of each observation."""
    return np.array([abs(predicted_s(model, o) - o.seconds) / o.seconds for o in observations])


def predicted_s(model: CostModel, observation: Observation) -> float:
    """Seconds that the model predicts for an observed iteration, its host time included if it served."""
    return model.step_s(observation.load) + (model.host_s(observation.candidates) if observation.candidates else 0.0)


def pace(model: CostModel, served: Sequence[Observation], rows: Sequence[Row] | None = None) -> float:
    """Seconds of these iterations altogether over those predicted, one far beyond its prediction cut off.

    `rows` are `_row` of each at scale 1, where they are known.
    """
    if rows is None:
        base = model.with_scales(Scales())
        rows = [_row(base, o) for o in served]
    predicted, seconds = _seconds(model, np.array(rows)), np.array([o.seconds for o in served])
    return float(np.minimum(seconds, _MOST_PACE * predicted).sum() / predicted.sum())


class Calibration:
    """What was measured of one model on one device, the fit to it, and its file.

    `measured` are the iterations timed at start-up; they are kept, so that a long time in one regime does not spoil
    the fit elsewhere. `observe` adds real iterations, the newest ones, and fits again after every `refit_every`. Their
    terms are computed as they come, so that fitting does not make a request wait.
    """

    def __init__(self, model: CostModel, measured: Sequence[Observation] = (), *, refit_every: int = 512):
        self.model = fit(model, measured) if len(measured) >= MIN_OBSERVATIONS else model
        self.is_fitted = len(measured) >= MIN_OBSERVATIONS
        self._base = model.with_scales(Scales())
        self._measured = list(measured)
        self._recent: deque[Observation] = deque(maxlen=RECENT_OBSERVATIONS)
        self._rows = [_row(self._base, o) for o in measured]
        self._recent_rows: deque[Row] = deque(maxlen=RECENT_OBSERVATIONS)
        self._refit_every = refit_every
        self._since_fit = 0

    @property
    def num_observations(self) -> int:
        """Iterations kept."""
        return len(self._measured) + len(self._recent)

    def median_error(self) -> float:
        """Median relative error over the iterations kept; 0 without any."""
        kept = [*self._measured, *self._recent]
        return float(np.median(relative_errors(self.model, kept))) if kept else 0.0

    def observe(self, load: StepLoad, seconds: float, candidates: int = 0) -> bool:
        """Add one real iteration; whether `model` was fitted again because of it."""
        if not seconds > 0:
            return False
        observation = Observation(load, seconds, candidates)
        self._recent.append(observation)
        self._recent_rows.append(_row(self._base, observation))
        self._since_fit += 1
        if self._since_fit < self._refit_every:
            return False
        self._since_fit = 0
        self.model = self.fitted_to(list(self._recent), list(self._recent_rows))
        self.is_fitted = True
        return True

    def fitted_to(self, served: Sequence[Observation], rows: Sequence[Row] | None = None) -> CostModel:
        """The model that explains start-up's iterations and those that served, at the pace of the latter."""
        rows = [_row(self._base, o) for o in served] if rows is None else rows
        around = self.model.scales if self.is_fitted else None
        model = fit(self.model, [*self._measured, *served], around, [*self._rows, *rows])
        return model.with_scales(model.scales.at_pace(pace(model, served, rows)))

    def save(self, path: Path) -> None:
        """Write what was measured to `path` as JSON, parent folders included."""
        kinds = [kind.spec.name for kind in KINDS]
        rows = [{**asdict(o.load), "seconds": o.seconds} for o in self._measured]
        replace_file(path, json.dumps({"version": _VERSION, "kinds": kinds, "observations": rows}).encode())

    @classmethod
    def load(cls, path: Path, model: CostModel) -> "Calibration | None":
        """The calibration stored at `path`; None if there is none, or it cannot be used."""
        try:
            raw = read_json(path)
            if (raw["version"], raw["kinds"]) != (_VERSION, [kind.spec.name for kind in KINDS]):
                return None
            rows = [
                {
                    **row,
                    **{name: tuple(row[name]) for name in _BY_KIND},
                    "chunks": tuple(Chunk(*c) for c in row["chunks"]),
                }
                for row in raw["observations"]
            ]
            stored = cls(model, [Observation(seconds=row.pop("seconds"), load=StepLoad(**row)) for row in rows])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return stored if stored.is_fitted else None
