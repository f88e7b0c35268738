"""Two processes give what one process gives on the same global batch."""

import socket
import subprocess
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.batch_norm import ReducedBatchNorm, synchronize_batch_norm
from pipeline.batches import slice_of
from pipeline.consistency import FixMatch, FreeMatch
from pipeline.distributed import gather
from pipeline.gradient_cache import backward_in_parts

from .small_methods import VARIANTS, built, feed_of, reader, state

BATCH, STEPS = 16, 3


def train(variant: str, rank: int, ranks: int, micro: int | None) -> dict[str, Tensor]:
    """Losses of some steps of SGD in float64, and every gradient and buffer of the last."""
    method = built(variant)
    synchronize_batch_norm(method, torch.device("cpu"))
    feed = feed_of(variant, method, BATCH, rank, ranks, micro)
    # it reduces gradients for as long as it lives
    wrapped: nn.Module = DistributedDataParallel(method) if ranks > 1 and not micro else method
    optimizer = torch.optim.SGD(method.parameters(), 0.05, momentum=0.9)
    losses, last = [], dict[str, Tensor]()
    for step in range(STEPS):
        inputs = reader(feed, step)
        if micro:
            loss = backward_in_parts(method, inputs, feed.parts, nullcontext, torch.manual_seed)
        else:
            loss = wrapped(*inputs(0))
            loss.backward()
        losses.append(loss.detach())
        method.before_update(step / STEPS)
        optimizer.step()
        last = state(method, loss)
        optimizer.zero_grad()
        method.after_update(step / STEPS)
    return last | {"losses": torch.stack(losses)}


