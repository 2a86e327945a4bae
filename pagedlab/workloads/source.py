"""Pieces of Python-like source, so that a model trained on Python has something to say."""

from __future__ import annotations

import random

PREAMBLE = '''"""Small helpers for files, text and numbers."""

import collections
import functools
import os
import re
import sys

__all__ = ["open", "close", "read", "write"]


class Error(Exception):
    """Base class for exceptions in this module."""
'''

_VERBS = [
    "read",
    "write",
    "parse",
    "format",
    "open",
    "close",
    "find",
    "split",
    "join",
    "update",
    "remove",
    "check",
    "load",
    "store",
    "merge",
    "count",
]
_NOUNS = [
    "line",
    "header",
    "file",
    "name",
    "path",
    "message",
    "value",
    "key",
    "token",
    "field",
    "table",
    "block",
    "record",
    "node",
    "entry",
    "option",
]
_TYPES = ["str", "int", "list", "dict", "tuple", "bytes"]
_DOCS = (
    "Return the {noun} of the given {other}.",
    "{verb} a {noun} and return it.",
    "Return True if the {noun} is a valid {other}.",
    "{verb} all {noun}s in the {other}, or raise ValueError.",
)
_STEPS = (
    "    if {a} is None:\n        return None\n",
    "    if not isinstance({a}, {kind}):\n        raise TypeError('{a} must be {kind}, not ' + type({a}).__name__)\n",
    "    result = []\n    for {noun} in {a}:\n        result.append({noun})\n",
    "    try:\n        {noun} = {a}[{b}]\n    except KeyError:\n        raise ValueError({b}) from None\n",
    "    {noun} = {a}.{verb}({b})\n",
    "    with open({b}) as {noun}:\n        data = {noun}.read()\n",
    "    while {b}:\n        {b} = {b} - 1\n",
)


def ask(rng: random.Random) -> tuple[str, tuple[str, str]]:
    """Return the next piece that a person types, ending in an open function, and the function's arguments."""
    verb, noun, other = rng.choice(_VERBS), *rng.sample(_NOUNS, 2)
    doc = rng.choice(_DOCS).format(verb=verb.capitalize(), noun=noun, other=other)
    name = f"{verb}_{noun}"
    return f"\n\n# {doc}\ndef {name}({noun}, {other}):", (noun, other)


def reply(rng: random.Random, arguments: tuple[str, str]) -> str:
    """Return a scripted body for the open function."""
    a, b = arguments
    steps = rng.sample(_STEPS, rng.randint(1, 3))
    body = "".join(
        s.format(a=a, b=b, noun=rng.choice(_NOUNS), verb=rng.choice(_VERBS), kind=rng.choice(_TYPES))
        for s in steps
    )
    return "\n" + body + f"    return {a}"
