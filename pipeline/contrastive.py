"""Contrastive losses (NT-Xent, its decoupled form, InfoNCE) without all similarities in memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pipeline import InputError

PLAIN_ROWS = 128
"""Up to so many rows (v·b) the whole matrix is as fast as blocks, or faster.

OMP_NUM_THREADS=1 python -m benchmarks.nt_xent --images 16 32 48 64 96 128: blocks take 1.07, 1.06,
1.00, 1.01, 0.96 and 0.91 of its time at 32, 64, 96, 128, 192 and 256 rows of d = 128.  On two
threads, at 512, 2,048 and 8,192 rows: 0.63, 0.56 and 0.40.  Not measured on a GPU.
"""
BLOCK = 512
"""Rows at a time.  OMP_NUM_THREADS=1 python -m benchmarks.nt_xent --images 4096 --block BLOCK: 64,
256, 512 and 1,024 take 0.45, 0.41, 0.41 and 0.44 of the whole matrix's time.
"""
LOGITS = 1 << 23  # of InfoNCE or SwAV, in memory at a time


def nt_xent(
    projections: Tensor,
    temperature: float,
    cosine: bool = True,
    decoupled: bool = False,
    block: int | None = None,
) -> Tensor:
    """Normalized temperature-scaled cross entropy (arXiv 2002.05709, section 2.1, equation 1),
    averaged over all v·b views.

    The positives of a view are the other views of its image; with two views this is the paper's
    loss, with more the mean over positives of the same term.

    Args:
        projections: [v, b, d], v >= 2; they need no normalization.
        temperature: what similarities are divided by.
        cosine: whether the similarity is the cosine; the dot product otherwise.
        decoupled: the denominator leaves out every view of the image itself, its positives too
            (DCL, arXiv 2110.06848, equation 6); b >= 2.
        block: rows of the similarity matrix that are in memory at a time; 0 for all of them, by
            plain autograd; None for what is faster (see PLAIN_ROWS).  The loss is the same.

    Raises InputError where a view has no positive or no negative, or `block` is negative.
    """
    v, b, _ = projections.shape
    if v < 2:
        raise InputError(f"NT-Xent: {v} view of an image has no positive; 2 or more are expected")
    if decoupled and b < 2:
        raise InputError("NT-Xent, decoupled: 1 image has no negatives; 2 or more are expected")
    if block is not None and block < 0:
        raise InputError(f"NT-Xent: blocks of {block} rows; 1 or more are expected, or 0 for all")
    n = v * b
    z = F.normalize(projections, dim=2) if cosine else projections
    positive = (z * (z.sum(0) - z)).sum() / (n * (v - 1) * temperature)
    rows = z.flatten(0, 1)  # [n, d], in which row i is a view of image i % b
    # A denominator leaves out itself, or all views of its image: diagonals, b apart, of [n, n].
    left_out = range(b - n, n, b) if decoupled else range(1)
    if block is None:
        block = BLOCK if n > PLAIN_ROWS else 0
    if block == 0:
        return _mean_log_denominator(rows, temperature, left_out) - positive
    below: Tensor = _MeanLogDenominator.apply(rows, temperature, left_out, block)
    return below - positive


def _mean_log_denominator(z: Tensor, temperature: float, left_out: range) -> Tensor:
    """The mean over rows i of log Σ_j exp(z_i · z_j / temperature), the diagonals `left_out` of the
    sum's [n, n] terms apart.
    """
    logits = (z / temperature) @ z.T  # [n, n]
    mask = torch.zeros_like(logits, dtype=torch.bool)
    for diagonal in left_out:
        mask.diagonal(diagonal).fill_(True)
    return logits.masked_fill_(mask, -torch.inf).logsumexp(1).mean()


class _MeanLogDenominator(torch.autograd.Function):
    """`_mean_log_denominator` and its gradient in one sweep over blocks of rows.

    With p = softmax(logits) by rows, the gradient is (p + pᵀ) z / (n · temperature): a block of p
    gives its own rows their part of p z, and every row a part of pᵀ z, and is then overwritten.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, temperature: float, left_out: range, block: int) -> Tensor:
        n = len(z)
        log_denominator = z.new_empty(n, 1)
        grad = torch.zeros_like(z) if ctx.needs_input_grad[0] else None
        buffer = z.new_empty(min(block, n), n)  # one for all blocks: fresh pages cost more than exp
        for start in range(0, n, block):
            rows = z[start : start + block]  # [block, d], the last one shorter
            logits = torch.mm(rows / temperature, z.T, out=buffer[: len(rows)])  # [block, n]
            for diagonal in left_out:  # empty where it misses the block
                logits.diagonal(start + diagonal).fill_(-torch.inf)
            highest = logits.amax(1, keepdim=True)  # [block, 1]
            terms = logits.sub_(highest).exp_()
            total = terms.sum(1, keepdim=True)
            torch.add(highest, total.log(), out=log_denominator[start : start + block])
            if grad is not None:  # the softmax's division is made in [block, d], not in [block, n]
                scale = total.mul_(n * temperature).reciprocal_()
                grad.addmm_(terms.T, rows * scale)
                grad[start : start + block].addcmul_(terms @ z, scale)
        ctx.save_for_backward(grad)
        return log_denominator.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad_output * grad, None, None, None


def info_nce(queries: Tensor, keys: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """Cross entropy of the right key among it and the negatives (arXiv 1911.05722, equation 1).

    `queries` and `keys` [b, d] and `negatives` [k, d] are expected at unit length.
    """

    def summed(queries: Tensor, keys: Tensor) -> Tensor:
        positive = (queries * keys).sum(1, keepdim=True)  # [b, 1]
        logits = torch.cat([positive, queries @ negatives.T], 1) / temperature  # [b, 1 + k]
        return (logits.logsumexp(1) - logits[:, 0]).sum()

    return sum_by_parts(summed, len(negatives), queries, keys) / len(queries)


def sum_by_parts(function: Callable[..., Tensor], logits: int, *rows: Tensor) -> Tensor:
    """The sum of `function` over parts of tensors of as many rows, of which each takes `logits`
    numbers in memory; where there are several parts, each is computed twice.
    """
    size = max(1, LOGITS // logits)
    if len(rows[0]) <= size:
        return function(*rows)
    parts = zip(*(tensor.split(size) for tensor in rows), strict=True)
    sums = [checkpoint(function, *part, use_reentrant=False) for part in parts]
    return torch.stack(sums).sum()
