"""The label requests' strategies, by name: each picks positions among candidates."""

import numpy as np
import numpy.typing as npt

from pipeline import InputError
from pipeline.checks import check
from pipeline.coverage import facility_location, farthest_first
from pipeline.draws import place_in_group
from pipeline.neighbours import kmeans, nearest_distinct
from pipeline.selection import NEIGHBORS, Candidates, Floats, Ints, Strategy

Picks = tuple[Ints, Ints | None]
_FEW = 5  # images of a cluster with fewer are no typical ones (arXiv 2202.02794, appendix F)


class Random(Strategy):
    """Every image is as likely as any other: the control of every other strategy."""

    def __call__(self, candidates: Candidates, budget: int, seed: int) -> Picks:
        return np.random.default_rng(seed).choice(candidates.free, budget, replace=False), None


class EnergyStrata(Strategy):
    uses_logits = True

    def __init__(self, strata: int = 10) -> None:
        """A representative random sample: as many images from each stratum of the energy, from what
        the classifier knows least to what it knows best.

        Args:
            strata: how many there are, of as many images each.
        """
        check("EnergyStrata", "1 or more", strata=strata)
        self.strata = strata

    def __call__(self, candidates: Candidates, budget: int, seed: int) -> Picks:
        free, rng = candidates.free, np.random.default_rng(seed)
        order = free[np.argsort(candidates.energy[free], kind="stable")]
        stratum = np.arange(len(order)) * min(self.strata, budget) // len(order)
        shuffled = rng.permutation(len(order))
        chosen = _evenly(stratum[shuffled], budget, rng)
        return order[shuffled[chosen]], stratum[shuffled[chosen]]


class KMeans(Strategy):
    def __init__(self, iterations: int = 20) -> None:
        """Representative images: k-means with k = budget, and the image nearest each center.

        Args:
            iterations: of Lloyd's algorithm.
        """
        check("KMeans", "1 or more", iterations=iterations)
        self.iterations = iterations

    def __call__(self, candidates: Candidates, budget: int, seed: int) -> Picks:
        centers, _ = kmeans(candidates.x, budget, self.iterations, seed)
        return nearest_distinct(centers, candidates.x, candidates.free), np.arange(budget)


class Typicality(Strategy):
    def __init__(self, neighbors: int = 20, iterations: int = 20) -> None:
        """The most typical image of each cluster without a label, from the largest cluster on
        (TypiClust, arXiv 2202.02794, section 3); k-means has a cluster for every label there will
        be, and an image's neighbors are those in the whole pool, not in its cluster alone.
        Clusters of fewer than five images come last (appendix F).

        Args:
            neighbors: whose mean distance an image's typicality is one over.
            iterations: of k-means.
        """
        check("Typicality", "1 or more", neighbors=neighbors, iterations=iterations)
        if neighbors > NEIGHBORS:
            raise InputError(
                f"Typicality: neighbors is {neighbors}; up to {NEIGHBORS} are expected"
            )
        self.neighbors, self.iterations = neighbors, iterations

    def __call__(self, candidates: Candidates, budget: int, seed: int) -> Picks:
        x, labeled, free = candidates.x, candidates.labeled, candidates.free
        count = min(budget + len(labeled), len(x))
        _, cluster = kmeans(np.concatenate([x, labeled]), count, self.iterations, seed)
        sizes = np.bincount(cluster, minlength=count)
        labels = np.bincount(cluster[len(x) :], minlength=count)
        near = candidates.graph[0][:, : self.neighbors]
        distance = np.sqrt(np.maximum(2 - 2 * near, 0)).mean(1) if near.size else np.zeros(len(x))
        order = free[np.argsort(distance[free], kind="stable")]  # most typical first
        own = cluster[order]
        turn = place_in_group(own) + labels[own]
        return _first(budget, order, (sizes[own] < _FEW, turn, -sizes[own])), None


class KCenterGreedy(Strategy):
    """The image farthest from all that is labeled or picked, again and again (core-set, arXiv
    1708.00489, algorithm 1); the first at random where nothing is labeled.
    """

    def __call__(self, candidates: Candidates, budget: int, seed: int) -> Picks:
        free = candidates.free
        order = np.random.default_rng(seed).permutation(len(free))  # decides among equals
        free = free[order]
        return free[farthest_first(candidates.x[free], candidates.known[free], budget)], None


