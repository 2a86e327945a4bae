"""``pagedlab new-policy``."""

from __future__ import annotations

import keyword
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from pagedlab.errors import ConfigError, nearest

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


def new_policy(
    name: Annotated[
        str, typer.Argument(help="What it will be called: lower-case words with hyphens, e.g. my-lru.")
    ],
    slot: Annotated[str, typer.Option(help="One of the ten slots.")] = "eviction",
    dir: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder in which the package's folder is made.")
    ] = Path("."),
) -> None:
    """Write a small package with a policy that works, its tests and an entry point, to begin from."""
    folder = write_package(name, slot, dir)
    typer.echo(f"{folder}: a package with the {slot} policy {name!r}")
    typer.echo(f"  cd {folder} && pytest && pip install -e .")


def write_package(name: str, slot: str, parent: Path) -> Path:
    """Write the package ``pagedlab-NAME`` into ``parent`` and return its folder.

    `ConfigError` for a name that cannot be one or is taken, an unknown slot, and a folder that is there already.
    """
    from pagedlab.cli.templates import FILES, TEMPLATES
    from pagedlab.registry import SLOTS, policy_names

    if slot not in SLOTS:
        raise ConfigError(f"no slot {slot!r}; the slots are {', '.join(SLOTS)}{nearest(slot, SLOTS)}")
    if not _NAME.fullmatch(name) or len(name) > 60:
        raise ConfigError(
            f"{name!r} cannot be a policy's name: lower-case letters, digits and single hyphens, a letter first, "
            "at most 60 in all"
        )
    if name in policy_names(slot):
        raise ConfigError(f"there is a {slot} policy {name!r} already; choose another name")
    if not parent.is_dir():
        raise ConfigError(f"{parent} is no folder")
    folder = parent / f"pagedlab-{name}"
    if folder.exists():
        raise ConfigError(f"{folder} is there already, and nothing in it was changed")
    template = TEMPLATES[slot]
    names = {
        "NAME": name,
        "SLOT": slot,
        "MODULE": f"pagedlab_{name.replace('-', '_')}",
        "CLASS": class_name(name),
    }
    parts = {
        "IMPORTS": template.imports,
        "BODY": template.body,
        "TEST_IMPORTS": _sections(_filled(template.test_imports, names), names["MODULE"]),
        "TEST": template.test,
    }
    for path, text in FILES.items():
        file = folder / _filled(path, names)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(_filled(_filled(text, parts), names), encoding="utf-8")
    return folder


def class_name(name: str) -> str:
    """Return the class's name: ``my-lru`` becomes ``MyLru``, and a word that the module needs itself gets a suffix."""
    made = "".join(word.capitalize() for word in name.split("-"))
    return f"{made}Policy" if keyword.iskeyword(made) or made in _TAKEN else made


_TAKEN = {
    "Allocator", "Block", "C", "Cached", "Candidate", "Chainedhash", "Claimant", "Decision", "Eviction", "Kernel",
    "Literal", "Load", "Lookup", "Match", "Padded", "Prefetch", "Preemption", "Prefix", "Request", "Reservation",
    "Residency", "Running", "Scheduler", "Sequence", "Step", "Swap", "Waiting",
}  # fmt: skip
"""Names that templates import or define."""


def _filled(text: str, values: dict[str, str]) -> str:
    for key, value in values.items():
        text = text.replace(f"@{key}@", value)
    return text


def _sections(imports: str, module: str) -> str:
    """Put imports in the order that formatters want: the standard library's, others', and the package's own."""
    sections: list[list[str]] = [[], [], []]
    for line in imports.splitlines():
        top = line.split()[1].partition(".")[0]
        sections[2 if top == module else 0 if top in sys.stdlib_module_names else 1].append(line)
    ordered = [
        sorted(lines, key=lambda line: (line.startswith("from"), line.split()[1])) for lines in sections
    ]
    return "\n\n".join("\n".join(lines) for lines in ordered if lines)
