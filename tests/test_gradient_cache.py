"""A batch in parts has the gradient of the whole batch, for every method."""

import weakref
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline import InputError, config
from pipeline.gradient_cache import backward_in_parts
from pipeline.methods.base import Method
from pipeline.runs import read_json
from stages import pretrain

from .conftest import TINY
from .small_methods import METHODS, VARIANTS, SmallEncoder, built, feed_of, reader, small, state

BATCH, PART, STEPS = 12, 4, 3


def in_one_pass(method: Method, inputs, parts: int) -> Tensor:  # type: ignore[no-untyped-def]
    """The loss of the whole batch in one graph, the encoder seeing it part by part."""
    rows, keys = [], []
    for part in range(parts):
        queried, keyed = inputs(part)
        torch.manual_seed(part)
        rows.append(method.project(queried))
        keys.append(method.gathered_target(keyed))
    targets = [k for k in keys if k is not None]
    loss = method.loss_of(torch.cat(rows, 1), torch.cat(targets, 1) if targets else None)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss


def train(variant: str, cached: bool) -> list[dict[str, Tensor]]:
    """Loss, gradients and buffers at each of some steps of SGD, with dropout in the encoder."""
    method = built(variant, dropout=0.3)
    optimizer = torch.optim.SGD(method.parameters(), 0.05, momentum=0.9)
    feed, found = feed_of(variant, method, BATCH, 0, 1, PART), []
    for step in range(STEPS):
        inputs = reader(feed, step)
        if cached:
            loss = backward_in_parts(method, inputs, feed.parts, nullcontext, torch.manual_seed)
        else:
            loss = in_one_pass(method, inputs, feed.parts)
        found.append(state(method, loss))
        method.before_update(step / STEPS)
        optimizer.step()
        optimizer.zero_grad()
        method.after_update(step / STEPS)
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_one_pass(variant: str) -> None:
    """Three steps in float64: losses, all gradients, queues and batch-norm statistics, which are
    updated once.
    """
    for got, expected in zip(train(variant, True), train(variant, False), strict=True):
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(
                got[key], value, rtol=1e-9, atol=1e-13, msg=lambda m, k=key: f"{k}: {m}"
            )


def test_one_part_is_the_whole_batch() -> None:
    """With batch norm over the whole batch both ways are the plain step."""
    variant = "SimCLR"
    plain, cached = built(variant), built(variant)
    inputs = reader(feed_of(variant, plain, BATCH, 0, 1), 0)
    loss = plain(*inputs(0))
    loss.backward()
    got = backward_in_parts(cached, lambda _: inputs(0), 1, nullcontext, torch.manual_seed)
    expected = state(plain, loss)
    for key, value in state(cached, got).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=1e-12)


def test_the_graph_of_one_part_only_is_alive() -> None:
    """While a part goes backward no other part's activations are held."""
    alive: list[int] = []

    class Counting(SmallEncoder):
        def forward(self, x: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                alive.append(len(x))
            return super().forward(x)

    method = small("SimCLR", Counting()).double()
    feed = feed_of("SimCLR", method, BATCH, 0, 1, PART)
    backward_in_parts(method, reader(feed, 0), feed.parts, nullcontext, torch.manual_seed)
    assert alive == [2 * PART] * 3  # two views of a part in one batch


MOCO = ["--pretrain.method=MoCo", "--pretrain.method.bn_group=4"]
OPTIONS = ["--pretrain.batch_size=16", "--pretrain.steps=4", "--pretrain.log_steps=1"]


def test_the_projections_of_the_batch_go_before_the_second_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method = built("SimCLR")
    feed = feed_of("SimCLR", method, BATCH, 0, 1, PART)
    seen, alive = list[weakref.ref[Tensor]](), list[bool]()
    loss_of, project = method.loss_of, method.project

    def watched(projections: Tensor, targets: Tensor | None) -> Tensor:
        seen.append(weakref.ref(projections))
        return loss_of(projections, targets)

    def looking(views: list[Tensor]) -> Tensor:
        alive.extend(ref() is not None for ref in seen)
        return project(views)

    monkeypatch.setattr(method, "loss_of", watched)
    monkeypatch.setattr(method, "project", looking)
    backward_in_parts(method, reader(feed, 0), feed.parts, nullcontext, torch.manual_seed)
    assert alive == [False] * feed.parts


def losses(entry: str, *options: str) -> list[float]:
    recipe, _, plain = config.parse("", argv=[*TINY, *OPTIONS, f"--entry={entry}", *options])
    pretrain.run(recipe, plain)
    history = read_json(Path(f"runs/{entry}/pretrain/history.json"), "")
    return [h["loss"] for h in history if "loss" in h]


@pytest.mark.parametrize("method", METHODS)
def test_the_stage_takes_a_micro_batch(tiny_contest: Path, method: str) -> None:
    options = [f"--pretrain.method={method}", "--pretrain.micro_batch=8"]
    if method == "MoCo":
        options += ["--pretrain.method.bn_group=4", "--pretrain.method.queue=32"]
    if method in ("BarlowTwins", "BYOL", "SelfClassifier"):
        options += ["--pretrain.method.hidden=64", "--pretrain.method.output=32"]
    assert len(losses(method, *options)) == 4


def test_groups_of_moco_are_the_same_in_parts(tiny_contest: Path) -> None:
    """Batch norm over groups: the whole batch at once and in parts make the same steps."""
    common = ["--pretrain.method=MoCo", "--pretrain.method.bn_group=4", "--pretrain.precision=no"]
    common += ["--pretrain.method.queue=32"]
    whole, parts = losses("a", *common), losses("b", *common, "--pretrain.micro_batch=4")
    assert parts == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pretrain.micro_batch=5"], "batch_size is 16 and micro_batch 5; a multiple"),
        (["--pretrain.micro_batch=1"], "pretrain: micro_batch is 1; 2 or more is expected"),
        (
            ["--pretrain.micro_batch=2", *MOCO],
            "MoCo: batch norm is over groups of 4 images, but a process takes 2 at a time",
        ),
        (
            ["--pretrain.method=MoCo", "--pretrain.method.bn_group=8", "--pretrain.batch_size=12"],
            "MoCo: batch norm is over groups of 8 images and batch_size is 12; two groups or more",
        ),
        (
            [*MOCO, "--pretrain.views=[{count: 3}]"],
            "MoCo takes 2 views of an image; 3 are in the recipe",
        ),
    ],
)
def test_what_makes_no_sense_is_one_clear_line(
    tiny_contest: Path, options: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        losses("bad", *options)
