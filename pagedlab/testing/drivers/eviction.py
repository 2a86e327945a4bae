"""One tier of blocks around an eviction policy: requests for paths of a small tree of prefixes."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any, ClassVar

from pagedlab.policies.block import Block, Origin
from pagedlab.policies.eviction import LRU
from pagedlab.policies.view import View
from pagedlab.testing.driver import Driver

BLOCK_SIZE = 4
REMOVED = "removals_by_others_are_heard"
_SECOND = 10**12
_ORIGINS = (
    Origin(),
    Origin("s", "chat", None, 1, 2),
    Origin("t", "agent", "tenant", 2, 4, 80, 3.0),
    Origin("s", "chat", None, 3, None, 10, None),
)


class World(View):
    """A clock that the driver sets, a queue of what comes next, and blocks that cost more the deeper they lie."""

    flops_per_pair = 0.25

    def __init__(self) -> None:
        self.time = 0
        self.at = 0
        self.queue: list[list[int]] = []

    @property
    def now(self) -> int:
        """The driver's time, in picoseconds."""
        return self.time

    @property
    def queue_state(self) -> Hashable:
        """How much of the queue is done."""
        return self.at

    def coming(self, n: int) -> Iterator[Sequence[int]]:
        """The next paths."""
        return iter(self.queue[self.at : self.at + n])


def path_of(argument: int) -> list[int]:
    """Return the keys of a path, first to last: one to three blocks, four roots, four branches."""
    key = argument // 3 % 4
    keys = [key]
    for _ in range(argument % 3):
        key = 4 + 4 * key + argument // 12 % 4
        keys.append(key)
    return keys


def again(paths: list[list[int]], argument: int) -> list[int]:
    """Return a path that was asked for before, counted from the last."""
    return paths[-1 - argument % len(paths)] if paths else path_of(0)


