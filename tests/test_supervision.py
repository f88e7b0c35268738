"""Labels joined into pretraining: the loss of the paper, batches with labels, every method."""

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from pipeline import InputError, config
from pipeline.gradient_cache import backward_in_parts
from pipeline.manifest import load_contest, read_manifest
from pipeline.runs import read_json
from pipeline.supervision import SupervisedContrast, join, joined_batches
from stages import embed, finetune, pretrain

from .conftest import TINY
from .small_methods import VARIANTS, built, feed_of, reader, small, state


def begun(classes: int = 4, width: int = 5, **options: float) -> SupervisedContrast:
    torch.manual_seed(1)
    supervision = SupervisedContrast(**options)
    supervision.begin(classes, width)
    return supervision.double()


def by_loops(projections: Tensor, labels: Tensor, centers: Tensor, t: float) -> Tensor:
    """SupCon's equation 2, with the prototypes among the views."""
    v, b, _ = projections.shape
    rows = [F.normalize(projections[i, j], dim=0) for i in range(v) for j in range(b)]
    rows += [F.normalize(c, dim=0) for c in centers]
    of = [int(labels[j]) for _ in range(v) for j in range(b)] + list(range(len(centers)))
    terms = []
    for i in range(v * b):
        if of[i] < 0:
            continue
        others = [j for j in range(len(rows)) if j != i]
        below = torch.stack([(rows[i] @ rows[j] / t).exp() for j in others]).sum()
        positives = [j for j in others if of[j] == of[i]]
        each = [-((rows[i] @ rows[j] / t).exp() / below).log() for j in positives]
        terms.append(torch.stack(each).mean())
    return torch.stack(terms).mean()


def test_the_loss_is_the_papers_with_prototypes() -> None:
    supervision = begun(temperature=0.3, weight=2.0)
    z = torch.randn(2, 6, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, -1, 3, 0, -1, 2])
    ours = supervision(z, labels)
    theirs = 2 * by_loops(z, labels, supervision.prototypes, 0.3)
    torch.testing.assert_close(ours, theirs)
    inputs = (z, supervision.prototypes)
    for a, b in zip(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_a_batch_without_labels_costs_nothing() -> None:
    supervision = begun()
    z = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    loss = supervision(z, torch.full((3,), -1))
    loss.backward()
    assert loss.item() == 0
    assert torch.isfinite(z.grad).all()  # type: ignore[arg-type]
    assert not z.grad.any()  # type: ignore[union-attr]


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(4, 60),
    labeled=st.integers(0, 8),
    known=st.integers(0, 40),
    seed=st.integers(0, 9),
)
def test_every_labeled_image_comes_once_in_an_epoch(
    n: int, labeled: int, known: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    labels = np.full(n, -1)
    labels[rng.permutation(n)[: min(known, n)]] = rng.integers(0, 5, min(known, n))
    at = joined_batches(labels, 10, labeled, seed)
    batches = [at(step) for step in range(30)]
    assert all(len(b) == 10 and b.min() >= 0 and b.max() < n for b in batches)
    if not (labels >= 0).any() or not labeled:
        return
    stream = np.concatenate([b[10 - labeled :] for b in batches])
    own = np.flatnonzero(labels >= 0)
    for start in range(0, len(stream) - len(own) + 1, len(own)):
        assert sorted(stream[start : start + len(own)].tolist()) == own.tolist()
    again = joined_batches(labels, 10, labeled, seed)(7)  # of no other step before
    np.testing.assert_array_equal(again, batches[7])


def test_no_labeled_image_comes_twice_in_a_batch_larger_than_they_are(tiny_contest: Path) -> None:
    """It would be its own negative."""
    options = ["--pretrain.supervision=SupervisedContrast", "--pretrain.supervision.holdout=0.3"]
    options += ["--pretrain.supervision.share=0.75", "--pretrain.batch_size=120"]
    recipe = config.parse("", argv=[*TINY, *options]).recipe
    method = small("SimCLR")
    method.supervision = recipe.pretrain.supervision()
    labels, at = join(method, load_contest("tiny"), recipe.pretrain, 0)
    own = at(0)[-56:]
    assert (labels[own] >= 0).all()
    assert len(np.unique(own)) == 56 == int((labels >= 0).sum())


def test_labeled_images_come_in_pairs_of_a_class() -> None:
    labels = np.repeat(np.arange(10), 8)
    batch = joined_batches(labels, 40, 40, 0)(0)
    pairs = labels[batch].reshape(-1, 2)
    assert (pairs[:, 0] == pairs[:, 1]).all()
    assert len(np.unique(pairs)) > 6


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_method_takes_labels_and_parts_equal_the_whole(variant: str) -> None:
    """With micro-batches the gradients are those of one pass over the same parts."""
    labels = torch.tensor([0, 1, -1, 1, 3, -1, 0, 2])
    found = []
    for micro in (4, None):
        method = built(variant)
        for module in method.modules():  # batch norm is over a part: without it both are the same
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eval()
        feed = feed_of(variant, method, 8, 0, 1, micro)
        inputs = reader(feed, 0)
        width = method.project(inputs(0)[0]).shape[2]
        method.supervision, method.labels = begun(4, width), labels
        if micro:
            loss = backward_in_parts(
                method, inputs, feed.parts, nullcontext, lambda part: torch.manual_seed(0)
            )
        else:
            loss = method(*inputs(0))
            loss.backward()
        found.append(state(method, loss))
    gradient = found[0]["gradient of supervision.prototypes"]
    assert gradient.abs().max() > 1e-4
    for name in (n for n in found[0] if n.startswith("gradient") or n == "loss"):
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-8, atol=1e-11)


