"""A budget in epochs, steps or minutes as a number of steps at each resolution, and what a run
took.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline import InputError


@dataclass(frozen=True)
class Plan:
    """How many steps are made at which resolution, one after the other."""

    resolutions: list[int]
    steps: list[int]
    costs: list[float] | None = None
    """Of a step at each, as calibrated; None takes its pixels."""

    @property
    def total(self) -> int:
        return sum(self.steps)

    def share(self, step: int) -> float:
        """How much of the run's work, 0 to 1, is done before `step`."""
        costs = self.costs or [float(r * r) for r in self.resolutions]
        done = 0.0
        for cost, steps in zip(costs, self.steps, strict=True):
            done += cost * min(step, steps)
            step -= min(step, steps)
        return min(1.0, done / sum(c * n for c, n in zip(costs, self.steps, strict=True)))

    def resolution(self, step: int) -> int:
        for size, steps in zip(self.resolutions, self.steps, strict=True):
            if step < steps:
                return size
            step -= steps
        return self.resolutions[-1]


def check_budget(config: Any) -> None:
    """Raise InputError where `config` has neither epochs nor steps nor minutes."""
    if config.epochs is config.steps is config.minutes is None:
        raise InputError("a budget is expected: epochs, steps or minutes, in the recipe's section")


def plan_steps(
    config: Any, images: int, resolutions: list[int], seconds: Callable[[int], float]
) -> Plan:
    """A budget in epochs, steps or minutes as steps; resolutions share it equally in its own unit.

    `config` has the fields epochs, steps, minutes and batch_size; `seconds(resolution)` times one
    step and is called for a budget in minutes only.
    """
    check_budget(config)
    if config.minutes is not None:
        share = 60 * config.minutes / len(resolutions)
        costs = [seconds(r) for r in resolutions]
        return Plan(resolutions, [max(1, round(share / cost)) for cost in costs], costs)
    total = config.steps or max(1, round(config.epochs * images / config.batch_size))
    ends = [round(total * (k + 1) / len(resolutions)) for k in range(len(resolutions))]
    return Plan(resolutions, [b - a for a, b in zip([0, *ends], ends, strict=False)])


def minutes_of(history: Sequence[dict[str, float]], batch_size: int) -> float:
    """Minutes of training, those before an interruption too; what was measured on the way is left
    out.
    """
    logged = [h for h in history if "images_per_second" in h]
    steps = np.diff([0, *(h["step"] for h in logged)])
    return float(sum(steps * batch_size / [h["images_per_second"] for h in logged]) / 60)
