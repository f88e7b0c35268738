"""Which images to ask labels for: what a strategy sees, and the rules that its request keeps."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix
from scipy.special import logsumexp

from pipeline import InputError, runs
from pipeline.manifest import Contest, read_manifest
from pipeline.metrics import chunks, knn_predict
from pipeline.neighbours import graph, kmeans, search, search_along
from pipeline.progress import progress

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

NEIGHBORS = 50  # of an image, in the graph
_VOTES, _TEMPERATURE = 20, 0.07  # of the nearest labeled images
_GROUPS = 20  # that a strategy without clusters of its own is shown in


@dataclass
class Candidates:
    """What a strategy may look at; positions are rows of `x`, in the order of `eligible`.

    `embeddings` [n, d] float32 of unit length and `logits` [n, classes], one array for each model
    that votes (may be none), are of the whole unlabeled split; `eligible` [m] are the sorted
    indices that may be asked for (not labeled, not byte-identical, not skipped) and `labeled`
    [l, d] embeddings of the images whose `labels` [l] are known.  `near_duplicate` is the cosine
    from which two images count as copies.
    """

    embeddings: Floats
    logits: Sequence[Floats]
    eligible: Ints
    labeled: Floats
    labels: Ints
    classes: int
    near_duplicate: float = 1.1

    @cached_property
    def x(self) -> Floats:
        """Embeddings [m, d] of the eligible images; InputError where one is not finite."""
        x = self.embeddings[self.eligible]
        _check_finite(x, "embeddings", self.eligible)
        return x

    @cached_property
    def graph(self) -> tuple[Floats, Ints]:
        """Similarities and positions [m, NEIGHBORS] of each one's nearest others."""
        return graph(self.x, NEIGHBORS)

    @cached_property
    def known(self) -> Floats:
        """Cosine [m] to the nearest labeled image; -1 where none is labeled."""
        if not len(self.labeled):
            return np.full(len(self.x), -1, np.float32)
        return search_along(self.x, self.labeled, 1, "nearest labels")[0][:, 0]

    @cached_property
    def free(self) -> Ints:
        """Positions that may be picked: copies neither of a labeled image nor of an earlier one."""
        if self.near_duplicate > 1:
            return np.arange(len(self.x))
        marked, (similarities, near) = self.known >= self.near_duplicate, self.graph
        _mark_copies(marked, similarities, near, self.near_duplicate)
        free = np.flatnonzero(~marked)
        crowded = np.all(similarities >= self.near_duplicate, axis=1)  # may have more than known
        while len(copies := _copies(self.x, free, free[crowded[free]], self.near_duplicate)):
            free = np.setdiff1d(free, copies)
        return free

    def _probabilities(self, positions: Ints) -> tuple[Floats, Floats]:
        """Class probabilities [p, classes] and energies [p], both the mean of the models'."""
        of_models = [z[self.eligible[positions]].astype(np.float64) for z in self.logits]
        totals = [logsumexp(z, axis=1) for z in of_models]
        p = [np.exp(z - t[:, None]) for z, t in zip(of_models, totals, strict=True)]
        return np.mean(p, 0), np.mean(totals, 0)

    @cached_property
    def _margin_and_energy(self) -> Floats:
        found = np.empty((2, len(self.eligible)), np.float32)
        with progress("margins", len(self.eligible), "images") as advance:
            for rows in chunks(len(self.eligible), self.classes):
                p, found[1, rows] = self._probabilities(np.arange(len(self.eligible))[rows])
                if p.shape[1] == 1:
                    p = np.pad(p, ((0, 0), (1, 0)))  # a class alone has margin 1
                second, first = np.partition(p, -2, axis=1)[:, -2:].T
                found[0, rows] = first - second
                advance(len(p))
        _check_finite(found.T, "logits", self.eligible)
        return found

    @property
    def margin(self) -> Floats:
        """The probability [m] of the first class less that of the second, of the models' mean."""
        margin: Floats = self._margin_and_energy[0]
        return margin

    @property
    def energy(self) -> Floats:
        """Log-sum-exp [m] of the logits, high where a model knows the image (arXiv 2010.03759)."""
        energy: Floats = self._margin_and_energy[1]
        return energy

    def guesses(self, positions: Ints) -> tuple[Ints, Floats]:
        """The likeliest class [p] of images and its probability: the models', or the weighted vote
        of the 20 nearest labeled images where there is no model; -1 where there are neither.
        """
        labels, confidences = np.full(len(positions), -1), np.zeros(len(positions), np.float32)
        for rows in chunks(len(positions), self.classes):
            if self.logits:
                p = self._probabilities(positions[rows])[0]
            elif len(self.labeled):
                similarities, near = search(self.x[positions[rows]], self.labeled, _VOTES)
                p = knn_predict(similarities, self.labels[near], self.classes, _TEMPERATURE)
                p = np.maximum(p, 0) / np.maximum(p, 0).sum(1, keepdims=True)
            else:
                continue
            labels[rows], confidences[rows] = p.argmax(1), p.max(1)
        return labels, confidences


