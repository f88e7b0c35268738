"""This machine: as accelerate sees it, what it is, and how much of its memory a process took."""

import platform
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from pipeline.views import matmul_dtype


def make_accelerator(precision: str, folder: Path) -> Accelerator:
    """Accelerate's view of the machine, with TensorBoard scalars in `folder`; `auto` is bf16 or
    float32.
    """
    AcceleratorState._reset_state()  # a process may run several stages, each with its precision
    cpu = None if torch.accelerator.is_available() else True  # then ranks are found, by gloo
    # ranks agree on every buffer without it: statistics are reduced, queues take what all gather
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
    # while one process propagates labels or fits a probe, the others wait
    patient = InitProcessGroupKwargs(timeout=timedelta(hours=3))
    common: Any = {"cpu": cpu, "log_with": "tensorboard", "project_dir": folder}
    accelerator = Accelerator(**common, kwargs_handlers=[ddp, patient])
    if precision == "auto":
        fast = matmul_dtype(accelerator.device) == torch.bfloat16
        precision = "bf16" if fast else "no"
    if precision == accelerator.mixed_precision:
        return accelerator
    AcceleratorState._reset_state()
    return Accelerator(**common, kwargs_handlers=[ddp, patient], mixed_precision=precision)


def processor() -> str:
    """The GPU's name where there is one, else the processor's and the threads that torch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    known, name = Path("/proc/cpuinfo"), platform.processor() or platform.machine()
    lines = known.read_text().splitlines() if known.is_file() else []
    name = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), name)
    threads = torch.get_num_threads()
    kind = torch.backends.cpu.get_cpu_capability()  # which decides the speed more than the name
    return f"{name} ({kind}), {threads} thread{'s' if threads > 1 else ''}"


def peak_memory() -> float | None:
    """Peak MiB of this process: on a GPU what torch allocated there, else resident memory, in which
    what was read of memory-mapped files counts; None where the system does not tell.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # in bytes there, else in KiB
