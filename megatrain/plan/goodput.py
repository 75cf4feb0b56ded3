"""How often to save where things fail, and how much of the time is then left for training.

Failures come at random, independently of each other, M seconds apart in the mean for the whole job; they may happen
during a save or a restart too. After tau seconds of training come C seconds of saving; a failure costs what was done
since the last save, and R seconds of restarting. Then s seconds of training take in the mean

    s M exp(R / M) (exp((tau + C) / M) - 1) / tau

(J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", Future Generation Computer
Systems 22, 2006). The best tau is near sqrt(2 C M) (J. W. Young, "A first order approximation to the optimum checkpoint
interval", Communications of the ACM 17, 1974); here it is solved for exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_NUM_BISECTIONS = 100


@dataclass(frozen=True)
class Failures:
    """What goes wrong, and what it costs, in seconds.

    ``mtbf``: mean time between failures of the whole job. ``checkpoint``: training stands still for a save.
    ``restart``: from a failure until training goes on.
    """

    mtbf: float
    checkpoint: float
    restart: float

    @classmethod
    def of_nodes(cls, num_nodes: int, mtbf_hours_per_node: float, checkpoint: float, restart: float) -> Failures:
        """Of a job that fails when one of its nodes does."""
        return cls(mtbf_hours_per_node * 3600 / num_nodes, checkpoint, restart)


def best_interval(failures: Failures) -> float:
    """Seconds of training between two saves for the most goodput; 0 where a save costs nothing.

    The derivative of Daly's time is zero where (1 - y) exp(y) = exp(-C / M), y = tau / M in [0, 1).
    """
    cost = -math.expm1(-failures.checkpoint / failures.mtbf)  # 1 - exp(-C / M), and so below, without cancellation
    low, high = 0.0, 1.0
    for _ in range(_NUM_BISECTIONS):
        middle = (low + high) / 2
        if middle * math.exp(middle) - math.expm1(middle) < cost:
            low = middle
        else:
            high = middle
    return low * failures.mtbf if failures.checkpoint else 0.0


def goodput(failures: Failures, interval: float) -> float:
    """The share of all time that trains the model, with a save after each ``interval`` seconds of training."""
    if interval == 0.0:  # the limit, of saves that cost nothing
        return math.exp(-failures.restart / failures.mtbf) if failures.checkpoint == 0.0 else 0.0
    cycle = (interval + failures.checkpoint) / failures.mtbf
    log_of_expm1 = cycle if cycle > 50.0 else math.log(math.expm1(cycle))
    return math.exp(math.log(interval / failures.mtbf) - failures.restart / failures.mtbf - log_of_expm1)
