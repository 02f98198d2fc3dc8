# SPDX-License-Identifier: Apache-2.0
"""Rules of a grammar in which an answer gets stuck: `more ::= more` allows no next character.

A rule has a way on if one of its alternatives begins with a character, or with a rule that has a
way on, or is empty; found by repeating until nothing changes. A rule that never ends but goes on
(`more ::= "x" more`) is none of these: its answer is cut at `max_tokens`.

Read from xgrammar's normal form, the text of an `xgrammar.Grammar`: alternatives between
parentheses, and in them strings, character classes and names of rules, these with numbers of
repeats.
"""

import re

_PART = re.compile(
    r"""\s*(?:
        (?P<text>"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]\*?)
        |(?P<name>[A-Za-z_][\w.-]*)(?:\{(?P<least>\d+),\s*-?\d+\})?(?!\s*\()
        |(?P<mark>[()|])
    )""",
    re.VERBOSE,
)
_LOOKAHEAD = re.compile(r"\)\s*\(=.*$", re.DOTALL)

CHARACTER = ""
"""Stands for a character in an alternative; all else there is a rule's name."""


def stuck_rules(normal_form: str) -> list[str]:
    """Names of the rules without a way on, in the order of the grammar.

    Args:
        normal_form: one rule per line. A rule that is written in another way counts as one with a
            way on: what is not understood is not refused.
    """
    rules = {}
    for line in normal_form.splitlines():
        name, found, body = line.partition(" ::= ")
        if found:
            rules[name.strip()] = _alternatives(_LOOKAHEAD.sub(")", body))
    go_on = {CHARACTER, *(name for name, alternatives in rules.items() if alternatives is None)}
    while more := {
        name
        for name, alternatives in rules.items()
        if name not in go_on and any(_goes_on(parts, go_on) for parts in alternatives or ())
    }:
        go_on |= more
    return [name for name in rules if name not in go_on]


def _goes_on(parts: list[tuple[str, bool]], go_on: set[str]) -> bool:
    for name, may_be_left_out in parts:
        if name in go_on or not may_be_left_out:
            return name in go_on
    return True  # it is empty, or all of it may be left out


def _alternatives(body: str) -> list[list[tuple[str, bool]]] | None:
    """Each alternative's parts, and whether they may be left out; None if not understood."""
    alternatives: list[list[tuple[str, bool]]] = [[]]
    at, body = 0, body.strip()
    while at < len(body):
        part = _PART.match(body, at)
        if part is None:
            return None
        at = part.end()
        if part["mark"] == "|":
            alternatives.append([])
        elif part["name"]:
            alternatives[-1].append((part["name"], part["least"] == "0"))
        elif part["text"] and part["text"] != '""':
            alternatives[-1].append((CHARACTER, False))
    return alternatives
