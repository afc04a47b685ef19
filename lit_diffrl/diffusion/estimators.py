"""Estimates of the clean sample from which a training example was noised, for losses on the denoised sample.

Either the one-step estimate (Tweedie's formula, the network's clean prediction: the mean of the reverse chain
if the network is optimal) or a sum of k predictions as in DMEMM's Eq. 8 (see
:mod:`lit_diffrl.diffusion.chains`), which can be computed in several ways. With k network evaluations F per
sample and backward passes of 2 F:

* ``exact_batched``: all rows in one call; cost 3 k F, k activations alive;
* ``checkpointed``: chunks recomputed in the backward pass; cost 4 k F, one chunk of activations;
* ``monte_carlo``: m sampled terms; cost 3 m F, m activations; estimate unbiased, a quadratic loss biased;
* ``exact_two_pass``: :func:`backward_two_pass`; cost 4 k F, one chunk of activations and no graph in between;
* ``two_pass_mc``: the same with m sampled terms in the second pass; cost (k + 3 m) F; gradient unbiased.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lit_diffrl.diffusion.chains import CHAINS, Chain
from lit_diffrl.diffusion.schedules import Schedule
from lit_diffrl.errors import check_choice, check_range

Predict = Callable[[Tensor, Tensor], Tensor]

ESTIMATES = ("tweedie", *CHAINS)
COMPUTES = ("exact_batched", "checkpointed", "monte_carlo")
TWO_PASS_COMPUTES = ("exact_two_pass", "two_pass_mc")


def estimate(
    kind: str,
    predict: Predict,
    schedule: Schedule,
    x0: Tensor,
    k: Tensor,
    eps: Tensor,
    *,
    compute: str = "exact_batched",
    m: int = 4,
    chunk: int = 256,
    generator: torch.Generator | None = None,
    x0_hat_k: Tensor | None = None,
    given: Tensor | None = None,
) -> Tensor:
    """Estimate of the clean sample, differentiable with respect to the network behind ``predict``.

    Args:
        kind: ``tweedie``, ``chain_paper``, ``chain_ddim`` or ``chain_bridge``.
        predict: ``(x_i (R, ...), i (R,)) -> xhat_i (R, ...)``, the clean prediction.
        schedule: Noise schedule.
        x0: Clean sample ``(B, ...)``.
        k: Diffusion step of each sample, int64 ``(B,)``, in ``1..K``.
        eps: Noise at step k, like ``x0``.
        compute: How a chain is summed: ``exact_batched``, one call on all rows; ``checkpointed``, the same in
            chunks that are recomputed in the backward pass; ``monte_carlo``, ``m`` sampled terms per sample
            (unbiased, but a loss that is quadratic in the estimate gains a variance term).
        m: Sampled terms of ``monte_carlo``.
        chunk: Rows per call of ``checkpointed``.
        generator: Source of randomness for sampled terms and ``chain_bridge``.
        x0_hat_k: The prediction at step k where it is known already: it is not evaluated again, which leaves
            ``k - 1`` terms of a chain and no call at all for ``tweedie``.
        given: Boolean mask broadcastable to one sample; these entries are fed to the network clean
            (conditions).

    Returns:
        The estimate like ``x0``, in float32 or better.

    Raises:
        ConfigError: For an unknown kind or ``compute``, or ``m`` or ``chunk`` below 1.
    """
    check_choice("x0 estimate", kind, ESTIMATES)
    check_choice("chain.compute", compute, COMPUTES)
    check_range("chain.m", m, 1)
    check_range("chain.chunk", chunk, 1)
    if kind == "tweedie":
        if x0_hat_k is None:
            x_k = schedule.q_sample(x0, k, eps)
            x0_hat_k = predict(x_k if given is None else torch.where(given, x0, x_k), k)
        return x0_hat_k.to(torch.promote_types(x0.dtype, torch.float32))

    chain = Chain(kind, schedule, x0, k, eps, x0_hat_k is not None, given, generator)
    total = chain.start if x0_hat_k is None else chain.start + chain.shared_term(x0_hat_k)
    rows = chain.drawn_rows(m, generator) if compute == "monte_carlo" else chain.all_rows()
    for part in rows.split(chunk if compute == "checkpointed" else max(1, len(rows.owner))):
        if compute == "checkpointed":
            x0_hat = checkpoint(lambda p=part: predict(chain.inputs(p), p.step), use_reentrant=False)
        else:
            x0_hat = predict(chain.inputs(part), part.step)
        total = total.index_add(0, part.owner, chain.terms(part, x0_hat))
    return total


def backward_two_pass(
    kind: str,
    predict: Predict,
    schedule: Schedule,
    x0: Tensor,
    k: Tensor,
    eps: Tensor,
    loss_fn: Callable[[Tensor], Tensor],
    *,
    backward: Callable[[Tensor], None],
    compute: str = "exact_two_pass",
    m: int = 4,
    chunk: int = 256,
    generator: torch.Generator | None = None,
    x0_hat_k: Tensor | None = None,
    given: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Backpropagate a loss on a chain estimate while only one chunk of activations is alive.

    The first pass, without gradients, computes the exact estimate and ``G``, the gradient of the loss with
    respect to it. The second pass calls ``backward`` on ``<G, w_i xhat_i>`` chunk by chunk; these add up to
    the gradient of the loss. Parameters of ``loss_fn`` receive none. The number of calls of ``backward``
    depends on ``k``: with several processes, average gradients only after the last of them.

    Args:
        kind: ``chain_paper``, ``chain_ddim`` or ``chain_bridge``.
        predict: As for :func:`estimate`.
        schedule: Noise schedule.
        x0: Clean sample ``(B, ...)``.
        k: Diffusion step of each sample, int64 ``(B,)``.
        eps: Noise at step k, like ``x0``.
        loss_fn: Estimate like ``x0`` -> scalar loss, weights included.
        backward: Accumulates the gradient of a scalar, e.g. a LightningModule's ``manual_backward``.
        compute: ``exact_two_pass``, or ``two_pass_mc``: the second pass on ``m`` sampled terms per sample, an
            unbiased gradient.
        m: Sampled terms of ``two_pass_mc``.
        chunk: Rows per call of ``predict``.
        generator: Source of randomness for sampled terms and ``chain_bridge``.
        x0_hat_k: The prediction at step k with its graph, where it is known already.
        given: Boolean mask of entries fed to the network clean.
        scale: Factor of the loss in its own backward pass, for a ``loss_fn`` with networks in float16: small gradients
            would vanish there. The result does not have it.

    Returns:
        A scalar with the value of the loss. Its own gradient is the share that flows through ``x0_hat_k``,
        which has not been propagated: add it to the loss that ``x0_hat_k`` was computed for and backpropagate
        the sum.

    Raises:
        ConfigError: For an unknown kind or ``compute``, or ``m`` or ``chunk`` below 1.
    """
    check_choice("x0 estimate (two passes)", kind, CHAINS)
    check_choice("chain.compute", compute, TWO_PASS_COMPUTES)
    check_range("chain.m", m, 1)
    check_range("chain.chunk", chunk, 1)
    chain = Chain(kind, schedule, x0, k, eps, x0_hat_k is not None, given, generator)
    rows = chain.all_rows()
    with torch.no_grad():
        total = chain.start if x0_hat_k is None else chain.start + chain.shared_term(x0_hat_k)
        for part in rows.split(chunk):
            total = total.index_add(0, part.owner, chain.terms(part, predict(chain.inputs(part), part.step)))
    total.requires_grad_()
    loss = loss_fn(total)
    (gradient,) = torch.autograd.grad(loss if scale is None else loss * scale, total)
    if scale is not None:
        gradient = gradient / scale

    if compute == "two_pass_mc":
        rows = chain.drawn_rows(m, generator)
    for part in rows.split(chunk):
        x0_hat = predict(chain.inputs(part), part.step)
        backward((gradient[part.owner] * chain.terms(part, x0_hat)).sum())
    if x0_hat_k is None:
        return loss.detach()
    through_k = (gradient * chain.shared_term(x0_hat_k)).sum()
    return loss.detach() + through_k - through_k.detach()
