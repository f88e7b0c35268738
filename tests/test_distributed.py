"""Two processes give what one process gives on the same global batch."""

import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.batches import slice_of
from pipeline.distributed import ReducedBatchNorm, gather, synchronize_batch_norm
from pipeline.methods.simclr import SimCLR

BATCH = 6


class SmallEncoder(nn.Module):
    num_features = 8

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 6, 3, 2),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3),
            nn.BatchNorm2d(8),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).relu().mean((2, 3))  # type: ignore[no-any-return]


def build() -> SimCLR:
    torch.manual_seed(3)
    return SimCLR(SmallEncoder(), temperature=0.3, output=5).double()


def views() -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(BATCH, 3, 9, 9, generator=generator, dtype=torch.float64) for _ in range(2)]


def outcome(method: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()  # type: ignore[no-untyped-call]
    found = {f"gradient of {n}": p.grad for n, p in method.named_parameters()}
    found |= {f"buffer {n}": b for n, b in method.named_buffers()}
    return found | {"loss": loss.detach()}  # type: ignore[return-value]


def worker(rank: int, ranks: int, port: int, file: Path) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", address, rank=rank, world_size=ranks)
    method = synchronize_batch_norm(build(), torch.device("cpu"))
    mine = slice_of(BATCH, rank, ranks)
    parallel = DistributedDataParallel(method)  # it reduces gradients for as long as it lives
    loss = parallel([v[mine] for v in views()])
    torch.save(outcome(method, loss), file.with_suffix(f".{rank}"))
    torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 3])
def test_processes_equal_one_process(ranks: int, tmp_path: Path) -> None:
    """Loss, every gradient and the batch-norm statistics, in float64."""
    method = build()
    expected = outcome(method, method(views()))
    mp.spawn(worker, (ranks, free_port(), tmp_path / "out"), ranks)
    for rank in range(ranks):
        got = torch.load(tmp_path / f"out.{rank}", weights_only=True)
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(
                got[key], value, rtol=1e-9, atol=1e-12, msg=lambda m, k=key: f"{k}: {m}"
            )


def test_one_process_changes_nothing() -> None:
    x = torch.randn(3, 4)
    assert gather(x) is x
    model = nn.BatchNorm1d(4)
    assert synchronize_batch_norm(model, torch.device("cpu")) is model


def test_reduced_batch_norm_keeps_what_timm_fuses_into_the_layer() -> None:
    from timm.layers import BatchNormAct2d

    layer = BatchNormAct2d(4)
    x = torch.randn(5, 4, 3, 3)
    layer(x)
    reduced = ReducedBatchNorm(layer)
    assert reduced.state_dict().keys() == layer.state_dict().keys()
    layer.eval(), reduced.eval()
    torch.testing.assert_close(reduced(x), layer(x))


@pytest.mark.dist
def test_accelerate_launch_equals_one_process(tiny_contest: Path, run_stage) -> None:  # type: ignore[no-untyped-def]
    """The stage on one process and on two: the same losses, the same weights in the end."""
    from pipeline.checkpoint import load_tensors
    from pipeline.runs import read_json

    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += ["--main_process_port", str(free_port()), "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "stages.pretrain"]
    options = ["--pretrain.steps", "4", "--pretrain.precision", "no", "--pretrain.log_steps", "1"]
    options += ["--pretrain.batch_size", "16", "--pretrain.optimizer.warmup", "0"]
    run_stage("stages.pretrain", "--entry", "one", *options)
    run_stage(launch, "--entry", "two", *options)
    histories = [read_json(Path(f"runs/{e}/pretrain/history.json"), "") for e in ("one", "two")]
    losses = [[h["loss"] for h in history if "loss" in h] for history in histories]
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    files = [Path(f"runs/{e}/pretrain/encoder.safetensors") for e in ("one", "two")]
    one, two = (load_tensors(file)[0] for file in files)
    start = torch.cat([v.flatten().double() for v in one.values()])
    end = torch.cat([v.flatten().double() for v in two.values()])
    assert (start - end).norm() / start.norm() < 1e-4
