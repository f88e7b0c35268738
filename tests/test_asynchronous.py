"""No step waits for the GPU: nothing is read back, and nothing copied but what is fetched ahead.

The meta device stands for the GPU here: its tensors cannot be read, and what comes from the host is
seen by a dispatch mode.
"""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.batches import prefetch
from pipeline.classifiers import Classifier, Supervised
from pipeline.consistency import FixMatch, FreeMatch, SemiSupervised
from pipeline.feed import Feed, JoinedFeed
from pipeline.machine import make_accelerator
from pipeline.optim import Optimizer, build_optimizer
from pipeline.packed import Pool
from pipeline.supervision import SupervisedContrast
from pipeline.trainer import Trainer
from pipeline.views import View
from tests.small_methods import VARIANTS, SmallEncoder, built, feed_of

META = torch.device("meta")
EVERYTHING = View(1, rotation_p=0.5, solarize_p=0.5, erase_p=0.5)


@pytest.fixture(autouse=True)
def _autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device knows no autocast."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


class Lists(TorchFunctionMode):
    """Tensors made on the device from numbers of the host, which dispatch does not see."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = func in (torch.tensor, torch.as_tensor) and out.is_meta
        if func.__name__ in ("__getitem__", "__setitem__") and args[0].is_meta:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            made = any(isinstance(i, (list, np.ndarray)) for i in index)
            made |= any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in index)
        if made:
            self.found.append(func.__name__)
        return out


class Copies(TorchDispatchMode):
    """The operations that take a tensor of the host to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        copy = "copy" in str(func)  # other operations take scalars of the host as numbers
        from_host = any(t.device.type == "cpu" and (t.ndim or copy) for t in given)
        if from_host and any(t.is_meta for t in made):
            self.found.append(str(func))
        return out


def copies_of(feed: Feed | JoinedFeed, module: nn.Module) -> list[str]:
    """What a second step copies from the host, fetching apart, in views, forward and backward."""
    module.to(META)
    for step in range(2):
        fetched = feed.fetch(step)
        with Copies() as copies, Lists(copies.found):
            module(*feed.inputs(fetched, step, 16)).backward()  # type: ignore[arg-type]
            module.before_update(0.5)  # type: ignore[operator]
            module.after_update(0.5)  # type: ignore[operator]
    return copies.found


@pytest.mark.parametrize("variant", VARIANTS)
def test_pretraining_waits_for_nothing(variant: str) -> None:
    method = built(variant).float()
    feed = feed_of(variant, method, 8, 0, 1)
    feed.device = META
    assert copies_of(feed, method) == []


def test_supervised_pretraining_waits_for_nothing() -> None:
    method = built("SimCLR").float()
    method.supervision = SupervisedContrast()
    method.supervision.begin(3, 5)
    method.labels = torch.arange(8, device=META) % 3
    feed = feed_of("SimCLR", method, 8, 0, 1)
    feed.device = META
    assert copies_of(feed, method) == []


@pytest.mark.parametrize("mix", [{"mixup": 0.2}, {"cutmix": 1.0}])
@pytest.mark.parametrize("consistency", [None, FixMatch, FreeMatch])
def test_fine_tuning_waits_for_nothing(
    consistency: type[FixMatch | FreeMatch] | None, mix: dict[str, float]
) -> None:
    pool = Pool([(np.zeros((40, 16, 16, 3), np.uint8), np.arange(40))])
    accelerator: Any = SimpleNamespace(
        device=META, num_processes=1, process_index=0, mixed_precision="no"
    )
    further = 5, [0.5] * 3, [0.25] * 3, accelerator
    own = Feed(pool, [EVERYTHING], 8, *further, (torch.arange(40) % 3, torch.ones(40)))
    classifier = Classifier(SmallEncoder(), nn.Linear(8, 3))
    options = {"label_smoothing": 0.1, "ema": 0.9, **mix}
    if consistency is None:
        assert copies_of(own, Supervised(classifier, 3, **options)) == []
        return
    loss = consistency(ratio=2)
    loss.begin(torch.ones(3) / 3)
    both = JoinedFeed(own, Feed(pool, [View(1), EVERYTHING], 16, *further))
    assert copies_of(both, SemiSupervised(classifier, 3, loss, **options)) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU is expected")
@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_waits_on_a_gpu(variant: str, tmp_path: Path) -> None:
    """The whole step, fetching and the optimizer (SGD) too, where CUDA itself says what waits."""
    method, accelerator = built(variant).float(), make_accelerator("no", tmp_path)
    feed = feed_of(variant, method, 8, 0, 1)
    feed.device = accelerator.device
    optimizer = build_optimizer(Optimizer(), {method: 1.0}, 8)
    trainer = Trainer(method, optimizer, accelerator, tmp_path, {}, feed, lambda _: 0.1)
    fetched = prefetch(feed.fetch, 0, 8)
    try:
        for step in range(8):
            if step == 2:  # constants are there
                torch.cuda.set_sync_debug_mode("error")
            trainer.step(fetched, step, 16, step / 8)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer._losses[:8].isfinite().all()


def test_a_copy_is_seen() -> None:
    x = torch.ones(3, device=META)
    for copy in (
        lambda: x + torch.ones(3).to(META),
        lambda: x + torch.tensor(1.0).to(META),
        lambda: x[[2, 0]],
        lambda: x.__setitem__(x > 0, 0.0),
        lambda: torch.tensor([1.0], device=META),
    ):
        with Copies() as copies, Lists(copies.found):
            copy()
        assert copies.found
    with pytest.raises(RuntimeError):
        x.sum().item()
