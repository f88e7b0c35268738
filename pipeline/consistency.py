"""Consistency on unlabeled images: a strong view has to agree with what a weak one is taken for."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.checks import check
from pipeline.classifiers import Classifier, Supervised
from pipeline.distributed import gather


class Consistency(nn.Module):
    """The loss on unlabeled images; a subclass is found by its name."""

    ratio: int
    """Unlabeled images in a step for each labeled one."""
    aligned: bool
    """Whether the weak views' probabilities are multiplied by the labels' frequency of a class over
    the classifier's own running one (distribution alignment, arXiv 1911.09785, section 3.1).
    """
    momentum: float
    """Of running means."""
    prior: Tensor
    model: Tensor
    used: Tensor
    """Part of the newest unlabeled images that were sure enough to learn from."""

    def begin(self, prior: Tensor) -> None:
        """Called once before training, with the frequencies [classes] of the labels."""
        self.register_buffer("prior", prior)
        self.register_buffer("model", prior.clone())
        self.register_buffer("used", torch.zeros(()))

    def probabilities(self, weak: Tensor) -> Tensor:
        """Of logits [u, classes] of weak views, aligned where it is asked for; no gradient."""
        p = weak.detach().softmax(1)
        if self.aligned:
            self.model.lerp_(gather(p).mean(0), 1 - self.momentum)
            p = _normalized(p * self.prior / self.model.clamp_min(1e-6))
        return p

    def forward(self, weak: Tensor, strong: Tensor) -> Tensor:
        """The loss of logits [u, classes] of a weak and a strong view of the same images."""
        raise NotImplementedError


class FixMatch(Consistency):
    def __init__(
        self,
        threshold: float = 0.95,
        ratio: int = 7,
        weight: float = 1.0,
        aligned: bool = True,
        momentum: float = 0.999,
    ) -> None:
        """Cross entropy of the strong view with the arg-max of the weak one, where that is sure
        (FixMatch, arXiv 2001.07685, equation 4).

        Args:
            threshold: the lowest probability that is sure.
            ratio: unlabeled images in a step for each labeled one.
            weight: of this loss beside that of the labels.
            aligned: distribution alignment: guesses are held to the labels' frequencies.
            momentum: of the running mean.
        """
        super().__init__()
        check("FixMatch", "1 or more", ratio=ratio)
        check("FixMatch", "0 or more", weight=weight)
        check("FixMatch", "from 0 to 1", threshold=threshold, momentum=momentum)
        self.threshold, self.ratio, self.weight = threshold, ratio, weight
        self.aligned, self.momentum = aligned, momentum

    def forward(self, weak: Tensor, strong: Tensor) -> Tensor:
        sure, label = self.probabilities(weak).max(1)
        mask = (sure >= self.threshold).to(strong.dtype)
        self.used.copy_(mask.mean())
        return self.weight * (F.cross_entropy(strong, label, reduction="none") * mask).mean()


class FreeMatch(Consistency):
    mean: Tensor
    histogram: Tensor
    level: Tensor

    def __init__(
        self,
        ratio: int = 7,
        weight: float = 1.0,
        fairness: float = 0.01,
        aligned: bool = False,
        momentum: float = 0.999,
    ) -> None:
        """FixMatch with a bar for each class that follows how sure the classifier is (FreeMatch,
        arXiv 2205.07246, equations 5 to 12).

        Args:
            ratio: unlabeled images in a step for each labeled one.
            weight: of the cross entropy beside that of the labels.
            fairness: weight of the self-adaptive fairness, which spreads predictions over the
                classes.
            aligned: distribution alignment beside it, which the paper does without.
            momentum: of the running means.
        """
        super().__init__()
        check("FreeMatch", "1 or more", ratio=ratio)
        check("FreeMatch", "0 or more", weight=weight)
        check("FreeMatch", "from 0 to 1", momentum=momentum, fairness=fairness)
        self.ratio, self.weight, self.fairness = ratio, weight, fairness
        self.aligned, self.momentum = aligned, momentum

    def begin(self, prior: Tensor) -> None:
        super().begin(prior)
        uniform = torch.full_like(prior, 1 / len(prior))
        self.register_buffer("mean", uniform)
        self.register_buffer("histogram", uniform.clone())
        self.register_buffer("level", uniform[0].clone())

    def forward(self, weak: Tensor, strong: Tensor) -> Tensor:
        p = self.probabilities(weak)
        everywhere, new = gather(p), 1 - self.momentum
        self.level.lerp_(everywhere.amax(1).mean(), new)
        self.mean.lerp_(everywhere.mean(0), new)
        self.histogram.lerp_(_histogram(everywhere.argmax(1), p.shape[1]).to(p), new)
        sure, label = p.max(1)
        bars = self.level * self.mean / self.mean.max()  # of each class
        mask = (sure >= bars[label]).to(strong.dtype)
        self.used.copy_(mask.mean())
        loss = self.weight * (F.cross_entropy(strong, label, reduction="none") * mask).mean()
        if not self.fairness:
            return loss
        q, mask = gather(strong.softmax(1)), gather(mask)  # not linear in them: of all ranks
        count = mask.sum().clamp_min(1)
        mean = (q * mask[:, None]).sum(0) / count
        own = (F.one_hot(q.argmax(1), q.shape[1]) * mask[:, None]).sum(0) / count
        target = _normalized(self.mean / self.histogram.clamp_min(1e-6))
        found = _normalized(torch.where(own > 0, mean / own.clamp_min(1e-6), 0))
        fair = (target * (found + 1e-12).log()).sum() * (mask.sum() > 0)
        return loss + self.fairness * fair


class SemiSupervised(Supervised):
    """Cross entropy on labels and consistency on unlabeled images, in one batch of the classifier.

    Weak views are guessed without a graph: by the averaged classifier in evaluation mode where
    there is one (EMAN, arXiv 2101.08482), and by the classifier as it is if not.
    """

    def __init__(
        self, classifier: Classifier, classes: int, consistency: Consistency, **options: float
    ) -> None:
        super().__init__(classifier, classes, **options)
        self.consistency = consistency

    def forward(  # type: ignore[override]
        self, images: Tensor, labels: Tensor, weights: Tensor, views: list[Tensor]
    ) -> Tensor:
        """`views` are the weak and the strong one [u, 3, h, w] of unlabeled images."""
        images, targets = self.mixed(images, labels, weights)
        weak, strong = views
        logits = self.classifier(torch.cat([images, strong])).float()
        with torch.no_grad():  # after it: autocast keeps the weights that it cast, with their graph
            guesses = self.final()(weak).float()
        own, answers = logits.split([len(images), len(strong)])
        with torch.autocast(logits.device.type, enabled=False):
            loss: Tensor = self.cross_entropy(own, targets) + self.consistency(guesses, answers)
        return loss

    def signs(self) -> dict[str, Tensor]:
        return {"used": 100 * self.consistency.used}


def _histogram(labels: Tensor, classes: int) -> Tensor:
    return F.one_hot(labels, classes).float().mean(0)


def _normalized(x: Tensor) -> Tensor:
    return x / x.sum(-1, keepdim=True).clamp_min(1e-12)
