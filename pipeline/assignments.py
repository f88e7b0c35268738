"""Assignments of a batch to learned classes: Self-Classifier, Sinkhorn, and how even they are."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGITS = 1 << 20  # in memory at a time


def uniform_prior_loss(rows: Tensor, weight: Tensor, row: float, column: float) -> Tensor:
    """Cross entropy of two views' class posteriors with a uniform prior over the classes (arXiv
    2103.10994, section 3.2, equation 5), averaged over pairs of views of which one is among the
    first two.

    `rows` [v, b, d] are embeddings, and their products with `weight` [k, d] the logits.  A view's
    target is p(x | y), a softmax over the batch at temperature `column`, normalized over the
    classes; the other view's prediction is p(y | x), a softmax over the classes at temperature
    `row`, normalized over the batch and times b / k.  In logarithms throughout, so nothing has to
    be added to keep them finite.
    """
    loss: Tensor = _UniformPrior.apply(rows, weight, row, column)
    return loss


class _UniformPrior(torch.autograd.Function):
    """Loss and gradient in three sweeps over blocks of classes, in memory O(v b d + k d).

    With logits z, targets t = softmax_k(y), y = z / column - lse_b(z / column), and predictions
    q = r - lse_b(r), r = z / row - lse_k(z / row), the loss is -Σ w_ij t_i q_j over views i and j,
    apart from a constant.  The first sweep sums over the classes what normalizes t and r, the
    second the loss and what the gradient needs of all classes, the third takes the gradient.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, row: float, column: float) -> Tensor:
        (v, b, _), k = rows.shape, len(weight)
        w = _pair_weights(v, b, rows)
        blocks = weight.split(max(1, LOGITS // (v * b)))

        def logits() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            for part in blocks:
                z = rows @ part.T  # [v, b, block], as all that follows
                y = z / column
                yield part, z.div_(row), y.sub_(y.logsumexp(1, keepdim=True))

        log_t, log_r = rows.new_full((2, v, b, 1), -torch.inf)
        for _, z, y in logits():
            torch.logaddexp(log_t, y.logsumexp(2, keepdim=True), out=log_t)
            torch.logaddexp(log_r, z.logsumexp(2, keepdim=True), out=log_r)

        def terms() -> Iterator[tuple[Tensor, ...]]:
            for part, z, y in logits():
                r, t = z - log_r, (y - log_t).exp_()
                q = r - r.logsumexp(1, keepdim=True)
                by_t, by_q = -_mixed(w, q), -_mixed(w.T, t)  # gradients of the loss
                by_r = by_q.sub_(q.exp_().mul_(by_q.sum(1, keepdim=True)))
                yield part, y, t, by_t, r, by_r

        loss: Tensor = -math.log(b / k) * b * w.sum()
        of_t, of_r = rows.new_zeros(2, v, b, 1)
        for _, _, t, by_t, _, by_r in terms():
            of_t += by_t.mul_(t).sum(2, keepdim=True)
            of_r += by_r.sum(2, keepdim=True)
        loss = loss + of_t.sum()
        if any(ctx.needs_input_grad):
            of_rows, of_weight = torch.zeros_like(rows), []
            for part, y, t, by_t, r, by_r in terms():
                by_y = by_t.sub_(of_t).mul_(t)
                by_y -= y.exp_().mul_(by_y.sum(1, keepdim=True))
                by_z = by_y.div_(column).add_(by_r.sub_(r.exp_().mul_(of_r)), alpha=1 / row)
                of_rows += by_z @ part
                of_weight.append(by_z.flatten(0, 1).T @ rows.flatten(0, 1))
            ctx.save_for_backward(of_rows, torch.cat(of_weight))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None, None]:
        of_rows, of_weight = ctx.saved_tensors
        return grad_output * of_rows, grad_output * of_weight, None, None


def _pair_weights(views: int, images: int, like: Tensor) -> Tensor:
    """w [v, v]: one over what is averaged where i predicts j, 0 for a view with itself and for two
    local ones.
    """
    view = torch.arange(views, device=like.device)
    pairs = (view[:, None] != view) & ((view[:, None] < 2) | (view < 2))
    return pairs.to(like.dtype) / (pairs.sum() * images)


def _mixed(weights: Tensor, x: Tensor) -> Tensor:
    """Weighted sums over the views of x [v, b, n], weights [v, v]."""
    return (weights @ x.flatten(1)).view_as(x)


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float, iterations: int, weights: Tensor | None) -> Tensor:
    """Assignments [b, k] of sum 1 that use all prototypes alike (section 3.1, equations 3 to 5;
    its factors 1/k and 1/b cancel), from scores [b, k], in their place; weights [b] are 1 or 0.
    """
    if weights is not None:
        scores.masked_fill_(weights[:, None] == 0, -math.inf)
    q = scores.sub_(scores.amax(0)).div_(epsilon).exp_()  # which the first division undoes
    for _ in range(iterations):
        q /= q.sum(0)
        q /= q.sum(1, keepdim=True).clamp_min(torch.finfo(q.dtype).tiny)
    return q


def assignment_entropy(rows: Tensor, classes: Tensor, temperature: float) -> Tensor:
    """Entropy of the mean assignment of rows [b, d] to classes [k, d], a softmax of their products,
    over log k: 1 where all classes are used alike, 0 where one is.
    """
    parts = rows.split(max(1, LOGITS // len(classes)))
    sums = [(part @ classes.T / temperature).softmax(1).sum(0) for part in parts]
    mean = torch.stack(sums).sum(0) / len(rows)
    entropy: Tensor = torch.special.entr(mean).sum() / math.log(len(mean))
    return entropy
