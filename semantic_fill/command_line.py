# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""The command line, made from the fields of an option group, and the YAML file that can stand in for it.

`transformers.HfArgumentParser` does not fit: it knows neither `bool | None` nor `int | str`, shows the values of unknown
options, and checks neither types nor choices nor names in a YAML file.
"""

import argparse
import dataclasses
import difflib
import types
import typing
from pathlib import Path

import yaml

from semantic_fill.option_fields import OptionGroup


def build_parser(options_class: type[OptionGroup], description: str | None) -> argparse.ArgumentParser:
    """
    A parser with one option for each field, in the group of the first base that has it. Options that are not passed are
    left out.
    """
    parser = argparse.ArgumentParser(
        description=description,
        # A list of all options would push the error of a wrong command line off the screen.
        usage="%(prog)s [-h] [CONFIG.yaml] [--OPTION VALUE ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("config_file", nargs="?", help="The same as --config.")
    parser.add_argument("--config", help="YAML file of options. Options on the command line take precedence.")
    # A field that a class defines anew has the help and the default of that class.
    fields = {field.name: field for field in dataclasses.fields(options_class)}
    hints = typing.get_type_hints(options_class)
    for group_class in (*options_class.__bases__, options_class):
        group = parser.add_argument_group(group_class.__doc__.splitlines()[0] if group_class.__doc__ else None)
        for field in dataclasses.fields(group_class):
            if field.name in group_class.__dict__.get("__annotations__", {}) and field.name in fields:
                field = fields.pop(field.name)
                names = [f"--{name}" for name in (field.name, field.metadata["alias"]) if name]
                group.add_argument(*names, help=_help(field), **_argument(field, hints))
    return parser


def _help(field: dataclasses.Field) -> str:
    """The help text of a field, with its default unless the text itself tells it. Switches are off by default."""
    text, default = field.metadata["help"], field.default
    if default is dataclasses.MISSING:
        return f"{text} Required."
    if default is None or default is False or default == () or "Default:" in text:
        return text
    shown = "yes" if default is True else " ".join(default) if isinstance(default, tuple) else default
    return f"{text} Default: {shown}."


def _argument(field: dataclasses.Field, hints: dict) -> dict:
    """What `add_argument` needs to know of a field beside its name and help."""
    hint = hints[field.name]
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    many = [typing.get_args(kind)[0] for kind in kinds if typing.get_origin(kind) is tuple]
    kind, words = (many or kinds)[0], field.metadata["words"]

    def parse(text: str):
        return text if text in words else kind(text)

    # Argparse names it in the error about a value of another type.
    parse.__name__ = " or ".join((*words, kind.__name__))
    return {"type": parse, "choices": field.metadata["choices"]} | ({"nargs": "+"} if many else {})


def read_yaml(path: str, options_class: type[OptionGroup]) -> list[str]:
    """
    The entries of a YAML file as command-line arguments, so that types, choices and unknown names are checked alike.

    Raises:
        `ValueError`: if the file cannot be read, or is no flat mapping of option names to values.
    """
    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path} cannot be read: {error}") from error
    if root is not None and not isinstance(root, yaml.MappingNode):
        raise ValueError(f"--config {path} has to hold a mapping of option names to values.")
    switches = {f"--{name}" for name, hint in typing.get_type_hints(options_class).items() if hint is bool}
    arguments = []
    for key, value in root.value if root is not None else ():
        name = f"--{key.value}"
        if name == "--config":
            raise ValueError(f"{path} cannot name another file with `config`.")
        if value.tag == "tag:yaml.org,2002:null":
            continue
        if name in switches:
            if value.value not in ("true", "false"):
                raise ValueError(f"{key.value} in {path} has to be true or false.")
            arguments.append(name if value.value == "true" else f"--no-{key.value}")
        elif isinstance(value, yaml.ScalarNode):
            # The text as it stands: `no` and `1e-4` mean what they mean on the command line.
            arguments.append(f"{name}={value.value}")
        elif isinstance(value, yaml.SequenceNode) and all(isinstance(v, yaml.ScalarNode) for v in value.value):
            arguments += [name, *(v.value for v in value.value)]
        else:
            raise ValueError(f"{key.value} in {path} has to be a single value or a list.")
    return arguments


def parse_options(options_class: type[OptionGroup], description: str | None, arguments: list[str]) -> typing.Any:
    """
    An object of `options_class` from a command line and the YAML file that it may name. Ends the process with a message
    where they are wrong; the value of an unknown option, which may be a token, is in no message.
    """
    parser = build_parser(options_class, description)

    def parse(arguments: list[str], place: str = "") -> dict:
        found, unknown = parser.parse_known_args(arguments)
        # Any other value is a slip, and may be a token.
        if not getattr(found, "config_file", ".yaml").endswith((".yaml", ".yml")):
            unknown.append(found.config_file)
        if unknown:
            names = [text.split("=")[0] for text in unknown if text.startswith("--")]
            if not names:
                parser.error(
                    f"unknown options{place}: values that belong to none. A switch such as --push_to_hub takes no value, most"
                    " others take one, and a file of options ends in .yaml or .yml."
                )
            # Private, but argparse has no other list of its options.
            known = [name for action in parser._actions for name in action.option_strings]
            close = [found for name in names for found in difflib.get_close_matches(name.replace("-", "_"), known, 1)]
            hint = f" Did you mean {', '.join(close)}?" if close else ""
            if "token" in str(names):
                hint = " Tokens are not taken here: use `hf auth login` or HF_TOKEN."
            parser.error(f"unknown options{place}: {', '.join(names)}.{hint}")
        return vars(found)

    found = parse(arguments)
    try:
        if "config" in found and "config_file" in found:
            raise ValueError("Pass one YAML file, either alone or with --config.")
        config = found.get("config", found.get("config_file"))
        if config is not None:
            found = parse(read_yaml(config, options_class), f" in {config}") | found
        found = {
            # Argparse makes lists of several values, which could be changed.
            name: tuple(value) if isinstance(value, list) else value
            for name, value in found.items()
            if name not in ("config", "config_file")
        }
        missing = [
            field.name
            for field in dataclasses.fields(options_class)
            if field.default is dataclasses.MISSING and field.name not in found
        ]
        if missing:
            raise ValueError(f"these options are required: {', '.join(f'--{name}' for name in missing)}.")
        return options_class(**found)
    except ValueError as error:
        parser.error(str(error))
