"""A class that a recipe or the command line names starts at its own defaults."""

from pathlib import Path

import pytest

from pipeline import InputError, config

RECIPE = """
pretrain:
  method: {class_path: MoCo, init_args: {queue: 4096, output: 64}}
"""


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], {"queue": 4096, "output": 64, "temperature": 0.2}),
        (["--pretrain.method.temperature=0.3"], {"queue": 4096, "temperature": 0.3}),
        (["--pretrain.method=SwAV"], {"queue": 0, "output": 128, "temperature": 0.1}),
        (
            ["--pretrain.method=SwAV", "--pretrain.method.queue=9"],
            {"queue": 9, "temperature": 0.1, "hidden": 2048},
        ),
        (["--pretrain.method=MoCo"], {"queue": 4096, "output": 64}),
    ],
)
def test_another_method_inherits_nothing(
    tmp_path: Path, argv: list[str], expected: dict[str, object]
) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(RECIPE)
    _, _, plain = config.parse("", argv=["--recipe", str(file), *argv])
    found = plain["pretrain"]["method"]["init_args"]
    assert {k: found[k] for k in expected} == expected


def test_a_misspelt_field_of_a_recipe_is_named(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    for text, message in (
        ("pretrain: {bach: 4}", "pretrain has no bach; --help lists what there is"),
        (RECIPE.replace("queue", "quue"), "pretrain.method: MoCo has no quue; --pretrain.method.h"),
        (RECIPE.replace("4096", "x"), "pretrain.method.queue is x; a whole number is expected"),
        (RECIPE.replace("MoCo", "Moca"), "pretrain.method is Moca; BYOL or BarlowTwins or MoCo or"),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=message):
            config.parse("", argv=["--recipe", str(file)])


def test_a_recipe_without_arguments_has_the_methods_own_defaults(tmp_path: Path) -> None:
    """Not those of the default method, SimCLR, at temperature 0.5."""
    _, _, plain = config.parse("", argv=["--pretrain.method=MoCo"])
    assert plain["pretrain"]["method"]["init_args"]["temperature"] == 0.2
