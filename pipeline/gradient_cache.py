"""The gradient of a batch that is larger than the memory, by two passes over its parts."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from pipeline.batch_norm import frozen_statistics
from pipeline.distributed import average_gradients, gather, rank, world_size
from pipeline.methods.base import Method


def backward_in_parts(
    method: Method,
    inputs: Callable[[int], tuple[list[Tensor], list[Tensor]]],
    parts: int,
    autocast: Callable[[], AbstractContextManager[None]],
    seed: Callable[[int], object],
) -> Tensor:
    """Add the gradients of a batch-coupled loss to the parameters; the loss, without graph.

    They are those of one pass in which the encoder sees the same parts (batch norm is over a part),
    as the loss depends on an image through its projection alone: all projections without graph, the
    loss and its gradient on the whole batch, each part again with graph.  `inputs(reading)` are the
    queried and keyed views of a part on this process, for reading = 0 … 2·parts - 1, the keyed ones
    needed in the first pass only; `seed(part)` makes dropout repeat itself.  Batch norm's
    statistics are updated in the second pass, those of a slow copy in the first.  Source: arXiv
    2101.06983, section 3.2.
    """
    whole, keys, own = torch.empty(0), [], 0
    with torch.no_grad():
        for part in range(parts):
            queried, keyed = inputs(part)
            seed(part)
            with autocast():
                with frozen_statistics(method):
                    z = method.project(queried)
                keys.append(method.gathered_target(keyed))
            # a process holds a slice of each part: the batch is the parts one after the other
            own, of_all = z.shape[1], gather(z, dim=1)
            if part == 0:
                views, size, width = of_all.shape
                whole = of_all.new_empty(views, parts * size, width)  # [v, B, d]
            whole[:, part * size : (part + 1) * size] = of_all
    whole.requires_grad_()
    targets = [k for k in keys if k is not None]
    del z, of_all
    loss = method.loss_of(whole, torch.cat(targets, 1) if targets else None)
    loss.backward()
    loss = loss.detach()  # or its graph would keep the whole batch
    grad = whole.grad
    assert grad is not None
    del whole, targets, keys
    for part, of_part in enumerate(grad.chunk(parts, 1)):
        queried, _ = inputs(parts + part)
        seed(part)
        with autocast():
            z = method.project(queried)
        mine = of_part[:, rank() * own : (rank() + 1) * own]
        z.backward(mine.to(z.dtype) * world_size())
    average_gradients(method)
    return loss
