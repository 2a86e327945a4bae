"""The blocks of one tier: who is free, in use, cached; where the next one comes from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from operator import itemgetter

from pagedlab.errors import InvariantBroken, PolicyError
from pagedlab.policies.allocator import Allocator
from pagedlab.policies.block import DEVICE, NOWHERE, TIER_NAMES, Block, Origin
from pagedlab.policies.eviction import Eviction
from pagedlab.policies.view import NOTHING_KNOWN, View


class BlockPool:
    """Hands out blocks, counts who holds them, and evicts cached ones when free ones run out.

    ``on_evict(blocks)`` is called with the victims while their identity can still be read; afterwards they
    are blank. The first ``reserved`` blocks are never handed out (a null block).
    """

    def __init__(
        self,
        num_blocks: int,
        allocator: Allocator,
        eviction: Eviction,
        on_evict: Callable[[list[Block]], None],
        *,
        tier: int = DEVICE,
        block_size: int,
        reserved: int = 0,
        view: View = NOTHING_KNOWN,
    ) -> None:
        self.tier = tier
        self.block_size = block_size
        self.blocks = [Block(i, tier, block_size) for i in range(num_blocks)]
        self.reserved = reserved
        self.capacity = num_blocks - reserved
        """Blocks that can be handed out at all."""
        self.allocator = allocator
        self.eviction = eviction
        self.num_free = self.capacity
        """Blocks whose content nobody can find: what the allocator has, counted here as it is asked for so often."""
        self.num_cached = 0
        """Blocks with count 0 that can still be found."""
        self.saved_tokens = 0
        """Tokens that would have to be stored again if nobody shared a block."""
        self._on_evict = on_evict
        self._stores = 0
        allocator.reset(range(reserved, num_blocks))
        eviction.attach(view)
        eviction.reset(capacity=num_blocks - reserved)
        self._partitioned = eviction.partitioned

    @property
    def num_in_use(self) -> int:
        """Blocks that some table holds."""
        return self.capacity - self.num_free - self.num_cached

    def limit(self, origin: Origin) -> int:
        """Blocks that a request from ``origin`` can have if nothing else runs."""
        return min(self.capacity, self.eviction.limit(origin)) if self._partitioned else self.capacity

    def has_room(
        self,
        n: int,
        protected: Collection[Block] = (),
        *,
        contiguous: bool = False,
        origin: Origin | None = None,
    ) -> bool:
        """Whether `take` would succeed. ``protected`` cached blocks cannot be evicted. Changes nothing."""
        if self._partitioned and origin is not None:
            room = self.num_free + self.eviction.obtainable(origin, protected)
            if n > room or not contiguous or not self.allocator.contiguous or n < 2:
                return n <= room
            all_of_it = self.eviction.victims_for(origin, room, self.num_free, protected)
            return all_of_it is not None and self.allocator.fits(n, [b.index for b in all_of_it])
        short = n - self.num_free - self.num_cached
        if short > 0 or (short > -len(protected) and short + [b.ref_count for b in protected].count(0) > 0):
            return False
        if not contiguous or not self.allocator.contiguous or n < 2:
            return True
        guarded = set(protected)
        also = [b.index for b in self.blocks if b.key is not None and b.ref_count == 0 and b not in guarded]
        return self.allocator.fits(n, also)

    def take(
        self,
        n: int,
        protected: Collection[Block] = (),
        *,
        after: int | None = None,
        contiguous: bool = False,
        origin: Origin | None = None,
    ) -> list[Block] | None:
        """Hand out ``n`` blocks with count 1, evicting as needed, or return None with nothing changed.

        ``contiguous`` insists on what a contiguous allocator promises; without it such an allocator may serve
        several runs (a sequence that grows). ``origin`` is whom the blocks are for; None: nobody in particular.
        """
        if n == 0:
            return []
        allocator = self.allocator
        short = n - self.num_free
        if self._partitioned and origin is not None:
            if not self.has_room(n, protected, contiguous=contiguous, origin=origin):
                return None
            self._evict_for(origin, n, protected)
        elif short > 0:
            if short > self.num_cached or (
                (protected or contiguous) and not self.has_room(n, protected, contiguous=contiguous)
            ):
                return None
            self._evict(short, protected)
        indices = allocator.allocate(n, after)
        if indices is None:
            if contiguous:
                if not self.has_room(n, protected, contiguous=True, origin=origin):
                    return None
                while indices is None:
                    if self._partitioned and origin is not None:
                        self._evict_for(origin, self.num_free + 1, protected)
                    else:
                        self._evict(1, protected)
                    indices = allocator.allocate(n, after)
            else:
                indices = self._piecewise(n, after)
        self.num_free -= n
        taken = [self.blocks[indices[0]]] if n == 1 else list(itemgetter(*indices)(self.blocks))
        for block in taken:
            block.ref_count = 1
        return taken

    def make_free(self, n: int) -> None:
        """Evict at once what taking ``n`` blocks one by one would; nothing if that is not to be had."""
        short = n - self.num_free
        if 1 < short <= self.num_cached and not self._partitioned:
            self._evict(short, ())

    def _piecewise(self, n: int, after: int | None) -> list[int]:
        indices: list[int] = []
        while len(indices) < n:
            piece = self.allocator.allocate(1, after)
            if piece is None:
                raise PolicyError(
                    f"allocator {type(self.allocator).__name__} reports {self.allocator.num_free} free blocks "
                    "and refuses one"
                )
            indices += piece
            after = piece[-1]
        return indices

    def _evict(self, n: int, protected: Collection[Block]) -> None:
        eviction = self.eviction
        removed = n == 1 and not protected
        if removed:
            victim = eviction.evict()
            victims = [] if victim is None else [victim]
        else:
            victims = eviction.victims(n, protected)
        self._give_up(victims, n, protected, removed)

    def _evict_for(self, origin: Origin, n: int, protected: Collection[Block]) -> None:
        """Give up what has to go before ``n`` blocks are taken for ``origin``."""
        free = self.num_free
        victims = self.eviction.victims_for(origin, n, free, protected)
        if victims is None or free + len(victims) < n:
            raise self._illegal(victims or [], n - free, protected)
        if victims:
            self._give_up(victims, len(victims), protected)

    def _give_up(
        self, victims: list[Block], n: int, protected: Collection[Block], removed: bool = False
    ) -> None:
        indices = [b.index for b in victims if b.key is not None and not b.ref_count]
        if (
            len(indices) != n
            or (n > 1 and len(set(victims)) != n)
            or (protected and not set(victims).isdisjoint(protected))
        ):
            raise self._illegal(victims, n, protected)
        self._on_evict(victims)
        if not removed:
            self.eviction.remove_all(victims)
        for block in victims:
            block.key = None
            block.stretch = NOWHERE
        self.num_cached -= n
        self.num_free += n
        self.allocator.free(indices)

    def _illegal(self, victims: Sequence[Block], n: int, protected: Collection[Block]) -> PolicyError:
        name = f"eviction {type(self.eviction).__name__} named"
        for block in victims:
            if block.ref_count or block.key is None or block in protected:
                return PolicyError(f"{name} {block!r}, which it must not")
        return PolicyError(
            f"{name} {len(set(victims))} victims of {n}, though {self.num_cached} blocks are cached"
        )

    def share(self, blocks: Sequence[Block]) -> None:
        """One more holder of each block, all of which are in use or cached."""
        cached = 0
        for block in blocks:
            count = block.ref_count
            if count:
                self.saved_tokens += block.fill
                block.ref_count = count + 1
            else:
                cached += 1
                block.ref_count = 1
        self.num_cached -= cached

    def next_store(self) -> int:
        """Return the number of the store that is to come (`Block.born`)."""
        self._stores += 1
        return self._stores

    def store(self, blocks: Sequence[Block]) -> None:
        """The blocks, in use, can be found from now on (what identifies their content is set)."""
        if type(self.eviction).insert is not Eviction.insert:  # many do not care
            insert = self.eviction.insert
            for block in blocks:
                insert(block)

    def drop(self, blocks: Sequence[Block], now: int) -> None:
        """One holder less of each block, in this order; those that nobody holds become cached or free."""
        # As a rule the first (not full yet) become free, and the last (a beginning that others hold too) stay in use.
        first, last = 0, len(blocks)
        while first < last and blocks[first].key is None:
            first += 1
        while first < last and blocks[last - 1].ref_count > 1:
            last -= 1
        others = list(blocks[:first])
        cached = blocks[first:last]
        for block in cached:
            if block.ref_count == 1 and block.key is not None:
                block.ref_count = 0
                block.last_released = now
            else:
                others.append(block)
        if len(others) > first:
            cached = [b for b in cached if not b.ref_count]
        others += blocks[last:]
        free = []
        for block in others:
            left = block.ref_count - 1
            block.ref_count = left
            if not left:
                free.append(block.index)
            else:
                self.saved_tokens -= block.fill
                if left == 1:
                    block.fill = self.block_size
        if cached:
            self.num_cached += len(cached)
            self.eviction.release_all(cached)
        if free:
            self.num_free += len(free)
            self.allocator.free(free)

    def blank(self, block: Block) -> None:
        """The block can no longer be found; if nobody holds it, it is free."""
        self.eviction.remove(block)
        block.blank()
        if block.ref_count == 0:
            self.num_cached -= 1
            self.num_free += 1
            self.allocator.free([block.index])

    def check(self) -> None:
        """Raise `InvariantBroken` unless free + in use + cached = total."""
        in_use = sum(1 for b in self.blocks if b.ref_count > 0)
        cached = sum(1 for b in self.blocks if b.ref_count == 0 and b.key is not None)
        name = TIER_NAMES[self.tier]
        if cached != self.num_cached:
            raise InvariantBroken(f"{name}: {cached} blocks are cached, {self.num_cached} counted")
        if self.allocator.num_free != self.num_free:
            raise InvariantBroken(
                f"{name}: {self.allocator.num_free} blocks are free, {self.num_free} counted"
            )
        if in_use + cached + self.num_free != self.capacity:
            raise InvariantBroken(
                f"{name}: {self.num_free} free + {in_use} in use + {cached} cached != {self.capacity} blocks"
            )
        for block in self.blocks:
            if block.key is None and block.stretch is not NOWHERE:
                raise InvariantBroken(f"{block!r} seems to hold what it does not hold any more")
        if any(b.ref_count < 0 for b in self.blocks):
            raise InvariantBroken(f"{name}: a reference count is negative")
        saved = sum((b.ref_count - 1) * b.fill for b in self.blocks if b.ref_count > 1)
        if saved != self.saved_tokens:
            raise InvariantBroken(f"{name}: {saved} tokens are saved by sharing, {self.saved_tokens} counted")