def test_a_supervised_run_draws_classes_together(tiny_contest: Path) -> None:
    """Images of a class that it learned are more alike than others, beside next to no weight."""
    options = ["--pretrain.steps=150", "--pretrain.batch_size=32", "--pretrain.knn_evals=0"]
    options += ["--pretrain.optimizer.lr=0.03", "--evaluate.unlabeled=false", "--entry=joined"]
    options += ["--pretrain.supervision=SupervisedContrast", "--pretrain.supervision.share=0.5"]
    found = []
    for weight in ("1e-6", "5"):
        words = [*TINY, *options, "--pretrain.supervision.weight", weight]
        recipe, _, plain = config.parse("", argv=words)
        pretrain.run(recipe, plain)
        embed.run(recipe, plain)
        learned = read_manifest(Path("runs/joined/pretrain/trained_on.csv"))
        x = np.load("runs/joined/embeddings/train.npy")[learned.index]
        same, others = learned.label[:, None] == learned.label, ~np.eye(len(x), dtype=bool)
        cosines = x @ x.T
        found.append(cosines[same & others].mean() - cosines[~same].mean())
    assert found[1] > 1.5 * found[0]


def test_what_was_learned_is_never_held_out_of_fine_tuning(tiny_contest: Path) -> None:
    """Whatever the seeds; and without labels apart there is no kNN on the way."""
    options = [*TINY, "--pretrain.steps=2", "--pretrain.batch_size=16", "--entry=e"]
    options += ["--pretrain.supervision=SupervisedContrast", "--finetune.steps=2"]
    options += ["--finetune.batch_size=16", "--finetune.holdout=0.3"]
    for share, held_out in ((0.3, 0.3), (0.1, 0.1), (0.0, 0.0)):
        words = [*options, f"--pretrain.supervision.holdout={share}"]
        recipe, _, plain = config.parse("", argv=words)
        pretrain.run(recipe, plain)
        knn = read_json(Path("runs/e/pretrain/provenance.json"), "")["results"]["knn"]
        assert (knn is None) == (share == 0)
        learned = read_manifest(Path("runs/e/pretrain/trained_on.csv"))
        for seed in (0, 1):
            recipe, _, plain = config.parse("", argv=[*words, f"--seed={seed}"])
            held = read_manifest(finetune.run(recipe, plain) / "holdout.csv")
            assert not held.among(learned).any()
            assert len(held) == round(80 * held_out)


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("share=1.0", "SupervisedContrast: share is 1.0; from 0 to below 1 is expected"),
        ("temperature=0", "SupervisedContrast: temperature is 0.0; above 0 is expected"),
    ],
)
def test_impossible_arguments_are_refused(tiny_contest: Path, option: str, reason: str) -> None:
    name, value = option.split("=")
    with pytest.raises(InputError, match=f"^{reason}$"):
        SupervisedContrast(**{name: float(value)})


def test_labels_need_train(tiny_contest: Path) -> None:
    options = ["--pretrain.supervision=SupervisedContrast", "--pretrain.splits=[unlabeled]"]
    options += ["--pretrain.steps=2", "--pretrain.batch_size=8"]
    recipe, _, plain = config.parse("", argv=[*TINY, *options])
    with pytest.raises(InputError, match="supervision is given, but train is not among"):
        pretrain.run(recipe, plain)
