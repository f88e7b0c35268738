"""Batch norm over groups of a batch is batch norm of each group alone."""

import copy

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from pipeline.batch_norm import (
    SplitBatchNorm,
    frozen_statistics,
    split_batch_norm,
    synchronize_batch_norm,
)
from pipeline.encoders import build_encoder
from pipeline.methods.moco import MoCo

from .small_methods import SmallEncoder, built, feed_of, reader, small


@pytest.mark.parametrize(("images", "sizes"), [(8, [4, 4]), (4, [4]), (3, [3]), (10, [5, 5])])
def test_a_group_is_a_batch_of_its_own(images: int, sizes: list[int]) -> None:
    layer = nn.BatchNorm2d(3).double()
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    split = SplitBatchNorm(copy.deepcopy(layer), 4)
    x = torch.randn(images, 3, 5, 5, dtype=torch.float64)
    alone = [copy.deepcopy(layer) for _ in sizes]
    expected = torch.cat([bn(part) for bn, part in zip(alone, x.split(sizes), strict=True)])
    torch.testing.assert_close(split(x), expected)
    mean = torch.stack([bn.running_mean for bn in alone]).mean(0)  # type: ignore[arg-type]
    torch.testing.assert_close(split.running_mean, mean)
    assert split.num_batches_tracked == 1
    split.eval(), layer.load_state_dict(split.state_dict()), layer.eval()
    torch.testing.assert_close(split(x), layer(x))


def test_a_whole_encoder_by_groups() -> None:
    """Also where timm fuses batch norm and activation (RexNet)."""
    for name in ("resnet10t", "rexnet_100"):
        torch.manual_seed(0)
        encoder = build_encoder(name).double()
        split = split_batch_norm(copy.deepcopy(encoder), 3)
        encoder.train(), split.train()
        assert split.state_dict().keys() == encoder.state_dict().keys()
        assert not any(type(m) in (nn.BatchNorm2d, BatchNormAct2d) for m in split.modules())
        x = torch.randn(6, 3, 64, 64, dtype=torch.float64)
        torch.manual_seed(1)
        expected = torch.cat([encoder(x[:3]), encoder(x[3:])])
        if name == "resnet10t":  # without dropout
            torch.testing.assert_close(split(x), expected)


def test_moco_keeps_its_groups_when_others_are_synchronized(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipeline.batch_norm.world_size", lambda: 2)
    method = synchronize_batch_norm(small("MoCo"), torch.device("cpu"))
    assert any(isinstance(m, SplitBatchNorm) for m in method.modules())
    names = {type(m).__name__ for m in method.modules()}
    assert "ReducedBatchNorm" not in names
    assert "ReducedBatchNorm" in {
        type(m).__name__
        for m in synchronize_batch_norm(small("SimCLR"), torch.device("cpu")).modules()
    }


@pytest.mark.parametrize(("batch", "group"), [(256, 32), (12, 4), (10, 4), (7, 2), (3, 32)])
def test_mocos_keys_are_grouped_otherwise_than_its_queries(batch: int, group: int) -> None:
    """A permutation in which a group of keys has images of as many groups of queries as can be."""
    method = MoCo(SmallEncoder(), queue=4, bn_group=group)
    order = method.target_order(batch)
    assert order is not None
    assert sorted(order.tolist()) == list(range(batch))
    count = max(1, round(batch / group))
    of_query = torch.cat(
        [torch.full((len(p),), k) for k, p in enumerate(torch.arange(batch).tensor_split(count))]
    )
    for keys in order.tensor_split(count):
        assert len(of_query[keys].unique()) == min(count, len(keys))


def test_without_groups_keys_come_as_they_are() -> None:
    assert MoCo(SmallEncoder(), queue=4, bn_group=0).target_order(8) is None
    bare = nn.Sequential(nn.Flatten(), nn.Linear(12, 8))  # no batch norm, nothing to guard
    bare.num_features = 8  # type: ignore[assignment]
    assert MoCo(bare, queue=4, bn_group=4).target_order(8) is None


def test_frozen_statistics_stay() -> None:
    layer = nn.BatchNorm1d(3)
    x = torch.randn(4, 3) + 5
    with frozen_statistics(layer):
        frozen = layer(x)
    assert torch.equal(layer.running_mean, torch.zeros(3))  # type: ignore[arg-type]
    assert layer.num_batches_tracked == 0
    torch.testing.assert_close(frozen, layer(x))  # by the batch's statistics all the same
    assert layer.num_batches_tracked == 1


def test_a_query_meets_its_own_key_whatever_the_order() -> None:
    """With the statistics of evaluation groups make no difference, if keys are put in order again:
    in a batch at once, and in what a feed reads for the slow copy.
    """
    method = built("MoCo, symmetric").eval()
    feed = feed_of("MoCo, symmetric", method, 12, 0, 1)
    views, keys = reader(feed, 0)(0)
    in_order = reader(feed_of("MoCo, symmetric", built("SimCLR"), 12, 0, 1), 0)(0)[0]
    assert not torch.equal(keys[0], in_order[0])
    fed, at_once = method(views, keys), method(in_order)
    method.group = 1  # nothing is put in another order
    expected = method(in_order, in_order)
    torch.testing.assert_close(fed, expected)
    torch.testing.assert_close(at_once, expected)
