"""CSV files: written row by row, read as columns of checked values."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from sys import intern
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline import InputError
from pipeline.runs import replacing

_BLOCK = 1000  # rows; so few that the garbage collector finds little to walk through


@dataclass(frozen=True)
class Column:
    """What a column's values are: the array's `dtype`, and for numbers the most and what '' is."""

    dtype: Any
    most: float = 2**31
    empty: float | None = None  # None: a value is expected
    required: bool = False

    @property
    def expected(self) -> str:
        kind = "a number from 0" + (f" to {self.most:g}" if self.most < 2**31 else "")
        return kind if self.empty is None else f"{kind}, or nothing,"


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A CSV file in UTF-8, there when it is whole."""
    with replacing(path) as aside, aside.open("w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def read_table(path: Path, columns: dict[str, Column]) -> dict[str, npt.NDArray[Any]]:
    """The columns that a CSV file's header names, each [rows].

    Raises InputError, naming file and row (the header is row 1), where the header or a value is not
    what `columns` states.
    """
    required = [n for n, c in columns.items() if c.required]
    if not path.is_file():
        raise InputError(f"{path} is not there; a CSV file with {','.join(required)} is expected")
    blocks: list[dict[str, npt.NDArray[Any]]] = []
    with path.open(newline="", encoding="utf-8") as f:
        try:
            reader = csv.reader(f)
            names = next(reader, [])
            if not set(required) <= set(names) <= set(columns) or len(set(names)) < len(names):
                raise InputError(
                    f"{path}: row 1 is {','.join(names)!r}; a header is expected with "
                    f"{','.join(required)} and none but {','.join(columns)}, each once"
                )
            row = 2
            while rows := list(islice(reader, _BLOCK)):
                blocks.append(_block(path, names, columns, rows, row))
                row += len(rows)
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"{path}: no CSV file in UTF-8 ({error})") from None
    blocks = blocks or [{n: np.empty(0, columns[n].dtype) for n in names}]
    return {n: np.concatenate([b[n] for b in blocks]) for n in names}


def _block(
    path: Path, names: list[str], columns: dict[str, Column], rows: list[list[str]], first: int
) -> dict[str, npt.NDArray[Any]]:
    """Some rows as columns; `first` is the number of the first of them."""
    for row, values in enumerate(rows, first):
        if len(values) != len(names):
            raise InputError(
                f"{path}: row {row} has {len(values)} values; {len(names)} are expected"
            )
    block = {}
    for name, texts in zip(names, zip(*rows, strict=True), strict=True):
        column = columns[name]
        if column.dtype in (np.int64, np.float32):
            block[name] = _numbers(path, name, column, texts, first)
        else:
            block[name] = np.array(list(map(intern, texts)), column.dtype)
    return block


def _numbers(
    path: Path, name: str, column: Column, texts: Sequence[str], first: int
) -> npt.NDArray[Any]:
    kind = int if column.dtype is np.int64 else float
    numbers: list[float] = []
    for row, text in enumerate(texts, first):
        try:
            number = column.empty if not text and column.empty is not None else kind(text)
            if text and not 0 <= number <= column.most:
                raise ValueError
        except ValueError:
            raise InputError(
                f"{path}: row {row}: {name} is {text!r}; {column.expected} is expected"
            ) from None
        numbers.append(number)
    return np.array(numbers, column.dtype)
