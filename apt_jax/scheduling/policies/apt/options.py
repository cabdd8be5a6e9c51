"""Options of the adaptive policies, set as `apt:name=value`."""

from dataclasses import dataclass

from apt_jax.ranges import check_finite

VALUES = ("pending", "absolute", "slack", "footprint", "longest")
FALLBACKS = ("aging", "constant", "none")


@dataclass(frozen=True)
class AptOptions:
    """Options of `apt`.

    Attributes:
        value: of serving a request now. pending: time since its last token, in units of its SLO. absolute: the same
            in seconds (the paper's). slack: 1 / (what is left of the SLO). footprint: pending, per block and
            predicted iteration instead of per block. longest: pending, whatever memory the request takes.
        fallback: what becomes of late requests. aging: demoted, with a bounded wait. constant: demoted (the
            paper's). none: nothing.
        mixed: allow iterations that decode and prefill.
        prediction: use predicted output lengths.
        convert: convert hidden caches to KV where that pays.
        sustained: where hidden is slower than KV, use it only if the batch still gains tokens per second.
        margin: standard deviations of the predicted blocks that stay free when a request in time is admitted.
        late_margin: the same for a late request.
        readmit_first: a preempted request that can still be kept goes before newcomers.
        paced: compute the most urgent prompts first, and no more of them than is free or needed (`budget.py`).
        fit_victims: preempt the smallest late request that gives enough; off: the largest ones first.
        priorities: the value of a request counts by its priority.
        patience_s: time in the system after which a late request queues for the lane.
        lane_share: share of the blocks, and of the seats, that the lane may fill.
        fetch: pages come back from host memory beside an iteration, after which their request goes on.

    Raises:
        ValueError: a value is unknown or out of range.
    """

    value: str = "pending"
    fallback: str = "aging"
    mixed: bool = True
    prediction: bool = True
    convert: bool = True
    sustained: bool = True
    margin: float = 1.0
    late_margin: float = 2.0
    readmit_first: bool = True
    paced: bool = True
    fit_victims: bool = True
    priorities: bool = True
    patience_s: float = 20.0
    lane_share: float = 0.05
    fetch: bool = True

    def __post_init__(self) -> None:
        check_finite(self)
        for name, known in (("value", VALUES), ("fallback", FALLBACKS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(known)}")
        if not self.patience_s >= 0 or not 0 <= self.lane_share <= 1:
            raise ValueError(f"patience_s={self.patience_s} must be >= 0 and lane_share={self.lane_share} in 0..1")
        if not self.margin >= 0 or not self.late_margin >= 0:
            raise ValueError(f"margin={self.margin} and late_margin={self.late_margin} must be >= 0 deviations")


@dataclass(frozen=True)
class PaperOptions(AptOptions):
    """The original: pending seconds, constant fallback, alternating iterations, and none of the additions."""

    value: str = "absolute"
    fallback: str = "constant"
    mixed: bool = False
    prediction: bool = False
    convert: bool = False
    sustained: bool = False
    readmit_first: bool = False
    paced: bool = False
    fit_victims: bool = False
    priorities: bool = False
    fetch: bool = False