@dataclass(frozen=True)
class Request:
    """The chosen images: `indices` [budget] of the split, `groups` [budget], the clusters, and how
    many images were no choice as `near_duplicates`.
    """

    indices: Ints
    groups: Ints
    near_duplicates: int


class Strategy:
    """One way to choose; a subclass is found by its name."""

    uses_logits = False
    """Whether it needs the latest fine-tuning's logits; `Candidates.logits` may be empty if not."""

    def __call__(self, candidates: Candidates, budget: int, seed: int) -> tuple[Ints, Ints | None]:
        """`budget` different positions of `candidates.free`, the same for the same seed, and the
        clusters that they stand for, if it knows any.
        """
        raise NotImplementedError


def eligible(
    usable: Ints, digests: npt.NDArray[np.bytes_], labeled: npt.NDArray[np.bytes_]
) -> Ints:
    """The images of `usable` [n] that may be asked for, sorted; `digests` [n] are of their bytes.

    Of byte-identical images the one with the lowest index is kept, and none whose digest is one of
    the `labeled` images'.
    """
    order = np.argsort(usable, kind="stable")
    _, first = np.unique(digests[order], return_index=True)
    kept = order[first]
    return np.sort(usable[kept[~np.isin(digests[kept], labeled)]])


def choose(strategy: Strategy, candidates: Candidates, budget: int, seed: int) -> Request:
    """What `strategy` asks for, sorted by index and held to the rules of a request.

    No two of its images, nor one of them and a labeled one, are as similar as
    `candidates.near_duplicate`.  Raises InputError where there are not `budget` such images, and
    RuntimeError where the strategy gives anything but `budget` different free positions.
    """
    while True:
        possible, images = len(candidates.free), len(candidates.eligible)
        if not 0 < budget <= possible:
            raise InputError(
                f"label_request: budget is {budget:,} and {possible:,} unlabeled images can be "
                f"asked for (not labeled, skipped or duplicate, and {images - possible:,} "
                f"near-duplicates left out, see label_request.near_duplicate); a budget of 1 to "
                f"{possible:,} is expected"
            )
        picks, groups = strategy(candidates, budget, seed)
        unique = len(np.unique(picks)) == len(picks) == budget
        if not unique or not np.isin(picks, candidates.free).all():
            raise RuntimeError(f"{type(strategy).__name__} broke the rules of a request")
        if candidates.near_duplicate > 1:
            break
        copies = _copies(candidates.x, candidates.free, picks, candidates.near_duplicate)
        if not len(copies):
            break
        candidates = copy.copy(candidates)  # what other strategies see stays as it is
        candidates.free = np.setdiff1d(candidates.free, copies)
    if groups is None:
        _, groups = kmeans(candidates.x[picks], min(_GROUPS, budget), 10, seed)
    order = np.argsort(picks)
    left_out = len(candidates.eligible) - len(candidates.free)
    return Request(candidates.eligible[picks[order]], groups[order], left_out)


