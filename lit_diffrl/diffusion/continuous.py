"""A discrete noise schedule read as one in continuous time, for solvers of the probability-flow ODE.

Source: DPM-Solver (Lu et al. 2022, section 3.4 and appendix D.4), type-1 discrete models.
"""

from __future__ import annotations

import math
from bisect import bisect_left

from lit_diffrl.diffusion.schedules import Schedule
from lit_diffrl.errors import ConfigError, check_range


class LogSNR:
    """``log alpha(t)``, piecewise linear through ``log signal_k`` at ``t = k / K``, and what follows from it.

    Here ``alpha(t)`` is the signal's factor (not the schedule's ``alpha``), ``sigma(t)`` the noise's, and
    ``lambda(t) = log alpha(t) - log sigma(t)`` falls from the data (small t) to the noise (t = 1). Before the first
    and after the last knot the nearest line is continued. Numbers are Python floats: a grid is computed once.
    """

    def __init__(self, schedule: Schedule) -> None:
        """Take the knots of a schedule.

        Args:
            schedule: At least two diffusion steps.

        Raises:
            ConfigError: For a single step, through which no line is defined.
        """
        check_range("diffusion steps K of a continuous schedule", schedule.num_steps, 2)
        self.kind, self.num_steps = schedule.kind, schedule.num_steps
        steps = range(1, schedule.num_steps + 1)
        self._t = [k / schedule.num_steps for k in steps]
        self._log_alpha = [math.log(schedule.value("signal", k)) for k in steps]

    def log_alpha(self, t: float) -> float:
        """Log of the signal's factor at time t.

        Raises:
            ConfigError: Where the continued line would reach 0: more signal than clean data has.
        """
        value = _interpolate(t, self._t, self._log_alpha)
        if not value < 0:
            raise ConfigError(
                f"time {t:g} lies too far before the first step of the {self.kind} schedule with K = "
                f"{self.num_steps}, where its signal would exceed clean data; end at t_end = 1/K = "
                f"{1 / self.num_steps:g}"
            )
        return value

    def alpha(self, t: float) -> float:
        """Factor of the signal at time t."""
        return math.exp(self.log_alpha(t))

    def sigma(self, t: float) -> float:
        """Factor of the noise at time t: ``sqrt(1 - alpha(t)^2)``."""
        return math.sqrt(-math.expm1(2 * self.log_alpha(t)))

    def lambda_(self, t: float) -> float:
        """Half the log of the signal-to-noise ratio at time t."""
        return self.log_alpha(t) - math.log(self.sigma(t))

    def inverse_lambda(self, value: float) -> float:
        """The time at which ``lambda_`` has a value."""
        softplus = max(-2 * value, 0.0) + math.log1p(math.exp(-2 * abs(value)))
        return _interpolate(-0.5 * softplus, self._log_alpha[::-1], self._t[::-1])

    def net_input(self, t: float) -> float:
        """What the network was fed for time t in training: its 0-based index ``K t - 1``, real between the steps.

        Rounded to a billionth, so that a step is an integer to the last bit.
        """
        return round(self.num_steps * t - 1, 9)


def _interpolate(x: float, xs: list[float], ys: list[float]) -> float:
    """The piecewise-linear function through points with increasing ``xs``, continued at both ends."""
    right = min(max(bisect_left(xs, x), 1), len(xs) - 1)
    x0, x1, y0, y1 = xs[right - 1], xs[right], ys[right - 1], ys[right]
    share = (x - x0) / (x1 - x0)
    return y1 if share == 1 else y0 + share * (y1 - y0)
