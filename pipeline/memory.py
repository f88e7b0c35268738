"""What a method remembers beside its weights: slow copies of networks, queues of embeddings."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@torch.no_grad()
def follow(slow: nn.Module, fast: nn.Module, momentum: float) -> None:
    """Every parameter of `slow` becomes momentum · its own + (1 - momentum) · that of `fast`."""
    torch._foreach_lerp_(list(slow.parameters()), list(fast.parameters()), 1 - momentum)


def rising(start: float, end: float, progress: float) -> float:
    """From `start` to `end` along half a cosine of `progress` (0 to 1); BYOL's schedule with end 1
    (arXiv 2006.07733, section 3.2).
    """
    return end - (end - start) * (math.cos(math.pi * progress) + 1) / 2


class Queue(nn.Module):
    """A ring of the newest embeddings, `entries` [rows, length, d], the same on every rank.

    It takes pushes of any size, without a synchronization: where the next entry goes (`head`) and
    in which push each came (`born`, -1 for the random unit vectors it starts with) stay on the
    device.  All of it is in the state_dict.
    """

    entries: Tensor
    born: Tensor
    head: Tensor
    pushes: Tensor

    def __init__(self, length: int, width: int, rows: int = 1) -> None:
        super().__init__()
        self.register_buffer("entries", F.normalize(torch.randn(rows, length, width), dim=2))
        self.register_buffer("born", torch.full((length,), -1))
        self.register_buffer("head", torch.zeros((), dtype=torch.int64))
        self.register_buffer("pushes", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, new: Tensor) -> None:
        """Put `new` [rows, b, d] in the place of the oldest entries."""
        length = self.entries.shape[1]
        new = new[:, -length:].to(self.entries.dtype)
        places = (self.head + torch.arange(new.shape[1], device=new.device)) % length
        self.entries.index_copy_(1, places, new)
        self.born.index_copy_(0, places, self.pushes.expand(len(places)))
        self.head.add_(new.shape[1]).remainder_(length)
        self.pushes.add_(1)

    def age(self) -> Tensor:
        """The mean number of pushes since an entry came; entries of the start count as the
        oldest.
        """
        return (self.pushes - 1 - self.born).to(torch.float32).mean()
