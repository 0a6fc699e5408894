# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Prints the reference of all options as Markdown, from the parsers that read them: `python docs/options.py`."""

import argparse

from semantic_fill import evaluate
from semantic_fill.command_line import build_parser
from semantic_fill.option_fields import OptionGroup
from semantic_fill.options import Options


def describe(option: argparse.Action) -> str:
    """A row of the table."""
    names = "<br>".join(f"`{name}`" for name in option.option_strings)
    choices = f" One of {', '.join(f'`{choice}`' for choice in option.choices)}." if option.choices else ""
    return f"| {names} | {option.help}{choices} |".replace("\n", " ")


def describe_all(options_class: type[OptionGroup]) -> list[str]:
    """A table for each group of options."""
    lines = []
    for group in build_parser(options_class, None)._action_groups:
        options = [option for option in group._group_actions if option.option_strings and option.dest != "help"]
        if options:
            lines += [
                f"### {(group.title or 'General').capitalize()}",
                "",
                "| option | what it does |",
                "| --- | --- |",
            ]
            lines += [*map(describe, options), ""]
    return lines


print("\n".join(["# Options", "", "## Training", "", *describe_all(Options)]))
print("\n".join(["## Evaluation", "", *describe_all(evaluate.EvaluationOptions)]))
