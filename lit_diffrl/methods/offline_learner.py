"""What all learners over transitions share: twin critics with targets, one phase, and acting."""

from __future__ import annotations

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lit_diffrl.data.normalizers import normalizer_from_state
from lit_diffrl.data.spec import DatasetSpec
from lit_diffrl.data.transitions import PolicyBatch, TransitionData
from lit_diffrl.errors import ConfigError
from lit_diffrl.methods.base import Method, Phase
from lit_diffrl.methods.losses import choose_candidates, indecision, max_backup
from lit_diffrl.methods.policy_options import CriticOptions, SelectionOptions
from lit_diffrl.nets.critics import TwinQ
from lit_diffrl.nets.ema import EMA


class OfflineLearner(Method):
    """A method of one phase, ``policy``, over batches of transitions.

    Attributes:
        critic: Twin critics.
        target_critic: Their slowly following copy, ``target_critic.net``.
    """

    critic_options: CriticOptions
    critic: TwinQ
    target_critic: EMA
    policy_epochs: int
    updates: Tensor
    _indecision: Tensor | float = 0.0  # sum and number of the choices of an evaluation

    @property
    def phases(self) -> list[Phase]:
        """The only one."""
        return [Phase("policy", self.policy_epochs, "transitions")]

    @property
    def policy_epoch(self) -> int:
        """Epochs of the policy's phase that are done: others, of models, come before it."""
        return self.current_epoch - sum(phase.epochs for phase in self.phases if phase.name != "policy")

    def build(self, spec: DatasetSpec) -> None:
        """Set the normalisers; subclasses add their networks."""
        super().build(spec)
        self.obs_normalizer = normalizer_from_state(spec.obs_normalizer)
        self.action_normalizer = normalizer_from_state(spec.action_normalizer)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def setup(self, stage: str) -> None:
        """Build the networks, and refuse a data module that draws something else than transitions."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, TransitionData):
            raise ConfigError(
                f"{type(self).__name__} learns from transitions: --data TransitionData, got {type(data).__name__}"
            )
        super().setup(stage)

    @property
    def acts_by_gradient(self) -> bool:
        """No: policies are asked, not differentiated, and guidance that asks autograd leaves inference mode itself."""
        return False

    @property
    def can_act(self) -> bool:
        """Whether there has been an update."""
        return self.spec is not None and int(self.updates) > 0

    def build_critics(self, spec: DatasetSpec, every: int = 1) -> None:
        """Make the twin critics and their targets.

        These move at every ``every``-th update, or at every ``critic.target_every``-th of those.
        """
        o = self.critic_options
        self.critic = TwinQ(
            spec.obs_dim,
            spec.action_dim,
            hidden=o.hidden,
            layers=o.layers,
            activation=o.activation,
            layer_norm=o.layer_norm,
            first_tanh=o.first_tanh,
            orthogonal=o.orthogonal,
        )
        self.target_critic = EMA(self.critic, 1 - o.tau, every=every * o.target_every, start=0)

    def refuse_max_backup(self) -> None:
        """For learners whose target has no draws of a policy to take the best of."""
        count = self.critic_options.backup_candidates
        if count > 1:
            raise ConfigError(
                f"model.critic.backup_candidates is {count}, but {type(self).__name__} draws no actions for its target "
                "that the best could be taken of; use 1, or another learner"
            )

    def critic_optimizer(self, net: nn.Module | None = None) -> Optimizer:
        """AdamW over both critics, or over the ``net`` of state values that learns beside them.

        It works entry by entry, so this is one optimizer for each critic.
        """
        o = self.critic_options
        return AdamW((net or self.critic).parameters(), lr=o.lr, weight_decay=o.weight_decay, fused=True)

    def clip_critics(self, optimizer: LightningOptimizer) -> Tensor:
        """Measure the norm of the critics' gradient and shorten it to ``critic.grad_clip``, each critic's or both's.

        Returns:
            The norm of both before clipping.
        """
        o = self.critic_options
        if o.grad_clip is None or not o.clip_each:
            return self.clip_gradients_of(optimizer, o.grad_clip)
        norm, scale = self.clip_gradients_of(optimizer), self.loss_scale
        gradients = [p.grad for p in self.critic.parameters() if p.grad is not None]
        norms = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()  # (critics,)
        norms = norms if scale is None else norms / scale
        factor = (o.grad_clip / (norms.nan_to_num(nan=0.0, posinf=0.0) + 1e-6)).clamp_max(1.0)
        for g in gradients:
            g.mul_(factor.view(-1, *[1] * (g.dim() - 1)))
        return norm

    def descend(
        self, optimizer: LightningOptimizer, loss: Tensor, name: str, batch: PolicyBatch, limit: float | None = None
    ) -> Tensor:
        """One guarded step down a loss.

        Args:
            optimizer: Of the parameters that step; the gradients of others are left as they are.
            loss: Scalar.
            name: What the loss and its gradient are called; those of ``critic`` are clipped by :meth:`clip_critics`.
            batch: What the loss was computed from.
            limit: Largest norm of the gradient; None for no limit.

        Returns:
            The gradient's norm before clipping.
        """
        optimizer.zero_grad()
        self.manual_backward(loss)
        norm = self.clip_critics(optimizer) if name == "critic" else self.clip_gradients_of(optimizer, limit)
        self.guard({f"loss/{name}": loss}, {f"grad_norm/{name}": norm}, batch)
        optimizer.step()
        return norm

    @torch.no_grad()
    def diagnose(self, batch: PolicyBatch) -> dict[str, float]:
        """The largest value that the critics give to the batch, if there are critics."""
        critic = getattr(self, "critic", None)
        return {} if critic is None else {"max |Q|": float(critic(batch.obs, batch.action).abs().max())}

    @torch.no_grad()
    def least_q(self, obs: Tensor, action: Tensor, *, target: bool = False) -> Tensor:
        """The least of the critics, ``(B,)`` or ``(B, N)`` for candidates ``(B, N, A)``."""
        critic = self.target_critic.net if target else self.critic
        return critic(obs, action).min(dim=0).values  # type: ignore[no-any-return]

    @torch.no_grad()
    def backup(self, next_obs: Tensor, action: Tensor) -> Tensor:
        """Value ``(B,)`` of next states: the least target critic at the action ``(B, A)``.

        Of ``critic.backup_candidates`` actions ``(B, M, A)`` each critic takes its best first (max-Q backup).
        """
        q = self.target_critic.net(next_obs, action)
        return max_backup(q, self.critic_options.backup_top_k) if q.dim() == 3 else q.amin(dim=0)

    def softmax_of_all(self, x: Tensor) -> Tensor:
        """Softmax of ``x (B,)`` over the rows of all processes, without gradient: all of them together sum to 1."""
        x = x.detach()
        rows = x if self._trainer is None else self.trainer.strategy.all_gather(x)
        return (x - rows.flatten().logsumexp(dim=0)).exp()

    def select(self, obs: Tensor, actions: Tensor, rows: list[int], options: SelectionOptions) -> Tensor:
        """Choose among candidates by the least of the critics (EDP, section 4.5).

        Args:
            obs: ``(n, obs_dim)`` normalised.
            actions: ``(n, N, action_dim)`` N candidates for each state.
            rows: Index of each row's noise stream.
            options: Which critics, and how greedily.

        Returns:
            ``(n, action_dim)``.
        """
        q = self.least_q(obs, actions, target=options.critic == "target")
        uniform = torch.special.ndtr(self.row_noise(rows, (1,))[:, 0])
        index = choose_candidates(q, options.temperature, uniform)
        if self._trainer is not None:
            self._indecision = self._indecision + indecision(q, options.temperature)
        return actions[torch.arange(len(obs), device=obs.device), index]

    def on_validation_epoch_end(self) -> None:
        """Log how undecided the choices among candidates of this evaluation were, if there were any."""
        choices = torch.zeros(2, dtype=torch.float64, device=self.device) + self._indecision
        total, count = self.trainer.strategy.reduce(choices, reduce_op="sum").tolist()  # type: ignore[union-attr]
        self._indecision = 0.0
        if count > 0:
            self.log("eval/indecision", total / count, sync_dist=True)

    def on_test_epoch_end(self) -> None:
        """As after a validation."""
        self.on_validation_epoch_end()

    def choose_action(self, state: Tensor, goal: Tensor | None, rows: list[int]) -> Tensor:
        """Normalise, decide, and map the action back to the environment's units."""
        return self.action_normalizer.unnormalize(self.decide(self.obs_normalizer.normalize(state), rows))

    def propose(self, obs: Tensor) -> Tensor:
        """The policy's own action for training: no choice among candidates, and noise from the update's draws.

        Args:
            obs: ``(B, obs_dim)`` normalised.

        Returns:
            ``(B, action_dim)`` in [-1, 1].
        """
        return self.decide(obs, [])

    def draw_action(self, obs: Tensor) -> Tensor:
        """A draw of the policy with noise from the update's draws, where :meth:`propose` may take its mean."""
        return self.propose(obs)

    def decide(self, obs: Tensor, rows: list[int]) -> Tensor:
        """Choose actions; while acting in inference mode, unless ``acts_by_gradient`` says that autograd is asked.

        Args:
            obs: ``(n, obs_dim)`` normalised.
            rows: Index of each row's noise stream.

        Returns:
            ``(n, action_dim)`` in [-1, 1].
        """
        raise NotImplementedError
