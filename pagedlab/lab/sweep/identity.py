"""What makes two points of a sweep the same: plain descriptions of what they are made of, and digests of them.

A description is JSON data. Digests are equal in every process, so nothing here looks at ``hash`` or at an address. A
policy, or any other function, that is not part of pagedlab counts with its code: who edits one in a notebook gets new
points. Line numbers and comments do not count; what other modules define is taken by its name.
"""

from __future__ import annotations

import json
import pickle
from array import array
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from hashlib import sha256
from types import CodeType, FunctionType
from typing import Any

from pagedlab.config import Config
from pagedlab.lab.accesses import Accesses
from pagedlab.lab.results import Run
from pagedlab.policies.base import Policy
from pagedlab.policies.prompt import HashedPrompt
from pagedlab.workloads import Workload

_LONGEST = 500
"""Characters of a description; of anything longer only a digest is kept."""
_LENGTH = 24
"""Hexadecimal digits of a digest."""


def digest(described: Any) -> str:
    """Return a digest of JSON data."""
    text = json.dumps(described, sort_keys=True, default=repr)
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:_LENGTH]


def plain(value: Any) -> Any:
    """Return numpy's numbers as Python's, and everything else as it is."""
    return value.item() if hasattr(value, "item") and getattr(value, "shape", None) == () else value


def described(value: Any) -> Any:
    """Return an option, or a part of one, as JSON data: equal for equal values."""
    value = plain(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Policy):
        text = {"name": value.name or type(value).__name__, "params": described(value.get_params())}
        return text | ({"code": code(type(value))} if _foreign(type(value)) else {})
    if isinstance(value, Run):
        said = value.columns("outputs")
        return {"type": "Run", "digest": digest([said["request_id"], said["sample"], said["tokens"]])}
    if isinstance(value, FunctionType | type):
        name = f"{value.__module__}.{value.__qualname__}"
        return {"function": name} | ({"code": code(value)} if _foreign(value) else {})
    if isinstance(value, partial):
        return {"function": described(value.func), "given": described([*value.args, value.keywords])}
    made: Any = None
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        made = {key: described(v) for key, v in value.items()}
    elif isinstance(value, list | tuple):
        made = [described(v) for v in value]
    if made is not None:
        short = len(json.dumps(made, default=repr)) <= _LONGEST
        return made if short else {"type": type(value).__name__, "digest": digest(made)}
    kind = type(value)
    text = {"type": f"{kind.__module__}.{kind.__qualname__}", "digest": _pickled(value)}
    return text | ({"code": code(kind)} if _foreign(kind) and kind.__module__ != "builtins" else {})


def _pickled(value: Any) -> str:
    """Return a digest of any object. Of one that cannot be pickled it is a new one in every process."""
    try:
        return sha256(pickle.dumps(value, protocol=4)).hexdigest()[:_LENGTH]
    except Exception:
        return f"{value!r} at {id(value):x}"


# ---- configurations ------------------------------------------------------------------------------------------------


def described_config(config: Config, fields: Sequence[str] | None = None) -> dict[str, Any]:
    """Return the fields of a configuration (None: all of them) as JSON data."""
    found = config.describe()
    return json.loads(json.dumps({k: found[k] for k in fields or found}, default=repr))  # type: ignore[no-any-return]


def code_of(config: Config, fields: Iterable[str]) -> dict[str, str]:
    """Return a digest of the code of each policy that is not pagedlab's own, by slot."""
    policies = {slot: getattr(config, slot) for slot in fields}
    return {s: code(type(p)) for s, p in policies.items() if isinstance(p, Policy) and _foreign(type(p))}


def _foreign(thing: Any) -> bool:
    return not f"{thing.__module__}.".startswith("pagedlab.")


def code(thing: Any) -> str:
    """Return a digest of what a class or function does: its code, its bases, and what that uses of its own module."""
    return digest(_described_code(thing, set()))


