"""Eviction that learns while it serves: a small model of who comes back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from math import exp, log, log2
from random import Random
from typing import Any, ClassVar, NamedTuple

from pagedlab.policies.base import param
from pagedlab.policies.block import Block
from pagedlab.policies.eviction import Score
from pagedlab.policies.shelf.groups import PS_PER_SECOND, Grouped
from pagedlab.registry import register

FEATURES = ("bias", "turns", "gap", "gap unknown", "depth", "idle")
_IDLE = len(FEATURES) - 1
_CLASSES = 32
"""Request classes with a weight of their own; further ones share the last."""


class Kind(NamedTuple):
    """What the model sees of a block besides how long it has waited; logarithms in whole steps."""

    turns: int
    gap: int | None
    depth: int
    request_class: int


class Example(NamedTuple):
    """A block as it was when it was drawn."""

    kind: Kind
    idle: float
    """Seconds waited."""
    at: int
    """Blocks stored until then."""


class _Session:
    """What is remembered of a conversation."""

    def __init__(self, tip: Hashable) -> None:
        self.tip = tip
        """Key of its last block."""
        self.turns = 1
        self.mean_gap: float | None = None
        """Picoseconds between the end of a turn and the next one."""
        self.ended: int | None = None
        """When its last turn ended; None while one is going on."""


def _step(x: float) -> int:
    return round(log2(1 + x))


def _seconds(ps: float) -> float:
    return max(0.0, ps) / PS_PER_SECOND


@register("eviction", "returning")
class Returning(Grouped):
    """Give up the leaf that a model, trained on what happened so far, thinks least likely to be asked for soon.

    Logistic regression on logarithms of: turns of the session so far, its mean gap between turns, tokens before the
    block, time waited; and the request class. Where a request names no session, a block's own hits count as turns.

    Once in ``every`` blocks stored, a released block is drawn at random (``seed``) and noted as it is then. If somebody
    asks for it before ``horizon`` times the cache has been stored, evicted or not, it returned, else not; either is one
    step of gradient descent. The weight of the waiting time is kept at or below 0: who waits does not get likelier
    to return.

    LPC predicts from what was said whether the conversation goes on, with a language model trained beforehand. Here
    nothing is read and nothing known at the start: weights of 0, and a small one for waiting, so it begins as LRU
    among leaves. Examples are drawn as in LRB (Song et al., Learning Relaxed Belady, NSDI 2020).

    `victims` O(kinds + n log cached), other operations O(log cached); kinds are the combinations of the features in
    powers of two that are cached. Memory for ``horizon`` · capacity / ``every`` examples and for ``capacity`` sessions.

    Yang et al., Learned Prefix Caching for Efficient LLM Inference, NeurIPS 2025.
    """

    rate: float = param(0.05, help="step size of gradient descent", low=0.0, high=1.0)
    every: int = param(4, help="an example for so many blocks stored", low=1, high=1024, unit="blocks")
    horizon: float = param(1.0, help="what counts as soon", low=0.01, high=100.0, unit="caches stored")
    seed: int = param(0, help="of the drawing of examples", low=0)

    leaves_only: ClassVar[bool] = True

    def reset(self, *, capacity: int) -> None:
        super().reset(capacity=capacity)
        self._capacity = capacity
        self._random = Random(self.seed)
        self._stored = 0
        self._drawn_from: list[Block] = []
        """What is cached, each block in a place of its own; a place that comes free is taken by the next."""
        self._places: dict[Block, int] = {}
        self._vacant: list[int] = []
        self._weights = [0.0] * len(FEATURES)
        self._weights[_IDLE] = -0.1
        self._class_weights = [0.0] * _CLASSES
        self._classes: dict[str | None, int] = {}
        self._sessions: OrderedDict[str, _Session] = OrderedDict()
        self._open: OrderedDict[Hashable, Example] = OrderedDict()
        """Examples that may still return, the oldest first."""
        self._learned = {"returned": 0, "not returned": 0}

    # ---- the model ---------------------------------------------------------------------------------------------

    def _inputs(self, kind: Kind, idle: float) -> list[float]:
        gap = kind.gap
        known = 0.0 if gap is None else gap / 10
        return [1.0, kind.turns / 5, known, float(gap is None), kind.depth / 10, log(1 + idle) / 5]

    def _logit(self, kind: Kind, idle: float) -> float:
        inputs = self._inputs(kind, idle)
        return sum(w * x for w, x in zip(self._weights, inputs)) + self._class_weights[kind.request_class]

    def _learn(self, example: Example, returned: bool) -> None:
        kind, idle = example.kind, example.idle
        self._learned["returned" if returned else "not returned"] += 1
        logit = max(-30.0, min(30.0, self._logit(kind, idle)))
        step = self.rate * (returned - 1 / (1 + exp(-logit)))
        for i, x in enumerate(self._inputs(kind, idle)):
            self._weights[i] += step * x
        self._weights[_IDLE] = min(0.0, self._weights[_IDLE])
        self._class_weights[kind.request_class] += step

    def worth(self, group: Kind, block: Block) -> Score:
        return self._logit(group, _seconds(self.view.now - block.last_released)), block.last_released

    def group(self, block: Block) -> Kind:
        session = None if block.session is None else self._sessions.get(block.session)
        turns, gap = (block.hits, None) if session is None else (session.turns, session.mean_gap)
        return Kind(
            _step(turns),
            None if gap is None else _step(_seconds(gap)),
            _step(block.depth),
            self._class_number(block.request_class),
        )

    def _class_number(self, name: str | None) -> int:
        if name not in self._classes and len(self._classes) >= _CLASSES:
            return _CLASSES - 1
        return self._classes.setdefault(name, len(self._classes))

    # ---- what happens ------------------------------------------------------------------------------------------

    def insert(self, block: Block) -> None:
        super().insert(block)
        self._class_number(block.request_class)
        self._draw(block)
        name = block.session
        if name is None:
            return
        session = self._sessions.get(name)
        if session is None:
            self._sessions[name] = _Session(block.key)
            if len(self._sessions) > self._capacity:
                self._sessions.popitem(last=False)
            return
        session.tip = block.key
        if session.ended is not None:
            gap = float(max(0, self.view.now - session.ended))
            mean = session.mean_gap
            session.mean_gap = gap if mean is None else (mean + gap) / 2
            session.turns += 1
            session.ended = None
            self._sessions.move_to_end(name)

    def _draw(self, stored: Block) -> None:
        if self._vacant:
            self._places[stored] = place = self._vacant.pop()
            self._drawn_from[place] = stored
        else:
            self._places[stored] = len(self._drawn_from)
            self._drawn_from.append(stored)
        self._stored += 1
        while self._open:
            key = next(iter(self._open))
            if self._stored - self._open[key].at <= self.horizon * self._capacity:
                break
            self._learn(self._open.pop(key), False)
        if self._stored % self.every == 0:
            block = self._drawn_from[self._random.randrange(len(self._drawn_from))]
            if block in self._released and block.key not in self._open:
                idle = _seconds(self.view.now - block.last_released)
                self._open[block.key] = Example(self.group(block), idle, self._stored)

    def remove(self, block: Block) -> None:
        self._vacant.append(self._places.pop(block))
        super().remove(block)

    def release(self, block: Block) -> None:
        session = None if block.session is None else self._sessions.get(block.session)
        if session is not None and session.tip == block.key:
            session.ended = self.view.now
        super().release(block)

    def hit(self, block: Block) -> None:
        self._asked_for(block.key)
        super().hit(block)

    def miss(self, key: Hashable, readmitted: bool = False) -> None:
        self._asked_for(key)

    def _asked_for(self, key: Hashable) -> None:
        example = self._open.pop(key, None)
        if example is not None:
            self._learn(example, True)

    def stats(self) -> dict[str, Any]:
        return {"weights": dict(zip(FEATURES, self._weights)), **self._learned}
