# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""What an option is: the field of a frozen dataclass, with its help text, its choices and its bounds.

`options.py` states the options of training with it, and evaluation its own. `command_line.py` makes parsers from them.
"""

import dataclasses
import math
import operator
import typing
from dataclasses import dataclass
from pathlib import Path


LIMITS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}


def option(
    default=dataclasses.MISSING,
    *,
    help: str,
    choices: typing.Iterable[str] | None = None,
    words: tuple[str, ...] = (),
    alias: str | None = None,
    at_least: float = 0,
    **limits: float,
) -> typing.Any:
    """
    A field of an option group.

    Args:
        default: Value where the option is not passed. Without one, the option is required.
        help: Help text on the command line and in the reference.
        choices: All accepted values.
        words: Strings accepted beside numbers.
        alias: Another name on the command line.
        at_least, limits: Bounds of a number, named as in `LIMITS`.
    """
    metadata = {"help": help, "choices": choices and tuple(choices), "words": words, "alias": alias}
    return dataclasses.field(default=default, metadata=metadata | {"limits": {"at_least": at_least} | limits})


@dataclass(frozen=True, kw_only=True)
class OptionGroup:
    """What all groups share: choices and bounds are checked however the object is made."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata["choices"]
            chosen = value if isinstance(value, tuple) else (value,)
            if choices and value is not None and not set(chosen) <= set(choices):
                raise ValueError(f"--{field.name} has to be one of {', '.join(choices)} but is {value!r}.")
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if not math.isfinite(value):
                raise ValueError(f"--{field.name} has to be a finite number but is {value}.")
            for name, bound in field.metadata["limits"].items():
                if not LIMITS[name](value, bound):
                    raise ValueError(f"--{field.name} has to be {name.replace('_', ' ')} {bound:g} but is {value}.")

    def _set_defaults(self, **defaults) -> None:
        """Fills in defaults that follow from other options. Only `__post_init__` may call it."""
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)


def check_output_dir(output_dir: str, **data: str | None) -> None:
    """Refuses to write into a folder of `data`, by the names of their options."""
    output = Path(output_dir)
    for name, folder in data.items():
        if folder is not None and Path(folder).is_dir() and output.resolve().is_relative_to(Path(folder).resolve()):
            raise ValueError(
                f"--output_dir {output} cannot lie in --{name} {folder}: a later run would take this run's pictures for data."
            )
