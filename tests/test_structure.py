"""The directions of the design hold: who imports what, and how long a file is."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import config

ROOT = Path(__file__).parents[1]
LIBRARY = sorted((ROOT / "pipeline").rglob("*.py"))
STAGES = sorted(p for p in (ROOT / "stages").glob("*.py") if p.stem != "__init__")
METHODS = sorted(
    p for p in (ROOT / "pipeline" / "methods").glob("*.py") if p.stem not in ("__init__", "base")
)
CODE = [*LIBRARY, *STAGES]
LINES = 300
METHOD_LINES = 100
IMPORTED_AS = {
    "scikit-learn": "sklearn",
    "pillow": "PIL",
    "faiss-gpu": "faiss",
    "faiss-cpu": "faiss",
}
# The evaluator is the organizers' program: it runs without the project.
ONLY_IMPORTERS = {
    "jsonargparse": ["pipeline/config.py"],
    "faiss": ["pipeline/neighbours.py"],
    "torch.save": ["pipeline/checkpoint.py"],
    "torch.load": ["pipeline/checkpoint.py", "pipeline/evaluator.py"],
    "pickle.load": [],
    "pickle.loads": [],
}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def each(paths: list[Path]) -> pytest.MarkDecorator:
    """Parametrized over files, by their names."""
    return pytest.mark.parametrize("path", paths, ids=name)


def names_used(path: Path) -> Iterator[str]:
    """Every dotted name that a file imports, and `module.attribute` where it is written so."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}: relative import; write out pipeline.…"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}"


def uses(path: Path, what: str) -> bool:
    return any(used == what or used.startswith(what + ".") for used in names_used(path))


@each(LIBRARY)
def test_the_library_knows_no_stage(path: Path) -> None:
    for above in ("stages", "benchmarks", "tests"):
        assert not uses(path, above), f"{name(path)} imports {above}: the library is below it"


@pytest.mark.parametrize("module", ["selection", "strategies", "coverage", "pseudo_labels"])
def test_strategies_do_without_torch(module: str) -> None:
    assert not uses(ROOT / "pipeline" / f"{module}.py", "torch"), f"{module}.py: arrays are enough"


@pytest.mark.parametrize(("what", "allowed"), ONLY_IMPORTERS.items(), ids=ONLY_IMPORTERS)
def test_one_place_for_each(what: str, allowed: list[str]) -> None:
    found = [name(path) for path in CODE if uses(path, what)]
    assert found == sorted(allowed), f"{what} is used in {found}; only in {allowed} is expected"


@each(CODE)
def test_what_is_imported_is_a_declared_dependency(path: Path) -> None:
    """What only the tests or the benchmarks need stays out of the library and the stages."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[^\w-]", line)[0] for line in project["dependencies"]}
    known = {IMPORTED_AS.get(d, d) for d in declared} | set(sys.stdlib_module_names)
    tree = ast.parse(path.read_text())
    imports = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    imports += [str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    unknown = {i.split(".")[0] for i in imports} - known - {"pipeline", "stages"}
    assert not unknown, f"{name(path)} imports {unknown}: not among the dependencies"


@each(CODE)
def test_a_file_is_short(path: Path) -> None:
    limit = METHOD_LINES if path in METHODS else LINES
    lines = len(path.read_text().splitlines())
    assert lines <= limit, f"{name(path)} has {lines} lines, {limit} at most: is it one thing?"


def test_there_is_no_utils() -> None:
    folders = [ROOT / folder for folder in ("pipeline", "stages", "benchmarks", "tests")]
    assert not [name(p) for folder in folders for p in folder.rglob("utils.py")]


@each(STAGES)
def test_a_stage_says_what_runs_it_and_has_a_target(path: Path) -> None:
    command = f"python -m stages.{path.stem}"
    assert command in str(ast.get_docstring(ast.parse(path.read_text()))), f"no {command!r}"
    made = re.search(rf"(python|\$\(LAUNCH\)|\$\(STAGE\)).* ?stages\.{path.stem}\b", makefile())
    assert made, f"the Makefile has no target that runs stages.{path.stem}"


def makefile() -> str:
    return (ROOT / "Makefile").read_text()


def test_make_alone_lists_every_target_in_the_order_of_use() -> None:
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = [line.split()[1] for line in done.stdout.splitlines()]
    assert listed == re.findall(r"^([a-z][a-z-]*):", makefile(), re.MULTILINE)
    order = "setup demo test data pretrain embed evaluate finetune label-request import-labels"
    order += " pseudo-label submit rehearse bench"
    assert [target for target in listed if target in order.split()] == order.split()


@pytest.mark.parametrize("target", ["pretrain", "submit", "compare-finetunings"])
def test_a_recipe_that_is_missing_is_asked_for(target: str) -> None:
    words = ["make", "-n", target]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode
    assert f"RECIPE= is missing, as in: make {target} RECIPE=recipes/mini98.yaml" in done.stderr


@each(sorted((ROOT / "recipes").glob("*.yaml")))
def test_a_recipe_is_one(path: Path) -> None:
    assert config.parse("", argv=["--recipe", str(path)]).recipe.entry == path.stem


@each(METHODS)
def test_a_method_file_holds_one_method(path: Path) -> None:
    """The file is the registration: its one subclass of Method is found by its name."""
    classes = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef)]
    methods = [c.name for c in classes if any(ast.unparse(b) == "Method" for b in c.bases)]
    assert len(methods) == 1, f"{name(path)} defines {methods}; one subclass of Method is expected"
