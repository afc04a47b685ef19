"""The equations of QGPO and AEPO as plain functions of tensors.

Sources: AEPO (Hu et al. 2025), equations by number; CEP, whose method for control is QGPO (Lu et al. 2023).

The energy of a noisy action is ``E_t(s, a_t) = log E[exp(beta Q(s, a_0)) | a_t]``, the expectation over the behaviour's
posterior of the clean action. It is a log-partition: larger is better, and the guided score adds its gradient. Any
function of state and time may be added to it. A quantity "of the posterior" below is one of that distribution.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_diffrl.diffusion.vp_sde import VPSDE, over_rows
from lit_diffrl.errors import ConfigError

# ---------------------------------------------------------------- AEPO: the analytic energy


def expansion_point(action: Tensor, grad: Tensor, eta: float, *, normalized: bool = False) -> Tensor:
    """Where Q is expanded (Eq. 46): ``a_0 + eta grad Q(a_0)``, a step up from the action that was noised.

    Args:
        action: ``(B, A)``.
        grad: Gradient of Q there, like ``action``.
        eta: Size of the step.
        normalized: Take the gradient's direction only, so that ``eta`` is the length of the step.
    """
    if normalized:
        grad = grad / grad.norm(dim=-1, keepdim=True).clamp_min(1e-8)
    return action + eta * grad


def linear_energy(q_bar: Tensor, grad: Tensor, mu: Tensor, a_bar: Tensor, spread: Tensor, beta: float) -> Tensor:
    """The energy of a Q that is linear around ``a_bar`` under a Gaussian posterior (Eq. 17).

    ``beta Q(a_bar) + beta g.(mu - a_bar) + beta^2 / 2 g^T Sigma g``: exact if Q is linear, and then the same for any
    ``a_bar``. For a concave Q expanded at ``mu`` the gradient turns round where ``beta |Q''|`` times the posterior's
    variance exceeds 1.

    Args:
        q_bar: ``(B,)`` Q at ``a_bar``.
        grad: ``(B, A)`` its gradient g with respect to the action there.
        mu: ``(B, A)`` mean of the posterior.
        a_bar: ``(B, A)`` where Q was expanded.
        spread: ``(B,)`` variance ``g^T Sigma g`` of g.a_0 under the posterior.
        beta: Inverse temperature.

    Returns:
        ``(B,)``.
    """
    return beta * (q_bar + (grad * (mu - a_bar)).sum(-1)) + 0.5 * beta**2 * spread


def analytic_energy(q_bar: Tensor, grad: Tensor, mu: Tensor, a_bar: Tensor, var: Tensor, beta: float) -> Tensor:
    """AEPO's energy (Eq. 25): :func:`linear_energy` where the posterior's variance ``var (B,)`` has no direction."""
    return linear_energy(q_bar, grad, mu, a_bar, var * grad.square().sum(-1), beta)


def two_cumulant_energy(q: Tensor, grad: Tensor, var: Tensor, beta: float) -> Tensor:
    """``beta Q(a_0) + beta^2 / 2 var |grad Q(a_0)|^2``, a target that needs no mean of the posterior.

    Regressed on the noisy action, its first term becomes the first cumulant of Q exactly, and its second the delta
    method's second. An error of the noise network is not multiplied by ``sigma / alpha``.

    Args:
        q: ``(B,)`` Q at the action that was noised.
        grad: ``(B, A)`` its gradient there.
        var: ``(B,)`` variance of the posterior.
        beta: Inverse temperature.
    """
    return beta * q + 0.5 * beta**2 * var * grad.square().sum(-1)


def second_order_energy(
    q_bar: Tensor,
    grad: Tensor,
    hessian: Tensor,
    mu: Tensor,
    a_bar: Tensor,
    cov: Tensor,
    beta: float,
    limit: float = 0.9,
) -> Tensor:
    """The energy of a Q that is quadratic around ``a_bar`` under a Gaussian posterior, where it is exact.

    With ``delta = mu - a_bar``, ``Sigma = L L^T``, ``X = beta L^T H L`` and ``c = L^T (g + H delta)`` it is

        beta (Q + g.delta + delta.H delta / 2) + beta^2 / 2 c^T (I - X)^-1 c - log det(I - X) / 2

    A critic of ReLUs has no second derivative: the result is then that of first order.

    Args:
        q_bar: ``(B,)`` Q at ``a_bar``.
        grad: ``(B, A)`` its gradient g there.
        hessian: ``(B, A, A)`` its second derivative H there.
        mu: ``(B, A)`` mean of the posterior.
        a_bar: ``(B, A)`` where Q was expanded.
        cov: Covariance of the posterior: ``(B, A, A)``, or ``(B,)`` if it is the same in all directions.
        beta: Inverse temperature.
        limit: Largest eigenvalue of X, others are held there; the expectation is infinite from 1 on.

    Returns:
        ``(B,)``.
    """
    with torch.autocast(grad.device.type, enabled=False):
        # 16 bits are too few for the products, and logdet has no such kernel
        if cov.dim() == 1:
            root = cov.clamp_min(0).sqrt()[:, None, None] * torch.eye(
                grad.shape[-1], dtype=cov.dtype, device=cov.device
            )
        else:  # no Cholesky factor: some directions may have no variance
            variances, axes = torch.linalg.eigh(cov)
            root = axes * variances.clamp_min(0).sqrt().unsqueeze(-2)
        delta = mu - a_bar
        bent = (hessian @ delta.unsqueeze(-1)).squeeze(-1)
        x = beta * root.mT @ hessian @ root
        # By projection, since eigenvalues have no derivative where they coincide, as those of a flat Q do
        h, basis = torch.linalg.eigh(x.detach())
        free = (basis * (h <= limit).unsqueeze(-2).to(h.dtype)) @ basis.mT
        identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        rest = identity - free @ x @ free - limit * (identity - free)
        c = root.mT @ (grad + bent).unsqueeze(-1)
        at_mu = q_bar + (delta * (grad + 0.5 * bent)).sum(-1)
        quadratic = (c * torch.linalg.solve(rest, c)).sum((-2, -1))
        return beta * at_mu + 0.5 * beta**2 * quadratic - 0.5 * torch.logdet(rest)


def curved_energy(
    q_bar: Tensor,
    grad: Tensor,
    mu: Tensor,
    a_bar: Tensor,
    var: Tensor,
    curvature: Tensor,
    beta: float,
    limit: float = 0.9,
) -> Tensor:
    """The second order along the gradient alone, for the price of one Hessian-vector product; at ``a_bar = mu`` exact
    for a quadratic Q of one action.

    Args:
        q_bar: ``(B,)`` Q at ``a_bar``.
        grad: ``(B, A)`` its gradient g there.
        mu: ``(B, A)`` mean of the posterior.
        a_bar: ``(B, A)`` where Q was expanded.
        var: ``(B,)`` variance of the posterior.
        curvature: ``(B,)`` ``g^T H g``.
        beta: Inverse temperature.
        limit: Largest ``x = beta var g^T H g / |g|^2``.

    Returns:
        ``(B,)``.
    """
    square = grad.square().sum(-1)
    rest = 1 - (beta * var * curvature / square.clamp_min(1e-12)).clamp_max(limit)
    return linear_energy(q_bar, grad, mu, a_bar, var * square / rest, beta) - 0.5 * rest.log()


# ---------------------------------------------------------------- QGPO


def isql_value(q: Tensor, beta_q: float) -> Tensor:
    """In-support softmax value of a state: the mean of Q over support actions, weighted by ``softmax(beta_q Q)``.

    Args:
        q: ``(..., K)`` values of K actions of the behaviour.
        beta_q: 0 is the mean, infinity the best.

    Returns:
        ``(...)``.
    """
    return ((beta_q * q).softmax(-1) * q).sum(-1)


def cep_loss(f: Tensor, q: Tensor, beta: float, *, self_normalise: bool = True) -> Tensor:
    """Contrastive energy prediction: cross-entropy between ``softmax(beta Q)`` of K actions and ``softmax(f)``.

    With many actions f becomes the exact energy up to a function of state and time; with few, labels that are
    normalised over them give too little guidance (K = 16, ``beta dQ/da = 4.5``, t = 0.3: 0.70 instead of 1.01).

    Args:
        f: ``(B, K)`` energies of the noised support actions, all of a state at one time.
        q: ``(B, K)`` values of the clean ones.
        beta: Inverse temperature.
        self_normalise: Otherwise labels are ``exp(beta q) / K``: unbiased, but take a baseline from q before.
    """
    if not f.shape == q.shape:
        raise ConfigError(f"f and q must have one shape (states, actions), got {tuple(f.shape)} and {tuple(q.shape)}")
    logits = beta * q.detach()
    labels = logits.softmax(-1) if self_normalise else logits.exp() / q.shape[-1]
    return -(labels * f.log_softmax(-1)).sum(-1).mean()


def energy_mse_loss(f: Tensor, q: Tensor, beta: float) -> Tensor:
    """``mean (f - beta Q)^2``: f becomes ``beta E[Q | a_t]``, which is below the energy and tilted otherwise.

    Args:
        f: Energies of noised actions, any shape.
        q: Values of the clean ones, like ``f``.
        beta: Inverse temperature.
    """
    return (f - beta * q.detach()).square().mean()


def energy_emse_loss(f: Tensor, q: Tensor, beta: float) -> Tensor:
    """``mean (exp f - exp(beta Q))^2``, whose minimum is the exact energy; large values of Q alone count.

    Args:
        f: Energies of noised actions, any shape. Shift q so that it is 0 at its best: exponents above 4.5 are cut off.
        q: Values of the clean ones, like ``f``.
        beta: Inverse temperature.
    """
    return (f.clamp(-100, 4.5).exp() - (beta * q.detach()).clamp(-100, 4.5).exp()).square().mean()


def monte_carlo_energy(
    a_t: Tensor, t: Tensor, actions: Tensor, q: Tensor, sde: VPSDE, beta: float
) -> tuple[Tensor, Tensor]:
    """Energy and gradient from support actions, consistent in their number; bad where t is small and they are few.

    With ``w_i ~ N(a_t; alpha a^i, sigma^2 I)`` and ``p_i ~ w_i exp(beta Q_i)``, both normalised: ``E = log sum w_i
    exp(beta Q_i)`` and ``grad E = alpha / sigma^2 (sum p_i a^i - sum w_i a^i)``.

    Args:
        a_t: ``(B, A)`` noisy actions.
        t: ``(B,)`` their times.
        actions: ``(B, M, A)`` actions of the behaviour in the same states.
        q: ``(B, M)`` their values.
        sde: The schedule.
        beta: Inverse temperature.

    Returns:
        ``(B,)`` and ``(B, A)``.
    """
    log_w = support_log_weights(a_t, t, actions, sde)
    tilted = log_w + beta * q
    shift = (tilted.softmax(-1) - log_w.exp()).unsqueeze(-1) * actions
    t = over_rows(t, a_t)  # (B, 1)
    return tilted.logsumexp(-1), sde.alpha(t) / sde.sigma(t).square() * shift.sum(1)


def support_log_weights(a_t: Tensor, t: Tensor, actions: Tensor, sde: VPSDE) -> Tensor:
    """Logarithms ``(B, M)`` of support actions' shares in what became ``a_t``; as :func:`monte_carlo_energy`."""
    t = over_rows(t, a_t)  # (B, 1)
    distance = (a_t.unsqueeze(1) - sde.alpha(t).unsqueeze(-1) * actions).square().sum(-1)
    return (-0.5 * distance / sde.sigma(t).square()).log_softmax(-1)
