"""Label propagation on a graph of nearest neighbors, a block of classes at a time."""

from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix, diags
from scipy.special import logsumexp, xlogy

from pipeline.checks import check
from pipeline.metrics import chunks
from pipeline.neighbours import graph
from pipeline.progress import progress
from pipeline.pseudo_labels import Evidence, Predictor

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

_NUMBERS = 1 << 24  # of a block of classes, over all images


class Propagation(Predictor):
    def __init__(
        self,
        neighbors: int = 50,
        gamma: float = 3.0,
        alpha: float = 0.99,
        iterations: int = 20,
        prior: float = 0.0,
        balanced: bool = True,
        space: Literal["embeddings", "predictions"] = "embeddings",
        certainty: Literal["entropy", "largest"] = "entropy",
    ) -> None:
        """Labels diffuse over the graph of nearest neighbors (Iscen et al., arXiv 1904.04717,
        section 3.2, equations 9 to 12).

        Solves (I - alpha S) Z = Y by conjugate gradient, S the normalized affinity.  A row of Y is
        an image's label or, times `prior`, the classifier's probabilities.  An image that nothing
        reaches is not sure, and none is of a class that no label is of.  Beside the evidence,
        memory grows with the images, not with the classes.

        Args:
            neighbors: of an image in the graph.
            gamma: power of their cosine that an edge weighs.
            alpha: part that comes from the neighbors; the rest are the labels themselves.
            iterations: of conjugate gradient.
            prior: what the classifier's probabilities of an image weigh beside a label; 0 leaves
                the classifier out.
            balanced: every class has as much to give in total, as in class mass normalization (Zhu
                et al., 2003).
            space: where neighbors are near: in the pretrained encoder's embeddings, or in the
                classifier's probabilities, by Bhattacharyya's coefficient.
            certainty: an image is as sure as 1 less the entropy of its row of Z over the largest
                possible, as in the paper, or as the largest part of that row.
        """
        check("Propagation", "1 or more", neighbors=neighbors, iterations=iterations)
        check("Propagation", "0 or more", gamma=gamma, prior=prior)
        check("Propagation", "from 0 to below 1", alpha=alpha)
        self.neighbors, self.gamma, self.alpha = neighbors, gamma, alpha
        self.iterations, self.prior, self.balanced = iterations, prior, balanced
        self.space, self.certainty = space, certainty

    def __call__(self, evidence: Evidence) -> tuple[Ints, Floats]:
        n, classes = evidence.logits.shape
        x = np.concatenate([evidence.x, evidence.labeled])
        s = affinity(x, self.neighbors, self.gamma)
        del x
        best, highest = np.zeros(n, np.int64), np.full(n, -1.0)
        total, product = np.zeros(n), np.zeros(n)
        scale = _log_sums(evidence.logits) if self.prior else total
        step = max(1, _NUMBERS // s.shape[0])
        counts = np.bincount(evidence.labels, minlength=classes)
        with progress("propagating labels", classes, "classes") as advance:
            for first in range(0, classes, step):
                block = np.arange(first, min(first + step, classes))
                y = np.zeros((s.shape[0], len(block)), np.float32)
                if self.prior:
                    y[:n] = self.prior * np.exp(evidence.logits[:, block] - scale[:, None])
                y[n:] = evidence.labels[:, None] == block
                z = np.maximum(conjugate_gradient(s, y, self.alpha, self.iterations), 0)
                z *= counts[block] > 0  # or balancing would make much of the little it has
                if self.balanced:
                    z /= np.maximum(z.sum(0), 1e-30)
                z = z[:n].astype(np.float64)
                total += z.sum(1)
                product += xlogy(z, z).sum(1)
                largest = z.max(1)
                higher = largest > highest
                best[higher] = block[z.argmax(1)[higher]]
                highest = np.maximum(highest, largest)
                advance(len(block))
        reached = total > 0
        with np.errstate(divide="ignore", invalid="ignore"):
            if self.certainty == "largest":
                sure = highest / total
            else:
                entropy = np.log(total) - product / total  # of z / total
                sure = 1 - entropy / np.log(max(classes, 2))
        sure = np.where(reached, sure, 0)
        return best, np.clip(sure, 0, 1).astype(np.float32)


def _log_sums(logits: Floats) -> npt.NDArray[np.float64]:
    """Log-sum-exp [n] of the rows of `logits`, in bounded memory."""
    out = np.empty(len(logits))
    for rows in chunks(*logits.shape):
        out[rows] = logsumexp(logits[rows].astype(np.float64), axis=1)
    return out


def affinity(x: Floats, neighbors: int, gamma: float) -> csr_matrix:
    """S = D^-1/2 W D^-1/2 [n, n] of unit vectors `x` [n, d], W the sum of the affinities of a row's
    nearest neighbors and their transpose, its diagonal 0.
    """
    similarities, near = graph(x, neighbors)
    n, k = near.shape
    values = np.maximum(similarities, 0) ** gamma
    w = csr_matrix((values.ravel(), (np.repeat(np.arange(n), k), near.ravel())), (n, n))
    w = w + w.T
    degree = np.asarray(w.sum(1)).ravel()
    scale = diags(1 / np.sqrt(np.where(degree > 0, degree, 1)))
    return (scale @ w @ scale).tocsr().astype(np.float32)


def conjugate_gradient(s: csr_matrix, y: Floats, alpha: float, iterations: int) -> Floats:
    """Z [n, c] of (I - alpha s) Z = y after `iterations` of conjugate gradient, each column for
    itself; a column that is solved stays as it is.
    """
    z, r = np.zeros_like(y), y.copy()
    p, rr = r.copy(), np.einsum("nc,nc->c", r, r)
    for _ in range(iterations):
        q = p - alpha * (s @ p)
        pq = np.einsum("nc,nc->c", p, q)
        a = np.divide(rr, pq, out=np.zeros_like(rr), where=pq > 0)
        z += a * p
        r -= a * q
        new = np.einsum("nc,nc->c", r, r)
        p = r + np.divide(new, rr, out=np.zeros_like(rr), where=rr > 0) * p
        rr = new
    return z
