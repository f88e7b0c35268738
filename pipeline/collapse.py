"""Signs that a pretraining has collapsed: what is logged, and from where on a run is stopped."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.views import View

ROWS = 256  # embeddings looked at: enough for a rank of tens, cheap at every log line
STEPS = 100  # of a run before which nothing is judged: a trial of the program is no run
GRACE = 0.1  # fraction of a run before which nothing is judged
LINES = 3  # log lines in a row that have to show a sign
SPREAD = 0.02  # below: all images have nearly one embedding; healthy runs begin at 0.05 or more
RANK = 2.0  # below: embeddings lie on a line
ENTROPY = 0.1  # below: nearly all images are assigned to one class
SETTLED = 0.5  # fraction of a run from which kNN is judged
GAIN = 1.2  # kNN of a run that learns, over the untrained encoder's: below, it learns nothing
LESS = 0.1  # or the part of the untrained encoder's errors that it takes away, where that is less

CROP = 0.7  # area of an image that the smallest crops must go below, or views are too alike

CAUSES = {
    "crop": "views are then told by their colors, and what is in an image is not learned (a "
    "contest entry had 2.1 % without, 16 % with it); a view with crop_p of 0.5 or more and "
    "crop_scale from 0.7 or less is expected",
    "spread": "all images get nearly the same embedding; usual causes: a learning rate too high or "
    "without warm-up, a missing safeguard of the method (predictor, momentum, queue, batch norm in "
    "the head), a batch too small",
    "rank": "embeddings lie on a line or a point; usual causes: a learning rate too high, a "
    "temperature too high, a missing safeguard of the method, weight decay too strong",
    "assignment_entropy": "nearly all images fall into one class; usual causes: a learning rate "
    "too high, a batch much smaller than the number of classes or prototypes without a queue, a "
    "temperature too high",
    "knn": "the encoder is hardly better than an untrained one; usual causes: crops too alike "
    "(views.crop_scale), so that views are told by their colors; a learning rate too high or too "
    "low; a collapse at the start",
}
LOWEST = {"spread": SPREAD, "rank": RANK, "assignment_entropy": ENTROPY}


@torch.no_grad()
def signs_of(a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """How embeddings [n, d] of two views of the same images lie, as scalars; lengths do not count.

    spread: standard deviation of a dimension, 1 where they are all over the sphere, 0 in a point.
    rank: the exponential of the entropy of the singular values, 1 to min(n, d) (RankMe, arXiv
    2210.02885, equation 1; the mean taken out, so that a point has none).  alignment: mean squared
    distance of two views, and uniformity: logarithm of the mean of exp(-2 · squared distance) over
    pairs of images (arXiv 2005.10242, section 4.1).
    """
    step = -(-len(a) // ROWS)
    a, b = (F.normalize(z[::step].float().cpu(), dim=1) for z in (a, b))
    centered = a - a.mean(0)
    # singular values are the roots of the eigenvalues of the smaller of the two products
    small = centered.T @ centered if a.shape[0] > a.shape[1] else centered @ centered.T
    values = torch.linalg.eigvalsh(small.double()).clamp_min(0).sqrt()
    p = values / values.sum().clamp_min(1e-12)
    distances = torch.pdist(a).square()
    uniformity = (-2 * distances).logsumexp(0) - math.log(max(len(distances), 1))
    found = {
        "spread": (centered.square().mean() * a.shape[1]).sqrt(),
        "alignment": (a - b).square().sum(1).mean(),
        "uniformity": uniformity,
    }
    if min(len(a) - 1, a.shape[1]) >= 2 * RANK:  # else it cannot tell anything
        found["rank"] = torch.special.entr(p).sum().exp()
    return found


def judge_views(views: Sequence[View]) -> str | None:
    """What is wrong with the views, in a line, where none of them is a random resized crop."""
    if any(view.crop_p >= 0.5 and view.crop_scale[0] <= CROP for view in views):
        return None
    return f"no random resized crop is among the views: {CAUSES['crop']}"


def judge(
    history: Sequence[Mapping[str, float]], along: float, queries: float = math.inf
) -> str | None:
    """What is wrong, its usual causes and what to do, in a line, where the newest entry of a run's
    `history` is that of a collapse; `along` (0 to 1) is how much of the run is done.

    kNN, of so many `queries`, is held against the entry of step 0, the untrained encoder's, and
    has to be below by more than its standard error.
    """
    newest, where = history[-1], f"after {along:.0%} of the run"
    if newest["step"] < STEPS:
        return None
    first = max(STEPS, GRACE * newest["step"] / max(along, 1e-9))
    lines = [h for h in history[-3 * LINES :] if "loss" in h and h["step"] >= first][-LINES:]
    for sign, low in LOWEST.items():
        last = [h[sign] for h in lines if sign in h]
        if len(last) == LINES and not any(value >= low for value in last):
            return _collapsed(sign, f"{sign} is {last[-1]:.3f} {where}, below {low}")
    untrained = history[0].get("knn", 0.0) if history[0]["step"] == 0 else 0.0
    wanted = min(GAIN * untrained, untrained + LESS * (100 - untrained))
    part = newest.get("knn", 100.0) / 100
    error = 100 * math.sqrt(part * (1 - part) / max(queries, 1))  # binomial
    if along >= SETTLED and newest.get("knn", math.inf) + error < wanted:
        what = f"kNN is {newest['knn']:.2f} % {where}, untrained it was {untrained:.2f} %"
        return _collapsed("knn", what)
    return None


def _collapsed(sign: str, what: str) -> str:
    return f"the encoder has collapsed: {what}: {CAUSES[sign]}"
