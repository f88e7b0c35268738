"""The one training loop: forward, backward, before_update, step, after_update."""

import copy
import signal
import statistics
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pipeline import InputError
from pipeline.batches import prefetch
from pipeline.checkpoint import load_torch, save_torch
from pipeline.convolutions import fast_convolutions
from pipeline.feed import Feed, JoinedFeed
from pipeline.gradient_cache import backward_in_parts
from pipeline.methods.base import Method
from pipeline.optim import set_lr
from pipeline.plan import Plan, plan_steps
from pipeline.progress import progress
from pipeline.runs import differences, interrupts, numbered, read_json, say, write_json

_CALIBRATION = (2, 5)  # steps to warm up, steps to time, at each resolution
_HEARD = 5.0  # seconds within which every process hears of a signal; launchers kill 30 after it


@dataclass
class Trainer:
    """Trains `module`, which maps inputs to a scalar loss and has before_update and after_update.

    `lr(progress)` is the rate, None leaves it to `plateau`, which looks at the metric `watch` of
    `evaluate()`; that is called `evals` times, evenly over the run, and before it where there is a
    `judge`.  `signs()` are logged with the loss; `judge(history, progress)` may end the run by an
    InputError.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    accelerator: Accelerator
    folder: Path
    facts: dict[str, Any]
    feed: Feed | JoinedFeed
    lr: Callable[[float], float] | None
    log_steps: int = 10
    checkpoint_minutes: float = 10.0
    evaluate: Callable[[], dict[str, float]] | None = None
    evals: int = 0
    plateau: torch.optim.lr_scheduler.ReduceLROnPlateau | None = None
    watch: str = ""
    signs: Callable[[], dict[str, Tensor]] | None = None
    judge: Callable[[list[dict[str, float]], float], None] | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    _stop: Sequence[int] = ()
    _logged: int = 0
    _unlogged: float = 0.0  # seconds since then

    def __post_init__(self) -> None:
        fast_convolutions(self.module).to(self.accelerator.device)
        self._optimizer = self.accelerator.prepare(self.optimizer)
        # gradients of parts are averaged over the ranks once, not by each backward
        alone = self.feed.parts > 1
        self._wrapped = self.module if alone else self.accelerator.prepare(self.module)
        self._losses = torch.zeros(self.log_steps + 2, device=self.accelerator.device)

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def step(self, fetched: Iterator[Any], step: int, resolution: int, along: float) -> None:
        """One step, on the next of `fetched`: the loss stays on the device, in `_losses`."""
        feed, first = self.feed, step * self.feed.ticks
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index

        def inputs(reading: int) -> Any:
            return feed.inputs(next(fetched), first + reading, resolution)

        def seed(part: int) -> None:  # dropout and the like become functions of the step too
            number = (feed.seed * 1_000_003 + step) * feed.parts + part
            torch.manual_seed(number * ranks + rank)

        if self.lr is not None:
            set_lr(self.optimizer, self.lr(along))
        if isinstance(self.module, Method) and isinstance(feed, Feed):
            self.module.labels = feed.labels_of(step)
        if feed.parts == 1:
            seed(0)
            loss = self._wrapped(*inputs(0))
            self.accelerator.backward(loss)
        else:
            assert isinstance(self.module, Method)
            autocast = self.accelerator.autocast
            loss = backward_in_parts(self.module, inputs, feed.parts, autocast, seed)
        self.module.before_update(along)  # type: ignore[operator]
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.module.after_update(along)  # type: ignore[operator]
        self._losses[step % self.log_steps] = loss.detach()

    def plan(self, config: Any, images: int, resolutions: list[int]) -> Plan:
        """The plan of this run, written to plan.json before step 0 and read from there by a
        resumed run.
        """
        file = self.folder / "plan.json"
        written = read_json(file, "make pretrain") if file.is_file() else {"facts": {}}
        self.accelerator.wait_for_everyone()  # all have looked before one writes
        if not differences(written["facts"], self.facts):
            return Plan(written["resolutions"], written["steps"], written.get("costs"))
        plan = plan_steps(config, images, resolutions, self._seconds)
        if self.accelerator.is_main_process:
            if self.checkpoint.is_file():
                older = numbered(self.folder, "checkpoint", ".pt")
                k = int(older[-1].stem.rpartition("-")[2]) + 1 if older else 1
                kept = self.folder / f"checkpoint-{k}.pt"
                self.checkpoint.replace(kept)
                changed = "; ".join(differences(written["facts"], self.facts)[:5])
                say(f"starting anew, as this changed: {changed}; the old checkpoint is now {kept}")
            write_json(file, vars(plan) | {"images": images, "facts": self.facts})
        self.accelerator.wait_for_everyone()
        return plan

    def _seconds(self, resolution: int) -> float:
        """Median time of a step at `resolution`, on the real module, which is then put back."""
        module = {k: v.clone() for k, v in self.module.state_dict().items()}
        optimizer = copy.deepcopy(self.optimizer.state_dict())  # which are its own tensors
        warm, timed = _CALIBRATION
        times = []
        self.module.train()  # a probe leaves it in evaluation mode
        with closing(self._fetched(0, warm + timed)) as fetched:
            for step in range(warm + timed):
                began = time.perf_counter()
                self.step(fetched, step, resolution, 0.0)
                self._losses.sum().item()  # waits for the device
                times.append(time.perf_counter() - began)
        self.module.load_state_dict(module)
        self.optimizer.load_state_dict(optimizer)
        median = torch.tensor(statistics.median(times[warm:]), device=self.accelerator.device)
        seconds = float(self.accelerator.reduce(median, "mean"))
        say(f"calibration: {1000 * seconds:.0f} ms a step at {resolution} px")
        return seconds

    def _fetched(self, start: int, stop: int) -> Generator[Any, None, None]:
        """What the steps from `start` to `stop` need, fetched ahead by a thread."""
        ticks = self.feed.ticks
        return prefetch(self.feed.fetch, start * ticks, stop * ticks)

    def resume(self) -> int:
        """Load the checkpoint of a run of the same facts; the step to go on from, 0 without one."""
        if not self.checkpoint.is_file():
            return 0
        try:
            state = load_torch(self.checkpoint)
        except InputError as error:
            raise InputError(f"{error}; --force starts anew without it") from None
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.plateau is not None:
            self.plateau.load_state_dict(state["plateau"])
        self.history[:], self._logged = state["history"], int(state["logged"])
        self._unlogged = state.get("unlogged", 0.0)
        self._losses.copy_(state["losses"])
        say(f"going on from step {state['step']:,} ({self.checkpoint})")
        return int(state["step"])

    def save(self, step: int) -> None:
        """Write the checkpoint of `step` finished steps; a state with NaN is never written."""
        if not self.accelerator.is_main_process:
            return
        state = self.module.state_dict()
        floats = [v for v in state.values() if v.is_floating_point()]
        if not torch.stack(torch._foreach_norm(floats)).isfinite().all():
            self._fail(step, "a weight is NaN or infinite")
        plateau = self.plateau.state_dict() if self.plateau is not None else None
        save_torch(
            self.checkpoint,
            {
                "step": step,
                "module": state,
                "optimizer": self.optimizer.state_dict(),
                "plateau": plateau,
                "history": self.history,
                "losses": self._losses,
                "logged": self._logged,
                "unlogged": self._unlogged,
            },
        )

    def _fail(self, step: int, what: str) -> None:
        last = "there is no checkpoint yet"
        if self.checkpoint.is_file():
            good = load_torch(self.checkpoint)["step"]
            last = f"the last good checkpoint is step {good} in {self.checkpoint}"
        raise InputError(
            f"{what} at step {step}; {last}. A smaller learning rate, a longer warm-up or "
            f"precision 'no' are the usual cures."
        )

    def _read_losses(self, end: int, late: bool) -> tuple[float, bool, bool]:
        """Mean loss since the last log line over all ranks; whether any rank is `late` with a
        checkpoint, or was told to stop.
        """
        begin = self._logged
        self._losses[-2], self._losses[-1] = float(late), float(bool(self._stop))
        mean = self.accelerator.reduce(self._losses.clone(), "mean").tolist()
        losses = [mean[s % self.log_steps] for s in range(begin, end)]
        for step, loss in zip(range(begin, end), losses, strict=True):
            if not abs(loss) < float("inf"):
                self._fail(step, f"the loss is {loss}")
        return statistics.fmean(losses), mean[-2] > 0, mean[-1] > 0

    def fit(self, plan: Plan, what: str) -> list[dict[str, float]]:
        """Make the steps of `plan`, from the checkpoint where there is one; the history of the run.

        Ends with SystemExit (128 + signal) after SIGTERM or Ctrl-C, a checkpoint written.
        """
        start, total, batch = self.resume(), plan.total, self.feed.batch_size
        marks = {round(total * (k + 1) / self.evals) for k in range(self.evals)}
        hparams = {"tensorboard": {"purge_step": start}}
        self.accelerator.init_trackers("tensorboard", init_kwargs=hparams)
        alone, heard = self.accelerator.num_processes == 1, 1  # steps between two that agree
        if start == 0 and self.judge is not None and self.evaluate is not None and self.evals:
            self._evaluate(0)  # what there is to improve on
        elif start == total and self.judge is not None and self.history:
            self.judge(self.history, 1.0)  # a run that was stopped by it at its end stays stopped
        saved = time.monotonic()
        tick = saved - self._unlogged
        self.module.train()
        with (
            interrupts() as self._stop,
            closing(self._fetched(start, total)) as fetched,
            progress(
                what, total * batch, "images", start * batch, lambda n: plan.share(n // batch)
            ) as advance,
        ):
            for step in range(start, total):
                self.step(fetched, step, plan.resolution(step), step / total)
                done, note, save, stop = step + 1, "", False, False
                late = time.monotonic() - saved > 60 * self.checkpoint_minutes
                log = done % self.log_steps == 0 or done == total or done in marks
                if log or (late or self._stop if alone else done % heard == 0):
                    loss, save, stop = self._read_losses(done, late)
                if log:
                    speed = batch * (done - self._logged) / (time.monotonic() - tick)
                    rate = self.optimizer.param_groups[0]["lr"]
                    signs = self.signs() if self.signs is not None else {}
                    agreed = self._agreed({"images_per_second": speed} | signs)
                    heard = max(1, int(_HEARD * agreed["images_per_second"] / batch))
                    self._log(done, {"loss": loss, "lr": rate} | agreed)
                    note, self._logged, tick = f"loss {loss:.3f}", done, time.monotonic()
                advance(batch, note)
                paused = time.monotonic()
                self._unlogged = paused - tick
                if done in marks and self.evaluate is not None:
                    self._evaluate(done)
                if save or stop or done == total:
                    self.save(done)
                    saved = time.monotonic()
                if log and self.judge is not None:
                    self.judge(self.history, done / total)
                tick += time.monotonic() - paused
                if stop:
                    say(f"stopped after step {done:,}; the same command goes on from there")
                    raise SystemExit(128 + (self._stop[0] if self._stop else signal.SIGTERM))
        for tracker in self.accelerator.trackers:  # end_training would end the processes' group too
            tracker.finish()
        return self.history

    def _log(self, step: int, values: dict[str, float]) -> None:
        self.history.append({"step": step, **values})
        self.accelerator.log(values, step=step)

    def _agreed(self, values: dict[str, Any]) -> dict[str, float]:
        """The means over the ranks, so that all decide alike."""
        if not values:
            return {}
        own = [torch.as_tensor(v, device=self.accelerator.device).float() for v in values.values()]
        mean = self.accelerator.reduce(torch.stack(own), "mean").tolist()
        return dict(zip(values, mean, strict=True))

    def _evaluate(self, step: int) -> None:
        assert self.evaluate is not None
        self.module.eval()
        values = self._agreed(self.evaluate())
        self.module.train()
        self._log(step, values)
        words = ", ".join(f"{k} {v:.2f}" for k, v in values.items())
        say(f"step {step:,}: {words}")
        if self.plateau is not None:
            self.plateau.step(values[self.watch])
