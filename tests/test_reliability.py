# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""docs/reliability.md names tests that exist."""

import ast
import re

from helpers import ROOT


def test_every_test_that_is_named_exists():
    rows = [line for line in (ROOT / "docs" / "reliability.md").read_text().splitlines() if line.startswith("| ")][2:]
    existing = {
        node.name
        for path in (ROOT / "tests").glob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    assert len(rows) > 10
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row.split("|")[-2])
        assert named and set(named) <= existing, row
