"""The parsers of the commands, and what to do about their errors."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..errors import ConfigurationError

__all__ = ["classes_first", "explain_errors", "parsed", "parser_options", "shorten_help"]

# The longest error of the parser that is shown in full. For each class that does not accept a value, it lists them all.
_LONGEST = 300

_TYPES = {
    "NoneType": "null",
    "bool": "true or false",
    "float": "a number",
    "int": "a whole number",
    "list": "a list in brackets",
    "str": "a text",
}


def parsed(command: str, run: Callable[..., int], arguments: Sequence[str]) -> dict[str, Any]:
    """The arguments of a command without a model, from the command line or a config file."""
    import jsonargparse

    parser = jsonargparse.ArgumentParser(**parser_options(command, run))
    parser.add_argument(
        "-c", "--config", action=jsonargparse.ActionConfigFile, help="A configuration file in JSON or YAML."
    )
    parser.add_function_arguments(run)
    _title_groups(parser)
    with explain_errors(parser):
        given = parser.parse_args(arguments).as_dict()
    given.pop("config", None)
    return given


def parser_options(command: str, run: Callable[..., int]) -> dict[str, Any]:
    """The options of a command's parser. It raises errors instead of exiting with hundreds of lines of usage."""
    return {
        "prog": f"lightning-gif {command}",
        "usage": "%(prog)s [arguments]; --help lists them",
        "description": (run.__doc__ or "").splitlines()[0],
        "exit_on_error": False,
    }


_TITLES = {
    "trainer": "The trainer, as for LightningCLI",
    "model": "The model, as for LightningCLI",
    "data": "Its data, as for LightningCLI",
    "gif": "The callback: the arguments of GIFCallback",
    "optimizer": "The optimizer, as for LightningCLI",
    "lr_scheduler": "The learning rate scheduler, as for LightningCLI",
}
"""The titles of groups of arguments. By default they are the first sentences of docstrings."""


def _title_groups(parser: Any) -> None:
    for name, group in parser.groups.items():
        group.title = _TITLES.get(name, "Arguments of the command")


def shorten_help(parser: Any, arguments: Sequence[str], own: Sequence[str]) -> None:
    """Leaves the arguments of the trainer, the callback and the optimizers out of ``--help``; ``--help_all`` has them.

    Args:
        parser: The parser of a command on a model.
        arguments: The arguments that will be parsed. If they have ``--help_all``, it is shown, and the process exits.
            Without ``--help``, the parser stays complete.
        own: The names of the arguments of the command.
    """
    _title_groups(parser)
    if "--help_all" in arguments:
        parser.print_help()
        parser.exit(0)
    parser.epilog = (
        "Config files of LightningCLI work unchanged (--config). --help_all also lists the arguments of the trainer"
        " (--trainer.…), of the callback (--gif.…) and of the optimizer."
    )
    if not {"--help", "-h"}.intersection(arguments):  # a parser leaves out of --print_config what its help leaves out
        return
    shown = {*own, "help", "config", "print_config", "model", "model.help", "data", "data.help"}
    for action in parser._actions:
        if action.dest not in shown:
            action.help = argparse.SUPPRESS


@contextlib.contextmanager
def explain_errors(parser: Any) -> Iterator[None]:
    """A block in which an error of the parser becomes one that says what to do.

    Raises:
        ConfigurationError: If the parser does not accept an argument.
    """
    try:
        yield
    except argparse.ArgumentError as error:
        raise ConfigurationError(_remedy(" ".join(str(error).split()), parser)) from None


def _remedy(error: str, parser: Any) -> str:
    """What to do about an error of the parser, followed by the error unless the remedy explains it completely."""
    # The two alternatives are the wordings of newer and older versions of jsonargparse.
    missing = re.match(r'the following arguments are required: (.+)|Key "([\w.]+)" is required', error)
    if missing:
        names = (missing[1] or missing[2]).split(", ")
        return f"{', '.join(f'--{name}' for name in names)} must be given, see --help."
    if unknown := re.match(r"[Uu]nrecognized arguments: --([\w.]+)", error):
        known = [option[2:] for action in parser._actions for option in action.option_strings if option[:2] == "--"]
        close = difflib.get_close_matches(unknown[1], known, n=1)
        return f"{error}. {f'Did you mean --{close[0]}?' if close else 'See --help.'}"
    if re.match(r"[Uu]nrecognized arguments: [\d\s]+$", error):
        return f"{error}. Write several numbers as a list in brackets, such as --indices '[3,77]'."
    short = _in_short(error)
    if re.search(r"Parser key \"(model|data)\".*Given value type: <class 'dict'>", error):
        return (
            f"{short} If a config file has arguments without a class_path, as for LightningCLI(Model, Data), give the"
            " classes, too: --model package.Model --data package.Data."
        )
    if found := re.search(r"Parser key \"(model|data)\".*Given value type: <class 'str'>", error):
        return f"{short} Give the class by its import path, such as --{found[1]} package.module.Class."
    if lacking := re.match(r"argument (--[\w.]+): expected one argument", error):
        return f"{short} Give it a value, such as {lacking[1]} true, see --help."
    if listed := re.search(r"list\[.*Given value: ([^\s\[]\S*,\S*)$", error):
        return f"{short} Write a list in brackets: '[{listed[1]}]'."
    return f"{short} See --help."


def _in_short(error: str) -> str:
    """What was given and what was expected, by an error of the parser, which lists all types and their errors."""
    about = re.match(r'Parser key "([\w.]+)": (.*)', error)
    if about is None:
        return _sentence(error)
    key, text = about.groups()
    if problem := re.search(r"Problem with given class_path '([\w.]+)': (.*?) - Expected a", text):
        inner = re.sub(r'Parser key "([\w.]+)": ', r"\1: ", problem[2])
        return f"--{key} {problem[1]}: {_sentence(_types_by_name(inner))}"
    given = re.search(r"(?:Given|Got) value: (.*)$", text)
    expected = re.findall(r"Expected an? (<class '.*?'>|typing\.Literal\[.*?\])", text)
    if given and expected:
        return f"--{key} must be {_types_by_name(' or '.join(dict.fromkeys(expected)))}, got {_sentence(given[1])}"
    return f"--{key}: {_sentence(text)}"


def _types_by_name(text: str) -> str:
    text = re.sub(r"typing\.Literal\[(.*?)\]", lambda found: found[1].replace("'", "").replace(", ", " or "), text)
    return re.sub(r"(?:an? )?<class '(?:\w+\.)*(\w+)'>", lambda found: _TYPES.get(found[1], found[1]), text)


def _sentence(text: str) -> str:
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"
    return text if text.endswith((".", "…")) else f"{text}."


def classes_first(arguments: Sequence[str]) -> list[str]:
    """The arguments with the classes of model and data in front, too: they can then follow a config file without them.

    The parser reads a config file when it comes to it. The classes are repeated where they were, since they may replace
    those of the file.
    """
    found, pairs = [], [*zip(arguments, [*arguments[1:], ""], strict=True)]
    for one, following in pairs:
        if one in ("--model", "--data"):
            found += [one, following]
        elif one.startswith(("--model=", "--data=")):
            found.append(one)
    return [*found, *arguments]