class ProbCover(Strategy):
    def __init__(self, purity: float = 0.95, iterations: int = 20) -> None:
        """The image whose ball holds the most images that no ball holds yet, again and again
        (ProbCover, arXiv 2205.11603, algorithm 1); labeled images have balls too.

        A ball ends where images of another k-means cluster (as many as classes) begin, for a part
        `purity` of the images (their section 3.3), and at the cosine of the 50th neighbor (the
        median of all) at the latest; it holds an image's 50 nearest and those that have it among
        theirs, in dense places not all that are as near.  When every image is covered, they are
        covered again from the start, by picks alone.

        Args:
            purity: part of the images whose ball has no image of another cluster.
            iterations: of k-means.
        """
        check("ProbCover", "above 0, up to 1", purity=purity)
        check("ProbCover", "1 or more", iterations=iterations)
        self.purity, self.iterations = purity, iterations

    def __call__(self, candidates: Candidates, budget: int, seed: int) -> Picks:
        similarities, near = candidates.graph
        count = min(candidates.classes, len(candidates.x))
        _, cluster = kmeans(candidates.x, count, self.iterations, seed)
        other = np.where(cluster[near] != cluster[:, None], similarities, -1)
        ball = float(np.quantile(other.max(1, initial=-1), self.purity))
        ball = max(ball, float(np.median(similarities[:, -1])) if near.size else 0.0)
        inside = (similarities > ball).astype(np.float32)
        covered = (candidates.known > ball).astype(np.float32)
        weights = np.ones_like(covered)
        picks = facility_location(near, inside, weights, covered, candidates.free, budget, seed)
        return picks, None


class Margin(Strategy):
    """The smallest margins between the two most probable classes: what the classifier is least sure
    of.
    """

    uses_logits = True

    def __call__(self, candidates: Candidates, budget: int, seed: int) -> Picks:
        free = np.random.default_rng(seed).permutation(candidates.free)  # decides among equals
        return _first(budget, free, (candidates.margin[free],)), None


class MarginClusters(Strategy):
    uses_logits = True

    def __init__(
        self, pool: float = 5.5, clusters: int | None = None, iterations: int = 20
    ) -> None:
        """The smallest margins, as many from each cluster of what is unsure (the best entry known:
        70,000 smallest margins, 800 clusters, 16 of each).

        Args:
            pool: images that are clustered, over the budget.
            clusters: of k-means, at most one for each label; null takes one for each class.
            iterations: of k-means.
        """
        check("MarginClusters", "1 or more", pool=pool, iterations=iterations, clusters=clusters)
        self.pool, self.clusters, self.iterations = pool, clusters, iterations

    def __call__(self, candidates: Candidates, budget: int, seed: int) -> Picks:
        free, margin = candidates.free, candidates.margin
        pool = _first(round(self.pool * budget), free, (margin[free],))
        count = min(self.clusters or candidates.classes, budget, len(pool))
        _, cluster = kmeans(candidates.x[pool], count, self.iterations, seed)
        turn = place_in_group(cluster)  # the pool is sorted by margin
        chosen = _first(budget, np.arange(len(pool)), (turn, margin[pool]))
        return pool[chosen], cluster[chosen]


class Hybrid(Strategy):
    uses_logits = True

    def __init__(self, uncertainty: float = 1.0) -> None:
        """Density, coverage and margin in one objective: the images S that maximize

            Σ_i (1 - margin_i)^uncertainty · max over j in S and the labeled of k(i, j),

        the uncertainty coverage of arXiv 2412.20644 (section 3) or weighted facility location, of
        a kernel k that falls from 1 to 0 between a cosine of 1 and that of the 50th neighbor (the
        median of all).  Greedy choice is within 1 - 1/e of the best (Nemhauser et al., 1978).

        Args:
            uncertainty: how much more an unsure image counts; 0 leaves the classifier out.
        """
        check("Hybrid", "0 or more", uncertainty=uncertainty)
        self.uncertainty = uncertainty

    def __call__(self, candidates: Candidates, budget: int, seed: int) -> Picks:
        similarities, near = candidates.graph
        floor = float(np.median(similarities[:, -1])) if near.size else 0.0

        def kernel(cosine: Floats) -> Floats:
            k: Floats = np.clip((cosine - floor) / max(1 - floor, 1e-6), 0, 1)
            return k

        weights = (1 - candidates.margin) ** self.uncertainty
        known = kernel(candidates.known)
        picks = facility_location(
            near, kernel(similarities), weights, known, candidates.free, budget, seed
        )
        return picks, None


def _first(count: int, positions: Ints, keys: tuple[npt.NDArray[np.generic], ...]) -> Ints:
    """The first `count` positions by the `keys`, of which the first decides most."""
    return positions[np.lexsort(keys[::-1])[:count]]


def _evenly(groups: Ints, count: int, rng: np.random.Generator) -> Ints:
    """`count` rows, as many of each group [n] as can be, the first of each; which group has one
    more is drawn.
    """
    tie = rng.permutation(groups.max() + 1)[groups]
    return _first(count, np.arange(len(groups)), (place_in_group(groups), tie))