class Guesses(nn.Module):
    """A linear classifier whose strong views agree with its weak ones."""

    def __init__(self, kind: type[FixMatch] | type[FreeMatch]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.loss = nn.Linear(5, 4), kind(aligned=True, momentum=0.5)
        self.loss.begin(torch.full((4,), 0.25))

    def forward(self, weak: Tensor, strong: Tensor) -> Tensor:
        return self.loss(self.linear(weak), self.linear(strong))  # type: ignore[no-any-return]


def agree(kind: type[FixMatch] | type[FreeMatch], rank: int, ranks: int) -> dict[str, Tensor]:
    """Weights and running means after some steps of SGD in float64."""
    module = Guesses(kind).double()
    if kind is FreeMatch:
        module.loss.fairness = 1.0
    wrapped: nn.Module = DistributedDataParallel(module) if ranks > 1 else module
    optimizer = torch.optim.SGD(module.parameters(), 1.0)
    generator, mine = torch.Generator().manual_seed(1), slice_of(BATCH, rank, ranks)
    for _ in range(STEPS):
        views = 3 * torch.randn(2, BATCH, 5, dtype=torch.float64, generator=generator)
        wrapped(*views[:, mine]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {k: v for k, v in module.state_dict().items() if k != "loss.used"}


def train_all(rank: int, ranks: int) -> dict[str, dict[str, Tensor]]:
    """Every variant, with the whole batch at once and in micro-batches; consistency losses."""
    found = {
        f"{variant}, micro_batch {micro}": train(variant, rank, ranks, micro)
        for variant in VARIANTS
        for micro in (None, 8)
    }
    return found | {kind.__name__: agree(kind, rank, ranks) for kind in (FixMatch, FreeMatch)}


def worker(rank: int, ranks: int, port: int, file: Path) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", address, rank=rank, world_size=ranks)
    torch.save(train_all(rank, ranks), file.with_suffix(f".{rank}"))
    torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture(scope="module")
def of_one_process() -> dict[str, dict[str, Tensor]]:
    return train_all(0, 1)


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_equal_one_process(
    ranks: int, tmp_path: Path, of_one_process: dict[str, dict[str, Tensor]]
) -> None:
    """Losses, every gradient, the batch-norm statistics and the queues, for every method; MoCo's
    batch norm is over the same groups everywhere.  Consistency losses, too.
    """
    mp.spawn(worker, (ranks, free_port(), tmp_path / "out"), ranks)
    for rank in range(ranks):
        found = torch.load(tmp_path / f"out.{rank}", weights_only=True)
        for variant, expected in of_one_process.items():
            got = found[variant]
            assert got.keys() == expected.keys()
            for key, value in expected.items():
                torch.testing.assert_close(
                    got[key],
                    value,
                    rtol=1e-9,
                    atol=1e-12,
                    msg=lambda m, k=key, v=variant: f"{v}, {k}: {m}",
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


@pytest.fixture
def run_stage(run_stage):  # type: ignore[no-untyped-def]
    """On the CPU: these are more processes than most machines have GPUs."""

    def run(*words, environment: dict[str, str] | None = None, **options):  # type: ignore[no-untyped-def]
        environment = {"CUDA_VISIBLE_DEVICES": ""} | (environment or {})
        return run_stage(*words, environment=environment, **options)

    return run


STAGE = ["--pretrain.steps", "4", "--pretrain.precision", "no", "--pretrain.log_steps", "1"]
STAGE += ["--pretrain.batch_size", "16", "--pretrain.optimizer.lr", "0.01"]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]


def by_torchrun(run_stage, *options: str) -> str:  # type: ignore[no-untyped-def]
    launch = [*TORCHRUN, "--master_port", str(free_port()), "-m", "stages.pretrain"]
    return str(run_stage(launch, *options))


def by_accelerate(run_stage, *options: str) -> str:  # type: ignore[no-untyped-def]
    """accelerate launch --cpu starts one process, whatever --num_processes says, for a launcher as
    mpirun, which tells each its rank: this test is that launcher.
    """
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    address |= {"LOCAL_WORLD_SIZE": "2"}
    processes = [
        run_stage(
            [*launch, "-m", "stages.pretrain"],
            *options,
            wait=False,
            environment=address | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert not any(process.returncode for process in processes), outputs
    return str(outputs[0][0])


@pytest.mark.dist
@pytest.mark.parametrize("launch", [by_torchrun, by_accelerate])
def test_launched_processes_equal_one(tiny_contest: Path, run_stage, launch) -> None:  # type: ignore[no-untyped-def]
    """The stage on one process and on two: the same losses, the same weights in the end."""
    from pipeline.checkpoint import load_tensors
    from pipeline.runs import read_json

    run_stage("stages.pretrain", "--entry", "one", *STAGE)
    out = launch(run_stage, "--entry", "two", *STAGE)
    assert "on 2 processes" in out
    histories = [read_json(Path(f"runs/{e}/pretrain/history.json"), "") for e in ("one", "two")]
    losses = [[h["loss"] for h in history if "loss" in h] for history in histories]
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    files = [Path(f"runs/{e}/pretrain/encoder.safetensors") for e in ("one", "two")]
    one, two = (load_tensors(file)[0] for file in files)
    start = torch.cat([v.flatten().double() for v in one.values()])
    end = torch.cat([v.flatten().double() for v in two.values()])
    assert (start - end).norm() / start.norm() < 1e-4


@pytest.mark.dist
def test_processes_agree_on_when_to_save_and_plan(tiny_contest: Path, run_stage) -> None:  # type: ignore[no-untyped-def]
    """Each has a clock of its own: where they did not agree, gloo would end the run."""
    from pipeline.checkpoint import load_torch

    options = ["--pretrain.steps", "40", "--pretrain.log_steps", "3", "--pretrain.batch_size", "16"]
    by_torchrun(run_stage, "--entry", "two", *options, "--pretrain.checkpoint_minutes", "0.002")
    assert load_torch(Path("runs/two/pretrain/checkpoint.pt"))["step"] == 40


@pytest.mark.dist
def test_a_signal_between_two_log_lines_is_heard_by_all(tiny_contest: Path, run_stage) -> None:  # type: ignore[no-untyped-def]
    """A launcher kills its processes half a minute after a signal, whatever log_steps is."""
    from pipeline.checkpoint import load_torch

    options = [*STAGE, "--pretrain.log_steps=100000", "--pretrain.steps=100000"]
    launch = [*TORCHRUN, "--master_port", str(free_port()), "-m", "stages.pretrain"]
    process = run_stage(launch, "--entry=heard", *options, wait=False)
    while not Path("runs/heard/pretrain/plan.json").is_file():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    time.sleep(3)
    process.terminate()
    out, _ = process.communicate(timeout=60)
    step = load_torch(Path("runs/heard/pretrain/checkpoint.pt"))["step"]
    assert f"stopped after step {step:,}; the same command goes on" in out


@pytest.mark.dist
def test_a_batch_that_cannot_be_shared_is_refused(tiny_contest: Path, run_stage) -> None:  # type: ignore[no-untyped-def]
    process = run_stage(
        [*TORCHRUN, "--master_port", str(free_port()), "-m", "stages.pretrain"],
        *STAGE,
        "--pretrain.batch_size=15",
        wait=False,
    )
    assert "error: batch_size is 15 over 2 processes" in process.communicate(timeout=300)[1]


@pytest.mark.dist
def test_every_stage_that_trains_ends_well_on_two_processes(tiny_contest: Path, run_stage) -> None:  # type: ignore[no-untyped-def]
    """What comes after training is done, and said, by one of them."""
    options = ["--finetune.steps=2", "--finetune.batch_size=8", "--finetune.resolutions=[32]"]
    for stage in ("pretrain", "embed", "finetune", "pseudo_label"):
        launch = [*TORCHRUN, "--master_port", str(free_port()), "-m", f"stages.{stage}"]
        out = run_stage(launch, "--entry=two", *STAGE, *options)
        assert out.count("wrote ") == 1, out
    done = [p.parent.name for p in Path("runs/two").glob("*/provenance.json")]
    assert sorted(done) == ["embeddings", "finetune-0", "pretrain"]
    assert Path("runs/two/finetune-0/classifier.safetensors").is_file()
    assert Path("runs/two/pseudo-1.csv").is_file()


@pytest.mark.dist
def test_a_killed_run_goes_on_on_another_number_of_processes(tiny_contest: Path, run_stage) -> None:  # type: ignore[no-untyped-def]
    """From two to one: the same global batches and queue, so the losses of one all along."""
    from pipeline.checkpoint import load_torch
    from pipeline.runs import read_json

    options = [*STAGE, "--pretrain.steps=40", "--pretrain.checkpoint_minutes=0"]
    options += ["--pretrain.method=MoCo", "--pretrain.method.bn_group=4"]
    options += ["--pretrain.method.queue=40", "--pretrain.micro_batch=8"]
    options += ["--pretrain.optimizer.lr=0.001"]  # so that rounding does not grow
    run_stage("stages.pretrain", "--entry=one", *options)
    launch = [*TORCHRUN, "--master_port", str(free_port()), "-m", "stages.pretrain"]
    process = run_stage(launch, "--entry=moved", *options, wait=False)
    file = Path("runs/moved/pretrain/checkpoint.pt")
    while not (file.is_file() and load_torch(file)["step"] >= 5):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    subprocess.run(["pkill", "-KILL", "-P", str(process.pid)], check=True)
    process.kill()
    process.communicate()
    stopped = load_torch(file)["step"]
    assert stopped < 40
    out = run_stage("stages.pretrain", "--entry=moved", *options)
    assert f"going on from step {stopped}" in out
    histories = [read_json(Path(f"runs/{e}/pretrain/history.json"), "") for e in ("one", "moved")]
    one, moved = ([h["loss"] for h in history if "loss" in h] for history in histories)
    assert len(one) == len(moved) == 40
    assert moved == pytest.approx(one, rel=1e-3)
    assert moved[:-1] != pytest.approx(one[1:], rel=1e-3)  # which would tell other batches
    ends = [
        load_torch(Path(f"runs/{e}/pretrain/checkpoint.pt"))["module"] for e in ("one", "moved")
    ]
    torch.testing.assert_close(ends[1]["queue.born"], ends[0]["queue.born"])
    torch.testing.assert_close(
        ends[1]["queue.entries"], ends[0]["queue.entries"], atol=1e-2, rtol=0
    )
