"""Numbers of a recipe are within their range, or one line says which is not."""

from pipeline import InputError

_WITHIN = {
    "0 or more": lambda v: v >= 0,
    "1 or more": lambda v: v >= 1,
    "2 or more": lambda v: v >= 2,
    "8 or more": lambda v: v >= 8,
    "above 0": lambda v: v > 0,
    "above 0, up to 1": lambda v: 0 < v <= 1,
    "from 0 to 1": lambda v: 0 <= v <= 1,
    "from 0 to below 1": lambda v: 0 <= v < 1,
}


def check(owner: str, expected: str, **values: float | None) -> None:
    """Raise InputError, naming `owner` and the value, where one is not what is `expected`, a range
    in the words of the table above; None is not looked at.
    """
    for name, value in values.items():
        if value is not None and not _WITHIN[expected](value):
            raise InputError(f"{owner}: {name} is {value}; {expected} is expected")