def _described_code(thing: Any, seen: set[int]) -> Any:
    if id(thing) in seen:
        return "above"
    seen.add(id(thing))
    if isinstance(thing, type):
        parts: dict[str, Any] = {"name": thing.__qualname__}
        parts["bases"] = [
            _described_code(base, seen) if base.__module__ == thing.__module__ else base.__qualname__
            for base in thing.__bases__
        ]
        for name, value in sorted(vars(thing).items()):
            if not name.startswith("__") or isinstance(value, FunctionType):
                parts[name] = _part(value, thing.__module__, seen)
        return parts
    found: FunctionType = thing
    cells = [cell.cell_contents for cell in found.__closure__ or () if _filled(cell)]
    given = [*cells, *(found.__defaults__ or ()), *(found.__kwdefaults__ or {}).values()]
    used = {n: found.__globals__[n] for n in _names(found.__code__) if n in found.__globals__}
    return [
        _constants(found.__code__),
        [_part(value, found.__module__, seen) for value in given],
        {name: _part(value, found.__module__, seen) for name, value in sorted(used.items())},
    ]


def _part(value: Any, module: str, seen: set[int]) -> Any:
    """Describe what a class or function holds: code of its own module in full, anything else by name or value."""
    if isinstance(value, property):
        return [_part(f, module, seen) for f in (value.fget, value.fset) if f is not None]
    value = getattr(value, "__func__", value)
    if isinstance(value, FunctionType | type):
        if value.__module__ == module:
            return _described_code(value, seen)
        return f"{value.__module__}.{value.__qualname__}"
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return repr(value)
    if isinstance(value, tuple | list) and len(value) < 100:
        return [_part(v, module, seen) for v in value]
    return type(value).__qualname__


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _names(body: CodeType) -> set[str]:
    inner = [c for c in body.co_consts if isinstance(c, CodeType)]
    return set(body.co_names).union(*map(_names, inner))


def _constants(body: CodeType) -> list[Any]:
    consts = [
        _constants(c)
        if isinstance(c, CodeType)
        # Sets of strings have another order in every process.
        else (sorted(map(repr, c)) if isinstance(c, frozenset) else repr(c))
        for c in body.co_consts
    ]
    return [body.co_code.hex(), consts, body.co_names, body.co_varnames]


# ---- workloads -----------------------------------------------------------------------------------------------------


def of_workload(workload: Workload | Accesses) -> str:
    """Return a digest of everything that a run, a simulation or a replay reads of its requests."""
    if isinstance(workload, Accesses):
        return _of_accesses(workload)
    found = sha256(repr(("workload", len(workload), workload.content_ids)).encode())
    # Generators and readers let requests of equal length share one object: each is written once.
    written: dict[int, bytes] = {}
    for r in workload:
        for shared in (r.sampling, r.hints):
            if id(shared) not in written:
                written[id(shared)] = repr(shared).encode("utf-8", "surrogatepass")
            found.update(written[id(shared)])
        fields = (r.request_id, r.arrival, r.priority, r.salt, r.session, r.request_class, r.text)
        found.update(repr((*fields, r.follows, r.think_time)).encode("utf-8", "surrogatepass"))
        prompt: Any = r.prompt
        if isinstance(prompt, HashedPrompt):
            found.update(repr((prompt.num_tokens, prompt.hash_block)).encode())
            prompt = prompt.hash_ids
        found.update(_integers(prompt))
    for request_id, tokens in (workload.outputs or {}).items():
        found.update(repr(request_id).encode("utf-8", "surrogatepass"))
        found.update(_integers(tokens))
    return found.hexdigest()[:_LENGTH]


def _of_accesses(trace: Accesses) -> str:
    found = sha256(repr(("accesses", len(trace.requests), trace.block_size)).encode())
    for wanted in trace.requests:
        found.update(repr(wanted._replace(keys=())).encode("utf-8", "surrogatepass"))
        found.update(_integers(wanted.keys))
    return found.hexdigest()[:_LENGTH]


def _integers(values: Sequence[int]) -> bytes:
    """Return numbers as bytes, with how many they are before them."""
    try:
        body = array("q", values).tobytes()
    except OverflowError:
        body = repr(list(values)).encode()
    return b"%d:" % len(values) + body
