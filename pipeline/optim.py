"""Optimizers, parameter groups and learning-rate schedules."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline import InputError
from pipeline.checks import check


@dataclass(frozen=True)
class Optimizer:
    """An optimizer with warm-up and cosine decay."""

    name: Literal["sgd", "adam", "adamw", "lars"] = "sgd"
    """SGD with momentum, Adam, AdamW, or LARS (arXiv 1708.03888)."""
    lr: float = 0.06
    """Learning rate at `lr_batch` images; see `lr_rule`."""
    lr_rule: Literal["constant", "linear", "sqrt"] = "linear"
    """How the rate follows the global batch: rate × batch / lr_batch, × its square root, or not
    at all.
    """
    lr_batch: int = 256
    """The batch that `lr` was stated for."""
    momentum: float = 0.9
    """Momentum of SGD and LARS."""
    nesterov: bool = False
    """Nesterov momentum in SGD."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's and AdamW's."""
    weight_decay: float = 5e-4
    """Weight decay; biases and normalization weights are excluded."""
    bias_lr: float = 1.0
    """Factor of the rate of biases and normalization weights (Barlow Twins with LARS: 7.5e-4)."""
    trust: float = 1e-3
    """LARS: the trust coefficient."""
    warmup: float = 0.05
    """Fraction of the run with a linearly growing rate."""
    final_lr: float = 0.0
    """Fraction of the rate that is left at the end of the cosine."""

    def __post_init__(self) -> None:
        for expected, names in (
            ("above 0", ["lr", "lr_batch", "trust"]),
            ("0 or more", ["bias_lr", "weight_decay", "final_lr"]),
            ("from 0 to below 1", ["warmup", "momentum"]),
        ):
            check("optimizer", expected, **{name: getattr(self, name) for name in names})
        for beta in self.betas:
            check("optimizer", "from 0 to below 1", betas=beta)
        if self.nesterov and not self.momentum:
            raise InputError("optimizer: nesterov is true and momentum 0; above 0 is expected")

    def scaled_lr(self, batch: int) -> float:
        """The learning rate at this global batch."""
        factor = batch / self.lr_batch
        return (
            self.lr * {"constant": 1.0, "linear": factor, "sqrt": math.sqrt(factor)}[self.lr_rule]
        )


def schedule(progress: float, warmup: float, final: float = 0.0) -> float:
    """Factor of the learning rate at `progress` (0 to 1): linear warm-up, then half a cosine."""
    if progress < warmup:
        return progress / warmup
    along = min((progress - warmup) / (1 - warmup), 1.0)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * along))


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rates: SGD with momentum whose step is scaled by trust · |w| / |g| per
    tensor.

    Groups with `adapt=False` (biases, normalization) take plain SGD steps, as SimCLR's code
    excludes them.  Source: arXiv 1708.03888, algorithm 1, with the decay inside the gradient.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 1e-3,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust}
        super().__init__(params, defaults | {"adapt": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads: list[Tensor] = list(
                torch._foreach_add([p.grad for p in params], params, alpha=group["weight_decay"])
            )
            if group["adapt"]:
                w, g = torch._foreach_norm(params), torch._foreach_norm(grads)
                rates = [
                    torch.where((a > 0) & (b > 0), group["trust"] * a / b, 1.0)
                    for a, b in zip(w, g, strict=True)
                ]
                torch._foreach_mul_(grads, rates)
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, grads)
            torch._foreach_add_(params, buffers, alpha=-group["lr"])


def parameter_groups(
    modules: dict[nn.Module, float], weight_decay: float, bias_lr: float = 1.0
) -> list[dict[str, Any]]:
    """Groups for each module and rate factor: weights with decay; biases and norms (1-D) without.

    `modules` maps a module to the factor of its learning rate, kept in the group as `lr_factor`,
    for biases and norms times `bias_lr`.
    """
    groups = []
    for module, factor in modules.items():
        params = [p for p in module.parameters() if p.requires_grad]
        for flat in (False, True):
            chosen = [p for p in params if (p.ndim <= 1) == flat]
            decay = 0.0 if flat else weight_decay
            if chosen:
                groups.append(
                    {
                        "params": chosen,
                        "weight_decay": decay,
                        "adapt": not flat,
                        "lr_factor": factor * (bias_lr if flat else 1.0),
                    }
                )
    return groups


def build_optimizer(
    config: Optimizer, modules: dict[nn.Module, float], batch: int
) -> torch.optim.Optimizer:
    """The optimizer over `parameter_groups`, at the rate that `config` gives for this global batch.

    A group's rate is set in every step by `set_lr`.
    """
    groups = parameter_groups(modules, config.weight_decay, config.bias_lr)
    lr = config.scaled_lr(batch)
    if config.name == "lars":
        return LARS(groups, lr, config.momentum, trust=config.trust)
    for group in groups:
        del group["adapt"]
    if config.name == "sgd":
        nesterov = config.nesterov
        sgd = torch.optim.SGD(groups, lr, config.momentum, nesterov=nesterov, fused=True)
        if config.momentum:  # which a fused step needs of all parameters, from the first on
            for parameter in (p for group in groups for p in group["params"]):
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return kind(groups, lr, betas=config.betas, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set every group's rate to `lr` times its factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
