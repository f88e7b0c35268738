"""Run every benchmark of this folder, or those that are named, each in a process of its own.

python -m benchmarks [NAME …] [--arguments of theirs]
Each measures both sides in one run and ends with one line of JSON; these come again at the end.
"""

import json
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

FOLDER = Path(__file__).parent


def found() -> list[str]:
    """The benchmarks there are: a file each; names that begin with an underscore are none."""
    return sorted(p.stem for p in FOLDER.glob("*.py") if not p.stem.startswith("_"))


def measure(name: str, arguments: list[str]) -> str | None:
    """The last line that the benchmark printed, all passed on as it comes; None if it failed."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=FOLDER.parent) as program:
        last = ""
        for line in program.stdout or ():
            print(line, end="", flush=True)
            last = line.strip() or last
    try:
        ended_well = program.returncode == 0 and "benchmark" in json.loads(last)
    except (json.JSONDecodeError, TypeError):
        ended_well = False
    return last if ended_well else None


def main() -> None:
    """Exit 1 where one of them failed, or where there is none of that name."""
    names = list(takewhile(lambda word: not word.startswith("-"), sys.argv[1:]))
    arguments = sys.argv[1 + len(names) :]
    if unknown := sorted(set(names) - set(found())):
        sys.exit(f"error: there is no benchmark {unknown[0]!r}; there are {', '.join(found())}")
    results = {name: measure(name, arguments) for name in names or found()}
    print()
    for name, line in results.items():
        print(line or f"{name} failed", flush=True)
    sys.exit(None in results.values())


if __name__ == "__main__":
    main()
