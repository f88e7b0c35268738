"""Queues keep the newest entries whatever the size of a push; slow copies follow."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipeline.memory import Queue, follow, rising


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_a_queue_holds_the_newest(length: int, pushes: list[int]) -> None:
    """Any batch size, also one that does not divide the length or is larger."""
    queue, every = Queue(length, 3, rows=2), []
    start = queue.entries.clone()
    for number, size in enumerate(pushes):
        new = torch.randn(2, size, 3)
        queue.push(new)
        every += [(number, new[:, k]) for k in range(size)]
    newest = every[-length:]
    found = {int(b): 0 for b in queue.born}
    for number, entry in newest:
        same = (queue.entries == entry[:, None]).all(2).all(0)
        assert same.sum() == 1
        assert queue.born[same] == number
        found[number] += 1
    old = max(0, length - len(every))
    assert (queue.born == -1).sum() == old
    assert sum((queue.entries[:, k] == start[:, k]).all() for k in range(length)) >= old
    age = [len(pushes) - 1 - number for number, _ in newest] + [len(pushes)] * old
    assert queue.age().item() == pytest.approx(sum(age) / length)


def test_a_queue_starts_at_random_unit_vectors_and_is_in_the_state() -> None:
    queue = Queue(5, 7)
    torch.testing.assert_close(queue.entries.norm(dim=2), torch.ones(1, 5))
    queue.push(torch.randn(1, 3, 7))
    other = Queue(5, 7)
    other.load_state_dict(queue.state_dict())
    new = torch.randn(1, 4, 7)
    queue.push(new), other.push(new)
    for name, value in queue.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_a_slow_copy_follows_by_the_momentum() -> None:
    slow, fast = nn.Linear(3, 2), nn.Linear(3, 2)
    expected = 0.9 * slow.weight.detach() + 0.1 * fast.weight.detach()
    follow(slow, fast, 0.9)
    torch.testing.assert_close(slow.weight, expected)
    follow(slow, fast, 0.0)
    torch.testing.assert_close(slow.bias, fast.bias)


def test_the_momentum_rises_along_half_a_cosine() -> None:
    """Equation of arXiv 2006.07733, section 3.2: 1 - (1 - τ) · (cos(π k / K) + 1) / 2."""
    for k in range(11):
        paper = 1 - (1 - 0.996) * (math.cos(math.pi * k / 10) + 1) / 2
        assert rising(0.996, 1.0, k / 10) == pytest.approx(paper)
    assert rising(0.99, 0.99, 0.3) == pytest.approx(0.99)
