"""The two numbers by which training curves are reported: RAT and OMS.

Source: Efficient Diffusion Policies (Kang et al. 2023). A single late evaluation is noisy, and the best of many is
optimistic; they are different quantities and never to be compared with one another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lit_diffrl.errors import check_range


class RunningScores:
    """The evaluations of a training run, in order.

    ``rat`` (running average at training) is the mean of the last ``window`` evaluations, or of all while there are
    fewer; ``oms`` (online model selection) is the best evaluation so far.

    Args:
        window: Evaluations that RAT averages (10 in the paper).
    """

    def __init__(self, window: int = 10) -> None:
        check_range("rat_window", window, 1)
        self.window = window
        self.history: list[tuple[int, float]] = []

    def add(self, epoch: int, value: float) -> None:
        """Append the evaluation after an epoch; one repeated after a resume replaces its old value."""
        self.history = [entry for entry in self.history if entry[0] < epoch] + [(int(epoch), float(value))]

    @property
    def last(self) -> float:
        """Latest evaluation."""
        return self.history[-1][1]

    @property
    def rat(self) -> float:
        """Mean of the last ``window`` evaluations."""
        recent = [value for _, value in self.history[-self.window :]]
        return sum(recent) / len(recent)

    @property
    def oms(self) -> float:
        """Best evaluation."""
        return max(value for _, value in self.history)

    @property
    def best_epoch(self) -> int:
        """Epoch of the best evaluation, the earliest of equals."""
        return next(epoch for epoch, value in self.history if value == self.oms)

    def rows(self, unit: str) -> list[tuple[str, str]]:
        """The evaluations in figures, for the end of a run; none without evaluations."""
        if not self.history:
            return []
        return [
            (f"{unit}, last", f"{self.last:.2f} (epoch {self.history[-1][0]})"),
            (f"{unit}, best (OMS)", f"{self.oms:.2f} (epoch {self.best_epoch})"),
            (f"{unit}, last {min(self.window, len(self.history))} (RAT)", f"{self.rat:.2f}"),
        ]

    def state_dict(self) -> dict[str, Any]:
        """The history in plain types."""
        return {"epochs": [e for e, _ in self.history], "values": [v for _, v in self.history]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved history (RAT's window stays this object's own)."""
        self.history = [(int(e), float(v)) for e, v in zip(state["epochs"], state["values"])]
