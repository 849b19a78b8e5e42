"""A simulated per-pair DPO loss for recorded pairs, which hold none: a stated model, not data.

DPO's loss of a pair is −log σ(β·margin), margin = log-ratio of the chosen response − of the rejected one (Rafailov et
al. 2023, arXiv 2305.18290, eq. 7), where "chosen" is what the asked RM preferred. The model:

    margin ~ N(s·m + g·t/T, w²),   loss = softplus(−β·margin),

s = +1 where the asked RM's verdict is right, −1 where it is wrong, 0 on a tie; t/T is how far training has come, so
that the losses drift down, as they do when a policy learns to fit its pairs. That right verdicts have the larger
margins is the assumption that makes the loss a signal at all; how much larger is `separation`, and is not measured from
anything. Results that rest on it must be called simulated. Called by `passes`, and by the replay over HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router_core.errors import HyperparameterError

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class SimulatedLoss:
    """Constants of the model.

    Attributes:
        separation: 2m/w, distance between the margins of right and wrong verdicts in standard deviations; 1 means that
            a single loss tells right from wrong 69 % of the time. Zero: no signal.
        beta: β of DPO; 0.1 is the default of its authors and of LASER's code.
        spread: w, in nats of log-ratio. β·w = 1: losses vary by a factor, as they do in training runs, not by orders.
        growth: g, in nats, over the whole stream: β·g = 1 takes the mean loss of right verdicts from 0.6 to 0.3.
    """

    separation: float = 1.0
    beta: float = 0.1
    spread: float = 10.0
    growth: float = 10.0

    def __post_init__(self) -> None:
        if not (0 <= self.separation < np.inf and 0 < self.beta < np.inf and 0 < self.spread < np.inf):
            raise HyperparameterError(
                f"simulated loss: separation {self.separation}, beta {self.beta}, spread {self.spread}: give finite "
                "numbers, separation at least 0, the others positive"
            )

    def losses(self, right: Array, progress: Array, noise: Array) -> Array:
        """softplus(−β·(s·m + g·progress + w·noise)), s = 2·right − 1.

        Args:
            right: (B,) in {0, 0.5, 1}: was the asked RM right.
            progress: (B,) in [0, 1), t/T.
            noise: (B,) standard normals; the same for every policy at the same place of the stream.

        Returns:
            (B,) positive float64.
        """
        mean = (2.0 * right - 1.0) * self.separation * self.spread / 2.0 + self.growth * progress
        losses: Array = np.logaddexp(0.0, -self.beta * (mean + self.spread * noise))
        return losses
