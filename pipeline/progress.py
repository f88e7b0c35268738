"""A progress bar with rate and time left on a terminal, a line every ten seconds in a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from pipeline.distributed import rank

_QUIET = 10.0  # seconds between lines where there is no terminal


class Advance(Protocol):
    def __call__(self, n: int = 1, note: str = "") -> None: ...


@contextmanager
def progress(
    what: str, total: int, unit: str, start: int = 0, share: Callable[[int], float] | None = None
) -> Iterator[Advance]:
    """A function to call with the number of units just done and a short note, as the loss.

    `start` units were done by an earlier run and do not count for the rate.  `share(units)` is how
    much of the work (0 to 1) so many units are, where they do not all cost the same.
    """
    began, last, done = time.monotonic(), time.monotonic(), start
    share = share or (lambda units: units / max(total, 1))

    def speed() -> str:
        elapsed = max(time.monotonic() - began, 1e-9)
        left = elapsed * (1 - share(done)) / max(share(done) - share(start), 1e-9)
        return f"{(done - start) / elapsed:,.1f}/s, {left / 60:.1f} min left"

    if rank() != 0:
        yield lambda n=1, note="": None
        return
    if not sys.stderr.isatty():

        def line(n: int = 1, note: str = "") -> None:
            nonlocal done, last
            done += n
            now = time.monotonic()
            if now - last >= _QUIET:
                last, words = now, f"{speed()}, {note}" if note else speed()
                print(f"{what}: {done:,}/{total:,} {unit}, {words}", file=sys.stderr, flush=True)

        yield line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total, completed=start, speed="", note="")

        def step(n: int = 1, note: str = "") -> None:
            nonlocal done
            done += n
            bar.update(task, completed=done, speed=speed(), note=note)

        yield step