class Tier(Driver):
    """The cache as far as an eviction policy can see it. The policy hears what it would hear in the engine.

    Options: ``quick`` uses the short cuts, ``look`` carries out looks (else they are left out), ``forget`` lets others
    remove blocks.
    """

    operations: ClassVar[tuple[str, ...]] = (
        "ask_for",
        "hold",
        "let_go",
        "ask_again",
        "hold_again",
        "evict",
        "look",
        "wait",
        "forget",
    )

    def begin(self, codes: Sequence[int]) -> None:
        """Reset the policy for an empty tier."""
        self.quick = self.options.get("quick", False)
        self.looks = self.options.get("look", False)
        self.forgets = self.options.get("forget", False)
        self.view = World()
        self.paths: list[list[int]] = []
        """What was asked for so far."""
        for code in codes:
            argument, which = divmod(code - 1, len(self.operations))
            if "again" in self.operations[which]:
                self.view.queue.append(again(self.view.queue, argument))
            elif which < 2:
                self.view.queue.append(path_of(argument))
        self.cached: dict[int, Block] = {}
        self.held: list[list[Block]] = []
        self.spare = [Block(i, size=BLOCK_SIZE) for i in reversed(range(self.size))]
        self.idle: dict[Block, None] = {}
        self.names: dict[int, str] = {}
        self.gone: dict[Block, str] = {}
        self.seen: list[int] = []
        """Keys of all observations so far."""
        self.born = 0
        named: dict[str, Any] = {}
        if self.policy.needs_future:
            named["future"] = Tier(LRU(), self.size, codes, forget=self.forgets, like=True).run(codes).seen  # type: ignore[attr-defined]
        self.careful = self.policy.needs_future or self.options.get("like", False)
        """Whether what is observed must not depend on the policy, because it has been foretold."""
        self.ask("attach", self.policy.attach, self.view)
        self.ask("reset", self.policy.reset, capacity=self.size, **named)

    # ---- operations ----------------------------------------------------------------------------------------------

    def ask_for(self, argument: int) -> None:
        """A request that ends at once."""
        if self.start(path_of(argument), argument):
            self.let_go(len(self.held) - 1)

    def hold(self, argument: int) -> None:
        """A request begins, and holds its blocks."""
        self.start(path_of(argument), argument)

    def ask_again(self, argument: int) -> None:
        """A request for what an earlier one wanted; it ends at once."""
        if self.start(again(self.paths, argument), argument):
            self.let_go(len(self.held) - 1)

    def hold_again(self, argument: int) -> None:
        """A request for what an earlier one wanted begins, or that one itself, which was preempted."""
        self.start(again(self.paths, argument), argument, readmitted=argument % 2 == 1)

    def start(self, path: list[int], argument: int, *, readmitted: bool = False) -> bool:
        """Admit a request; False if there is no room for it."""
        self.paths.append(path)
        self.view.at += 1
        used = {block for blocks in self.held for block in blocks}
        found: list[Block] = []
        for key in path:
            if key not in self.cached:
                break
            found.append(self.cached[key])
        room = len({b.key for b in used} | set(path)) if self.careful else len(used) + len(path)
        if room > self.size:
            return False
        self.use(found)
        missing = path[len(found) :]
        for key in missing:
            self.observe(key)
            self.tell(f"miss {self.name(key)}" + (" (readmitted)" if readmitted else ""))
            self.ask(f"miss({self.name(key)})", self.policy.miss, key, readmitted)
        short = len(missing) - len(self.spare)
        if short > 0:
            self.give_up(short, ())
        held = list(found)
        for i, key in enumerate(missing, len(found)):
            if key in self.cached:
                self.remove([self.cached[key]], "remove {}, which lost its prefix")
            held.append(self.store(key, path[i - 1] if i else None, i, argument))
        self.held.append(held)
        return True

    def use(self, found: list[Block]) -> None:
        """Hit each of these blocks."""
        for block in found:
            block.hits += 1
            block.ref_count += 1
            self.idle.pop(block, None)
            assert block.key is not None
            self.observe(block.key)
            self.tell(f"hit {self.name(block)}")
        self.report("hit", found)

    def store(self, key: int, parent: int | None, depth: int, argument: int) -> Block:
        """Put a block of content into the cache; it is in use."""
        block = self.spare.pop()
        self.born += 1
        self.gone.pop(block, None)
        block.key = block.serial = key
        block.parent = block.parent_key = parent
        block.content = (key,)
        block.depth, block.fill = depth * BLOCK_SIZE, BLOCK_SIZE
        block.origin = _ORIGINS[argument % len(_ORIGINS)]
        block.born, block.created = self.born, self.view.now
        block.hits, block.ref_count = 0, 1
        self.cached[key] = block
        self.tell(f"insert {self.name(key)}")
        self.ask(f"insert({self.name(key)})", self.policy.insert, block)
        return block

    def let_go(self, argument: int) -> None:
        """A request ends: its blocks are released, the last one first."""
        if not self.held:
            return
        released = []
        for block in reversed(self.held.pop(argument % len(self.held))):
            block.ref_count -= 1
            if block.ref_count:
                continue
            if block.key is None:
                self.spare.append(block)
                continue
            block.last_released = self.view.now
            self.idle[block] = None
            released.append(block)
            self.tell(f"release {self.name(block)}")
        self.report("release", released)

    def evict(self, argument: int) -> None:
        """Somebody makes room: up to as many victims as there are candidates, and one more."""
        guard, n = argument % 8, 1 + argument // 8 % 4
        protected = [block for i, block in enumerate(self.cached.values()) if guard >> i & 1]
        self.give_up(min(n, len(self.idle) + 1), protected)

    def look(self, argument: int) -> None:
        """Ask for victims and take none."""
        n = 1 + argument % (len(self.idle) + 1)
        if self.looks:
            said, chosen = self.victims(n, ())
            self.tell(f"{said} returned {self.names_of(chosen)}", aside=True)

    def wait(self, argument: int) -> None:
        """Time passes."""
        self.view.time += (1 + argument) * _SECOND
        self.tell(f"wait {1 + argument} s")

    def forget(self, argument: int) -> None:
        """A block goes that nobody named, in use or not."""
        keys = [key for path in self.paths for key in path]
        block = self.cached.get(keys[argument % len(keys)]) if keys else None
        if block is None or not self.forgets or (self.careful and block.ref_count):
            return
        self.error_law = REMOVED
        self.remove([block], "remove {}, which was forgotten" + (" while in use" if block.ref_count else ""))

    def finish(self) -> None:
        """End all requests, and see in which order all blocks would go."""
        while self.held:
            self.let_go(0)
        self.give_up(len(self.idle), (), only_look=True)

    # ---- what the operations are made of --------------------------------------------------------------------------

    def observe(self, key: int) -> None:
        """Note a key that the policy is about to hear of."""
        self.seen.append(key)

    def report(self, what: str, blocks: list[Block]) -> None:
        """Tell of several blocks, one by one or by the short cut."""
        if self.quick and blocks:
            said = f"{what}_all({self.names_of(blocks)})"
            self.ask(said, getattr(self.policy, f"{what}_all"), blocks)
        else:
            for block in blocks:
                self.ask(f"{what}({self.name(block)})", getattr(self.policy, what), block)

    def remove(self, blocks: list[Block], text: str) -> None:
        """Take blocks out of the cache, and say so."""
        for block in blocks:
            self.tell(text.format(self.name(block)))
        self.report("remove", blocks)
        self.vanish(blocks)

    def vanish(self, blocks: list[Block]) -> None:
        """Take blocks out of the books."""
        for block in blocks:
            self.gone[block] = self.name(block)
            assert block.key is not None
            del self.cached[block.key]
            self.idle.pop(block, None)
            block.key = None
            if not block.ref_count:
                self.spare.append(block)

    def give_up(self, n: int, protected: Sequence[Block], *, only_look: bool = False) -> None:
        """Ask for ``n`` victims and take them."""
        if n < 1:
            return
        if self.quick and n == 1 and not protected and not only_look:
            named = self.ask("evict()", self.policy.evict)
            taken = [] if named is None else [named]
            self.legal("evict()", 1, (), taken)
            self.tell(f"victims(1) returned {self.names_of(taken)}")
            for victim in taken:
                self.tell(f"remove {self.name(victim)}")
            self.vanish(taken)
            return
        said, chosen = self.victims(n, protected)
        self.tell(f"{said} returned {self.names_of(chosen)}")
        if chosen and not only_look:
            self.remove(chosen, "remove {}")

    def victims(self, n: int, protected: Sequence[Block]) -> tuple[str, list[Block]]:
        """Ask for victims, and hold the answer to the laws; return what was asked, too."""
        said = f"victims({n}{f', protected=[{self.names_of(protected)}]' if protected else ''})"
        chosen = self.ask(said, self.policy.victims, n, list(protected))
        self.legal(said, n, protected, chosen)
        return said, list(chosen)

    def legal(self, said: str, n: int, protected: Sequence[Block], chosen: Any) -> None:
        """Say which law an answer breaks."""
        if not isinstance(chosen, list) or not all(isinstance(block, Block) for block in chosen):
            raise self.broke("victims_are_blocks", f"{said} returned {chosen!r}, which is no list of blocks")
        told = f"{said} returned {self.names_of(chosen)}"
        for block in chosen:
            cached = block.key is not None and self.cached.get(block.key) is block
            if not cached:
                law = REMOVED if self.forgets and block in self.gone else "victims_are_resident"
                raise self.broke(law, f"{told}; {self.name(block)} is not cached")
            if block.ref_count:
                raise self.broke("victims_are_not_in_use", f"{told}; {self.name(block)} is in use")
            if block in protected:
                raise self.broke("victims_are_unprotected", f"{told}; {self.name(block)} is protected")
        if len(set(chosen)) != len(chosen):
            raise self.broke("victims_are_distinct", f"{told}, one of them twice")
        if len(chosen) not in (0, n):
            raise self.broke("victims_are_all_or_none", f"{told}, which is neither {n} blocks nor none")
        able = len(self.idle) - sum(block in self.idle for block in protected)
        if not chosen and able >= n:
            raise self.broke("victims_are_found", f"{told}, though {able} block{'s' * (able > 1)} could go")

    # ---- names ---------------------------------------------------------------------------------------------------

    def name(self, what: Block | int) -> str:
        """Return the letter of a content, A for the first that was met; a child says whose."""
        if isinstance(what, Block):
            if what.key is None:
                return self.gone.get(what, "a blank block")
            what = what.key
        if what not in self.names:
            at = len(self.names)
            letter = chr(ord("A") + at % 26) + (str(at // 26) if at >= 26 else "")
            self.names[what] = letter
        return self.names[what]

    def names_of(self, blocks: Sequence[Block]) -> str:
        """Return the names of blocks."""
        return ", ".join(map(self.name, blocks)) or "nothing"