def _mark_copies(
    copies: npt.NDArray[np.bool_], similarities: Floats, near: Ints, threshold: float
) -> Ints:
    """Mark in `copies` [n], in order, what is as similar as `threshold` to an earlier row that is
    not marked itself, by each row's neighbors [n, k]; these originals.
    """
    row, column = np.nonzero(similarities >= threshold)
    shape = len(copies), len(copies)
    pairs = csr_matrix((np.ones(len(row), np.bool_), (row, near[row, column])), shape)
    pairs = pairs + pairs.T
    start, other, originals = pairs.indptr, pairs.indices, []
    for k in np.flatnonzero(np.diff(start)):  # in order: what becomes of k is settled
        of_k = other[start[k] : start[k + 1]]
        if not copies[k] and (of_k > k).any():
            copies[of_k[of_k > k]] = True
            originals.append(k)
    return np.array(originals, np.int64)


def _copies(x: Floats, free: Ints, picks: Ints, threshold: float) -> Ints:
    """Positions of `free` in `x` [n, d] that are as similar as `threshold` to an earlier one of the
    `picks`: those that an approximate graph, or more copies than it has neighbors, let through.
    """
    if len(picks) < 2:
        return picks[:0]
    picks = np.sort(picks)
    copies = np.zeros(len(picks), np.bool_)
    found = search(x[picks], x[picks], NEIGHBORS)
    originals = picks[_mark_copies(copies, *found, threshold)]
    if not len(originals):
        return originals
    of_free = free[search(x[free], x[originals], 1)[0][:, 0] >= threshold]
    return np.setdiff1d(np.union1d(of_free, picks[copies]), originals)


def _check_finite(x: Floats, what: str, indices: Ints) -> None:
    if len(wrong := indices[~np.isfinite(x.sum(1))]):
        raise InputError(
            f"{what} of {len(wrong):,} unlabeled images, {wrong[0]}.png the first, are not finite; "
            f"numbers are expected (precision: 'no' may help)"
        )


def check_logits(contest: Contest, file: Path) -> None:
    """Raise InputError where runs/ENTRY/finetune-K/logits/unlabeled.npy is of another contest."""
    contest.check_finetune(file.parents[1])
    shape, found = [contest.images("unlabeled"), contest.classes], np.load(file, mmap_mode="r")
    if list(found.shape) != shape:
        raise InputError(f"{file} holds {list(found.shape)}; {shape} is expected")


def embedded(embeddings: Path) -> list[Path]:
    """The embeddings of unlabeled and train in a folder; InputError where one is missing."""
    by = {"unlabeled": "make embed ARGS='--evaluate.unlabeled true'", "train": "make embed"}
    return [runs.require(embeddings / f"{split}.npy", make) for split, make in by.items()]


def unlabeled_logits(finetune: Path) -> Path:
    """The unlabeled split's logits of a fine-tuning; InputError where there are none."""
    made_by = "make finetune ARGS='--finetune.unlabeled true'"
    return runs.require(finetune / "logits" / "unlabeled.npy", made_by)


def candidates_of(
    contest: Contest,
    embeddings: Path,
    logits: Sequence[Path],
    answered: Sequence[Path],
    near_duplicate: float,
) -> Candidates:
    """What may be asked for, of a folder of embeddings and the unlabeled split's logits; labeled
    are train and the manifests `answered`.
    """
    train, unlabeled = contest.manifest("train").usable(), contest.manifest("unlabeled").usable()
    train = train.take(train.label >= 0)
    label = np.full(contest.images("unlabeled"), -1, np.int64)
    for file in answered:
        manifest = read_manifest(file)
        of = (manifest.split == "unlabeled") & (manifest.label >= 0)
        if (last := manifest.index[of].max(initial=-1)) >= len(label):
            raise InputError(f"{file} labels unlabeled {last}; there are {len(label)} images")
        label[manifest.index[of]] = manifest.label[of]
    known = unlabeled.take(label[unlabeled.index] >= 0)
    x, of_train = (np.load(file, mmap_mode="r") for file in embedded(embeddings))
    digests = np.concatenate([train.sha256, known.sha256])
    return Candidates(
        embeddings=x,
        logits=[np.load(file, mmap_mode="r") for file in logits],
        eligible=eligible(unlabeled.index, unlabeled.sha256, digests),
        labeled=np.concatenate([of_train[train.index], x[known.index]]),
        labels=np.concatenate([train.label, label[known.index]]),
        classes=contest.classes,
        near_duplicate=near_duplicate,
    )
