"""Read a recipe: a YAML file and what the command line changes in it."""

import dataclasses
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import jsonargparse._typehints
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from pipeline import InputError
from pipeline.recipe import Recipe
from pipeline.training_recipe import BUDGETS

_KINDS = {
    "NoneType": "null",
    "bool": "true or false",
    "dict": "a mapping",
    "float": "a number",
    "int": "a whole number",
    "list": "a list in brackets, as [48, 96],",
    "str": "a text",
}


@dataclasses.dataclass(frozen=True)
class Force:
    """The option that every stage has which does nothing where its result is current."""

    force: bool = dataclasses.field(
        default=False, metadata={"help": "Run anew even where nothing has changed."}
    )


class Invocation(NamedTuple):
    """What a stage was started with: recipe, the stage's options, the recipe as plain data."""

    recipe: Recipe
    options: Any
    plain: dict[str, Any]


def _forget_other_class(parser: Any, before: Any, value: Any) -> None:
    """Another class starts at its own defaults.

    jsonargparse lets it inherit arguments of the same name: MoCo would run at the temperature of
    SimCLR, the default method, wherever a recipe does not give one.  There is no setting for it.
    """
    if before and "init_args" in before and before["class_path"] != value["class_path"]:
        before["init_args"] = Namespace()


assert hasattr(jsonargparse._typehints, "discard_init_args_on_class_path_change")
jsonargparse._typehints.discard_init_args_on_class_path_change = _forget_other_class


def parse(
    description: str | None, options: type[Any] | None = None, argv: list[str] | None = None
) -> Invocation:
    """Read `--recipe FILE --section.field VALUE …` and the fields of the dataclass `options`.

    Raises InputError, naming the field, where a name is misspelt or a value has the wrong type.
    """
    argv = sys.argv[1:] if argv is None else argv
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="stage", description=(description or "").split("\n\n")[0], exit_on_error=False
    )
    parser.add_argument("--recipe", action="config", help="The recipe, a YAML file.")
    parser.add_class_arguments(Recipe)
    for item in dataclasses.fields(options) if options else ():
        name = "--" + item.name.replace("_", "-")
        if item.type in (bool, "bool"):
            parser.add_argument(name, action="store_true", help=item.metadata.get("help"))
        else:
            parser.add_argument(
                name, type=item.type, default=item.default, help=item.metadata.get("help")
            )
    try:
        config = parser.parse_args(_replace_budgets(argv))
        made = parser.instantiate(config)
    except ArgumentError as error:
        raise InputError(_in_words(" ".join(str(error).split()))) from None
    plain = {k: v for k, v in config.as_dict().items() if k in Recipe.__dataclass_fields__}
    values = {k: getattr(made, k) for k in Recipe.__dataclass_fields__}
    if not values["entry"]:
        recipes = config.get("recipe")
        values["entry"] = plain["entry"] = Path(str(recipes[-1])).stem if recipes else "entry"
    own = options and options(**{f.name: made[f.name] for f in dataclasses.fields(options)})
    return Invocation(Recipe(**values), own, plain)


def _replace_budgets(argv: list[str]) -> list[str]:
    """A budget on the command line replaces the recipe's, whatever its unit."""
    extra = []
    for section in ("pretrain", "finetune"):
        keys = {f"--{section}.{b}" for b in BUDGETS}
        given = {word.split("=")[0] for word in argv} & keys
        if given:
            extra += [f"{key}=null" for key in sorted(keys - given)]
    return argv + extra


def _in_words(error: str) -> str:
    """A parser's error, without Python's names for things: where, what is wrong, what to do."""
    key, _, rest = error.removeprefix('Parser key "').partition('": ')
    if found := re.match(r"unrecognized arguments: ([^\s=]+)", error):
        return f"there is no {found[1]}; --help lists what there is"
    if found := re.search(r"File does not exist: '(.*)'", rest):
        return f"--{key} {found[1]} is not there; a file is expected"
    if found := re.search(r"Group '(.*)' does not accept option '(.*)'", error):
        return f"{found[1]} has no {found[2]}; --help lists what there is"
    found = re.search(r"Expected a dot import path string: (\S+)", rest)
    if found and (names := _classes(key)):
        return f"{key} is {found[1]}; {' or '.join(names)} is expected"
    if found := re.search(r"Option '(.*?)' is not accepted.*class_path='[\w.]*?(\w+)'", rest):
        return f"{key}: {found[2]} has no {found[1]}; --{key}.help={found[2]} lists what there is"
    value = error.rpartition("alue: ")[2]
    inner = r'Parser key "([^"]*)": (.*?)\.? (?:Got|Given) value: (.*?)(?:\. Got value|$)'
    if found := re.search(inner, rest):
        key, rest, value = f"{key}.{found[1]}", found[2], found[3]
    kinds = re.findall(r"Expected an? (?:<class '(\w+)'>|typing\.Literal\[(.*?)\])", rest)
    if not kinds:
        return error
    expected = " or ".join(_KINDS.get(kind, kind) or f"one of {words}" for kind, words in kinds)
    return f"{key} is {value}; {expected} is expected"


def _classes(key: str) -> list[str]:
    """The names of the classes that the recipe's field `key` may be; none where it is no class."""
    hint: Any = Recipe
    for name in key.split("."):
        hint = get_type_hints(hint)[name]
    bases = [get_args(h)[1] for h in (hint, *get_args(hint)) if get_origin(h) is Callable]
    return sorted(kind.__name__ for base in bases for kind in base.__subclasses__() or [base])
