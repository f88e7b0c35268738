"""Pack images to uint8 .npy files, open them memory-mapped, gather batches of them."""

import functools
import gc
import hashlib
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from io import BytesIO, FileIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile

from pipeline import InputError
from pipeline.progress import Advance
from pipeline.runs import check_room

Pixels = npt.NDArray[np.uint8]
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # none that starts another program
_PNG, _PNG_END = b"\x89PNG\r\n", b"IEND\xaeB`\x82"
_TASK = 64  # images that a worker packs before it reports


def open_packed(path: Path) -> Pixels:
    """The packed images [n, h, w, 3] of a .npy file, memory-mapped.

    Raises InputError where the file holds anything else.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: no packed images ({error}); run prepare again") from None
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.shape[3:] != (3,):
        raise InputError(f"{path}: uint8 [n, h, w, 3] is expected; run prepare again")
    return array


class Pool:
    """Rows of several packed arrays as one sequence of images, in the `order` [n] of positions in
    their concatenation that is given, or as they are.

    Raises InputError where the arrays' image sizes differ.
    """

    def __init__(
        self,
        parts: Sequence[tuple[Pixels, npt.NDArray[np.int64]]],
        order: npt.NDArray[np.int64] | None = None,
    ) -> None:
        sizes = {array.shape[1:] for array, _ in parts}
        if len(sizes) != 1:
            found = ", ".join(" × ".join(map(str, s[:2])) for s in sorted(sizes)) or "no images"
            raise InputError(f"images of one size are expected in a pool; found {found}")
        self.shape = sizes.pop()  # h, w, 3
        self._arrays = [np.asarray(array) for array, _ in parts]
        self._rows = [np.asarray(rows, np.int64) for _, rows in parts]
        self._ends = np.cumsum([len(rows) for rows in self._rows])
        self._order = order

    def __len__(self) -> int:
        return int(self._ends[-1])

    def gather(self, positions: npt.NDArray[np.int64]) -> Pixels:
        """The images [b, h, w, 3] at `positions` [b] of the sequence, in their own memory."""
        positions = np.asarray(positions, np.int64)
        if len(positions) and not 0 <= positions.min() <= positions.max() < len(self):
            raise IndexError(f"positions from 0 to {len(self) - 1} are expected")
        positions = positions if self._order is None else self._order[positions]
        part = np.searchsorted(self._ends, positions, side="right")
        out = np.empty((len(positions), *self.shape), np.uint8)
        for k, (array, rows) in enumerate(zip(self._arrays, self._rows, strict=True)):
            here = np.flatnonzero(part == k)
            out[here] = array[rows[positions[here] - (self._ends[k] - len(rows))]]
        return out


class _Unusable(Exception):
    """Why a file gives no pixels."""


class Form(NamedTuple):
    """What every image is made into, and what is refused."""

    height: int
    width: int
    resize: bool  # an image of another size is resized, or else refused
    max_pixels: int

    @property
    def bytes(self) -> int:
        return self.height * self.width * 3


class Packed(NamedTuple):
    """What packing a list of n files found out."""

    digests: npt.NDArray[np.bytes_]  # [n] hexadecimal SHA-256 of the files' bytes, "" if unread
    reasons: list[str]  # [n] "" or why the file's row was left zero
    histogram: npt.NDArray[np.int64]  # [3, 256] of the pixels of all good images


@contextmanager
def decoders(workers: int | None) -> Iterator[Executor]:
    """Processes that decode; they end with the block, and with this process however it ends."""
    # A forked worker need not import the stage and torch anew, as a spawned one would.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if "fork" in methods else None)
    executor = ProcessPoolExecutor(workers or _cores(), context, _start_worker)
    try:
        executor.submit(os.getpid).result()  # fork now, before a progress bar has its thread
        yield executor
    except BrokenProcessPool:
        raise InputError(
            "a decoding process was killed, for want of memory perhaps; try --data.workers 1"
        ) from None
    except BaseException as error:
        for child in multiprocessing.active_children():
            child.terminate()  # whatever it is at
        if isinstance(error, OSError):
            raise InputError(f"the packed images cannot be written: {error.strerror}") from None
        raise
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends the pool
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    Image.MAX_IMAGE_PIXELS = None  # Form.max_pixels is held instead
    warnings.simplefilter("ignore")  # Pillow's, on odd but readable files
    gc.freeze()  # what the parent had is not walked through, and so stays shared

    def end_with_parent() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def create(arrays: Mapping[Path, int], form: Form) -> None:
    """Make each path a packed array of zeros for that many images.

    Raises InputError where the disk has no room for all of them.
    """
    images, folder = sum(arrays.values()), next(iter(arrays)).parent
    what = f"{images:,} images of {form.width} × {form.height}"
    check_room(folder, images * form.bytes, what)
    for path, n in arrays.items():
        np.lib.format.open_memmap(path, "w+", np.uint8, (n, form.height, form.width, 3))


def pack(
    executor: Executor,
    root: str,
    files: Sequence[str],
    rows: Sequence[int],
    out: Path,
    form: Form,
    advance: Advance,
) -> Packed:
    """Decode `files` [n], in the folder `root`, in parallel, each into its row of the array `out`.

    `create` made the array.
    """
    packed = Packed(np.zeros(len(files), "S64"), [], np.zeros((3, 256), np.int64))
    start = np.lib.format.open_memmap(out, "r").offset
    task = functools.partial(_pack_part, root, out=out, start=start, form=form)
    parts = [slice(k, k + _TASK) for k in range(0, len(files), _TASK)]
    for part in executor.map(task, [files[p] for p in parts], [rows[p] for p in parts]):
        done = len(packed.reasons)
        packed.digests[done : done + len(part.digests)] = part.digests
        packed.reasons.extend(part.reasons)
        packed.histogram[:] += part.histogram
        advance(len(part.digests))
    return packed


def _pack_part(
    root: str, files: Sequence[str], rows: Sequence[int], out: Path, start: int, form: Form
) -> Packed:
    digests, reasons, good = [], [], list[int]()
    sheet = _sheet(form.width, form.height)
    for name, row in zip(files, rows, strict=True):
        data, reason = b"", ""
        try:
            with FileIO(f"{root}/{name}") as source:
                data = source.read()
            sheet.paste(decode(data, form), (0, len(good) * form.height))
            good.append(row)
        except OSError as error:
            reason = f"cannot be read ({error.strerror})"
        except _Unusable as error:
            reason = str(error)
        digests.append(hashlib.sha256(data).hexdigest() if data else "")
        reasons.append(reason)
    if len(good) < _TASK:
        sheet = sheet.crop((0, 0, form.width, len(good) * form.height))
    write_rows(out, start, form.bytes, good, sheet.tobytes())
    histogram = np.array(sheet.histogram(), np.int64).reshape(3, 256)
    return Packed(np.array(digests, "S64"), reasons, histogram)


def write_rows(out: Path, start: int, size: int, rows: Sequence[int], data: bytes) -> None:
    """Write `data` to rows of `size` bytes that begin at byte `start`, each run of neighboring rows
    at once: a write locks the file.
    """
    ends = [k + 1 for k in range(len(rows)) if rows[k] + 1 not in rows[k + 1 : k + 2]]
    with FileIO(out, "r+") as file:
        for first, end in zip([0, *ends], ends, strict=False):
            part, at = memoryview(data)[first * size : end * size], start + rows[first] * size
            while part:  # a disk that is full takes a part, and only then says so
                written = os.pwrite(file.fileno(), part, at)
                part, at = part[written:], at + written


@functools.cache
def _sheet(width: int, height: int) -> Image.Image:
    """Where a worker puts the images of a task one below the other, to count and write at once."""
    return Image.new("RGB", (width, height * _TASK))


def decode(data: bytes, form: Form) -> Image.Image:
    """The RGB image in the bytes of a file, of the size that `form` states."""
    if not data:
        raise _Unusable("is empty")
    try:
        with _open(data) as image:
            if image.width * image.height > form.max_pixels:
                raise _Unusable(
                    f"has {image.width} × {image.height} pixels; data.max_pixels is "
                    f"{form.max_pixels:,}"
                )
            image.load()
            if data.startswith(_PNG) and _PNG_END not in data:  # which Pillow does without
                raise _Unusable("is truncated or damaged (it has no end)")
            rgb = image if image.mode == "RGB" else image.convert("RGB")  # as the organizers do
    except UnidentifiedImageError:
        raise _Unusable(f"is no image ({', '.join(FORMATS)} are read)") from None
    except _Unusable:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
        raise _Unusable(f"is truncated or damaged ({error})") from None
    if rgb.size == (form.width, form.height):
        return rgb
    if not form.resize:
        raise _Unusable(
            f"is {rgb.width} × {rgb.height}, where {form.width} × {form.height} is expected as of "
            f"the others (--data.size PIXELS resizes them all)"
        )
    return rgb.resize((form.width, form.height), Image.Resampling.BICUBIC)


def _open(data: bytes) -> Image.Image:
    if data.startswith(_PNG):
        return PngImageFile(BytesIO(data))  # without asking who can read it: 2 % of the time
    return Image.open(BytesIO(data), formats=FORMATS)


def read_size(file: Path) -> tuple[int, int] | None:
    """Width and height that an image's header states; None where it is no image."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            return image.size
    except Exception:  # as in `decode`, which will say what is wrong
        return None


def histogram(array: Pixels, rows: Iterable[int]) -> npt.NDArray[np.int64]:
    """How often each value comes in each channel [3, 256] of some images of a packed array."""
    counts = np.zeros((3, 256), np.int64)
    for row in rows:
        for channel in range(3):
            counts[channel] += np.bincount(array[row, :, :, channel].ravel(), minlength=256)
    return counts
