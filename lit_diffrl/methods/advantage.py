"""What CRR and EDP-CRR share: how good a data action is beside the policy's own, and the weight that it gets for it.

Sources: CRR (Wang et al. 2020, Eqs. 3 to 6); EDP (Kang et al. 2023, section 4.1) and its code.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from lit_diffrl.errors import check_choice, check_range
from lit_diffrl.methods.losses import crr_weights
from lit_diffrl.methods.offline_learner import OfflineLearner


class AdvantageWeighted(OfflineLearner):
    """A learner that clones the data's actions by the weight of their advantage."""

    def keep_weighting(
        self,
        weighting: Literal["exp", "indicator", "softmax"],
        advantage: Literal["mean", "max"],
        candidates: int,
        beta: float,
        bound: float,
    ) -> None:
        """Check and keep the arguments that both have."""
        check_choice("model.weighting", weighting, ("exp", "indicator", "softmax"))
        check_choice("model.advantage", advantage, ("mean", "max"))
        check_range("model.candidates", candidates, 1)
        check_range("model.beta", beta, 0, low_open=True, high_open=True)
        check_range("model.bound", bound, 0, low_open=True, high_open=True)
        self.weighting, self.advantage, self.candidates = weighting, advantage, candidates
        self.beta, self.bound = beta, bound

    def baseline(self, q: Tensor) -> Tensor:
        """What the policy's own actions are worth, ``(B,)``, from values ``(B, candidates)``: their mean or max."""
        return q.mean(dim=1) if self.advantage == "mean" else q.amax(dim=1)

    def weigh(self, advantage: Tensor) -> Tensor:
        """The weight ``(B,)`` of each data action, without gradient, from its advantage ``(B,)``.

        ``min(exp(A / beta), bound)``, ``1[A > 0]``, or the softmax of ``A / beta`` over the batch of all processes,
        which has no bound and a mean of one over the size of that batch (EDP's ``adv_norm``).
        """
        if self.weighting == "softmax":
            return self.softmax_of_all(advantage / self.beta)
        return crr_weights(advantage, self.weighting, self.beta, self.bound)
