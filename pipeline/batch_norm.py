"""Batch norm over the images that it should see: of all ranks, or of a group within a batch."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.distributed import all_reduce, world_size


class _Replacement(_BatchNorm):
    """A batch norm in the place of another, with its parameters and buffers, of any rank of input.

    Where timm fuses dropout and activation into the layer, they are kept.
    """

    def __init__(self, layer: _BatchNorm) -> None:
        super().__init__(
            layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats
        )
        self._parameters, self._buffers = layer._parameters, layer._buffers
        self.drop, self.act = getattr(layer, "drop", None), getattr(layer, "act", None)

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def _train(self, x: Tensor) -> Tensor:
        """`x` normalized by the statistics of training."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        x = self._train(input) if self.training else super().forward(input)
        x = x if self.drop is None else self.drop(x)
        y: Tensor = x if self.act is None else self.act(x)
        return y


class ReducedBatchNorm(_Replacement):
    """Batch norm with statistics over the batches of all ranks, on any device.

    torch's SyncBatchNorm has no CPU path; this is its equal there (same parameters and buffers).
    """

    def _train(self, x: Tensor) -> Tensor:
        if world_size() == 1:
            return super(_Replacement, self).forward(x)
        dims = [d for d in range(x.ndim) if d != 1]
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        count = wide.numel() / wide.shape[1]
        sums = all_reduce(torch.cat([wide.sum(dims), wide.new_full((1,), count)]))
        n = float(sums[-1].detach())
        mean = sums[:-1] / n
        shape = [1, -1] + [1] * (x.ndim - 2)
        centered = wide - mean.view(shape)
        var = all_reduce(centered.square().sum(dims)) / n
        if self.track_running_stats and self.running_mean is not None:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
                momentum = self.momentum
                if momentum is None:
                    momentum = 1 / float(self.num_batches_tracked)  # type: ignore[arg-type]
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
                unbiased = (var * n / (n - 1)).to(self.running_mean.dtype)
                self.running_var.lerp_(unbiased, momentum)  # type: ignore[union-attr]
        y = centered * (var + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)


class SplitBatchNorm(_Replacement):
    """Batch norm that treats every `group` consecutive images as a batch of their own.

    It is what MoCo's several GPUs do to a batch (arXiv 1911.05722, section 3.3), on any number of
    them.  The running statistics take one step a batch, towards the mean of the groups'.
    """

    def __init__(self, layer: _BatchNorm, group: int) -> None:
        super().__init__(layer)
        self.group = group

    def _train(self, x: Tensor) -> Tensor:
        parts = x.tensor_split(groups(len(x), self.group))
        if not self.track_running_stats or self.running_mean is None:
            return torch.cat([self._normalize(part, None, None) for part in parts])
        assert self.running_var is not None
        means = self.running_mean.repeat(len(parts), 1)  # [groups, c], each moved by its group
        variances = self.running_var.repeat(len(parts), 1)
        zipped = zip(parts, means, variances, strict=True)
        y = torch.cat([self._normalize(*of_group) for of_group in zipped])
        with torch.no_grad():  # of the groups of all ranks, so that all keep the same
            moved = all_reduce(torch.stack([means.mean(0), variances.mean(0)])) / world_size()
            self.running_mean.copy_(moved[0])
            self.running_var.copy_(moved[1])
        self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        return y

    def _normalize(self, x: Tensor, mean: Tensor | None, variance: Tensor | None) -> Tensor:
        momentum = 0.1 if self.momentum is None else self.momentum
        return F.batch_norm(x, mean, variance, self.weight, self.bias, True, momentum, self.eps)


def groups(images: int, size: int) -> int:
    """The number of groups of about `size` among so many images."""
    return max(1, round(images / size))


def split_batch_norm(module: nn.Module, group: int) -> nn.Module:
    """`module` with every batch norm over groups of `group` images."""
    if isinstance(module, _BatchNorm):
        return SplitBatchNorm(module, group)
    for name, child in module.named_children():
        setattr(module, name, split_batch_norm(child, group))
    return module


def synchronize_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` with batch norm over all ranks: torch's on a GPU, `ReducedBatchNorm` on a CPU;
    `SplitBatchNorm` stays.
    """
    if world_size() == 1 or isinstance(module, SplitBatchNorm):
        return module
    if isinstance(module, _BatchNorm):
        if device.type != "cuda":
            return ReducedBatchNorm(module)
        from timm.layers import convert_sync_batchnorm

        return convert_sync_batchnorm(module)  # type: ignore[no-any-return]
    for name, child in module.named_children():
        setattr(module, name, synchronize_batch_norm(child, device))
    return module


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """In the block batch norm in training mode leaves its running statistics alone."""
    layers = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    try:
        for layer in layers:
            layer.track_running_stats = False
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
