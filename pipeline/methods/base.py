"""What a pretraining method is."""

from collections.abc import Sequence
from itertools import groupby, pairwise

import torch
from torch import Tensor, nn

from pipeline.collapse import signs_of
from pipeline.distributed import gather

SHOWN = 1024  # images of a batch whose projections are kept for the signs of a collapse


class Method(nn.Module):
    """An encoder, what it is trained with, and a loss over the global batch.

    Projection and loss are apart because every batch-coupled loss needs that: for negatives from
    other processes and for batches larger than the memory.  The loop is forward → backward →
    before_update → optimizer.step → after_update.  A method with a slow copy of its network says in
    `keyed` which views that one encodes.
    """

    encoder: nn.Module
    projector: nn.Module
    queried: Sequence[int] | None = None
    """Which of the views `project` takes; None is all."""
    keyed: Sequence[int] = ()
    """Which of the views `target` takes; none without a slow copy."""
    supervision: nn.Module | None
    """A further loss of the projections and the batch's labels."""
    labels: Tensor | None = None
    """Labels [B] of the newest batch, -1 unknown, where there is supervision."""
    negatives: int = 0
    """Images of earlier steps whose keys are negatives."""
    group: int = 1
    """Images that a process or micro-batch must hold whole numbers of."""
    pair: tuple[Tensor, Tensor]
    """Projections [n, d] of two views of at most SHOWN images in the newest batch, without
    gradient; with a slow copy the second is its target.
    """

    def __init__(self) -> None:
        super().__init__()
        self.supervision = None  # no class attribute, which would hide a module of that name

    def project(self, views: list[Tensor]) -> Tensor:
        """The queried views, each [b, 3, s, s], to projections [v, b, d]."""
        raise NotImplementedError

    def target(self, views: list[Tensor]) -> Tensor:
        """The keyed views, of images in `target_order`, to targets [t, b, d]; no gradient."""
        raise NotImplementedError

    def target_order(self, batch: int, device: torch.device | None = None) -> Tensor | None:
        """The order [batch] in which the images of a global batch come to `target`; None: as they
        are.
        """
        return None

    def loss(self, projections: Tensor) -> Tensor:
        """The scalar loss of projections and targets [v + t, B, d], B being the global batch."""
        raise NotImplementedError

    def loss_of(self, projections: Tensor, targets: Tensor | None) -> Tensor:
        """The loss of what all processes projected, targets in `target_order`; never in bf16,
        whose softmax is too coarse for a batch of similarities.
        """
        rows = projections if projections.itemsize >= 4 else projections.float()
        if targets is not None:
            order = self.target_order(targets.shape[1], targets.device)
            if order is not None:
                targets = targets[:, order.argsort()]
            rows = torch.cat([rows, targets.to(rows.dtype)])  # [v + t, B, d]
        shown = rows[:, :: -(-rows.shape[1] // SHOWN)].detach()
        # copies: the projections of a large batch go once they have their gradient
        self.pair = shown[0].clone(), shown[1 if targets is None else -1].clone()
        with torch.autocast(rows.device.type, enabled=False):
            loss = self.loss(rows)
            if self.supervision is not None:
                loss = loss + self.supervision(rows[: len(projections)], self.labels)
            return loss

    def forward(self, views: list[Tensor], keys: list[Tensor] | None = None) -> Tensor:
        """The loss of this process's views with the projections of all processes.

        `views` are the queried ones and `keys` the keyed ones, these in `target_order`; without
        `keys`, `views` are all views of one process's whole batch.
        """
        if keys is None:
            order = self.target_order(len(views[0]), views[0].device) if self.keyed else None
            keys = [views[k] if order is None else views[k][order] for k in self.keyed]
            views = views if self.queried is None else [views[k] for k in self.queried]
        projections = gather(self.project(views), dim=1)
        return self.loss_of(projections, self.gathered_target(keys))

    def gathered_target(self, keys: list[Tensor]) -> Tensor | None:
        """The targets [t, B, d] of all processes, None without a slow copy."""
        if not keys:
            return None
        with torch.no_grad():
            return gather(self.target(keys), dim=1)

    def together(self, views: list[Tensor]) -> Tensor:
        """Projections [v, b, d] with all views of a size in one batch through the encoder, and all
        views in one through the projector.
        """
        sizes = groupby(views, lambda view: view.shape[-1])
        x = torch.cat([self.encoder(torch.cat(list(same))) for _, same in sizes])  # [v * b, f]
        return self.projector(x).unflatten(0, (len(views), -1))  # type: ignore[no-any-return]

    def before_update(self, progress: float) -> None:
        """Called between backward and the optimizer's step; progress runs from 0 to 1."""

    def after_update(self, progress: float) -> None:
        """Called after the optimizer's step."""

    def signs(self) -> dict[str, Tensor]:
        """What tells how training goes beside the loss, as scalars on the device."""
        return signs_of(*self.pair)


def mlp(
    widths: Sequence[int],
    norm: bool = True,
    last_norm: bool = False,
    last_bias: bool = True,
    activation: type[nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """Linear layers of `widths`, from input to output, with batch norm where asked and an
    activation between them; a layer has a bias where no batch norm follows (the last if asked).
    """
    layers: list[nn.Module] = []
    last = len(widths) - 2
    for k, (inputs, outputs) in enumerate(pairwise(widths)):
        normed = norm if k < last else last_norm
        layers.append(nn.Linear(inputs, outputs, bias=not normed and (k < last or last_bias)))
        layers += [nn.BatchNorm1d(outputs)] if normed else []
        layers += [activation(inplace=True)] if k < last else []
    return nn.Sequential(*layers)
