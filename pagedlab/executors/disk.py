"""`BlockFile`: the disk tier's blocks in an ordinary file that is never trusted, and `Spoils`, the book of what failed.

A slot a block, each beginning on a page of its own::

    |<------------------------------- slot ------------------------------->|
    | serial | length | checksum |  keys and values, all layers  | padding |
      8 bytes  8 bytes  8 bytes     length bytes

The serial counts what was ever stored, so a write that never reached the file is noticed although the slot's old
content is whole. The checksum (CRC-32 of serial, length and content) notices every flipped bit and all but 1 in 2^32
of other damage. It guards against accidents, not against an enemy, so it need not be cryptographic, and it must not be
slower than the disk: where BLAKE2b did 0.8 GiB/s, `zlib.crc32` did 4.6.

The file is read and written, never mapped: reading beyond the end of a truncated file is an error here, and would kill
the process there.
"""

from __future__ import annotations

import errno
import os
import secrets
import struct
import tempfile
import weakref
import zlib
from pathlib import Path

from pagedlab.cache.moves import Move
from pagedlab.engine.orders import DISK, Damage, TierFault
from pagedlab.errors import ConfigError

_HEADER = struct.Struct("<QQQ")
_PAGE = 4096
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_RESERVING = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENODEV)


class SlotFault(Exception):
    """A slot could not be written, or holds something else than what was written to it."""


class BlockFile:
    """Room for ``num_blocks`` blocks of ``block_bytes`` in a private file, which is gone after `close`.

    The file is made anew in ``folder`` (None: where temporary files go), readable by its owner alone. Its room is
    reserved where the file system can do that; where it has not enough, nothing is stored, and every `store` says so.
    ``staging`` (a buffer of ``block_bytes``) is what `store` writes and `load` has read. Raises `ConfigError` if no
    file can be made.
    """

    def __init__(self, num_blocks: int, block_bytes: int, folder: str | None = None) -> None:
        self.num_blocks, self.block_bytes = num_blocks, block_bytes
        self._buffer = bytearray(_HEADER.size + block_bytes)
        self._whole = memoryview(self._buffer)
        self.staging = self._whole[_HEADER.size :]
        self.stride = -(-len(self._buffer) // _PAGE) * _PAGE
        self._serials = [0] * num_blocks
        """What each slot should hold; 0: nothing."""
        self._next = 1
        place = Path(folder or tempfile.gettempdir()).expanduser()
        self.path = place / f"pagedlab-{os.getpid()}-{secrets.token_hex(8)}.blocks"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            self.fd = os.open(self.path, flags, 0o600)
        except OSError as error:
            raise ConfigError(
                f"disk_path {str(place)!r}: {error.strerror}; it must be a folder that can be written to"
            ) from None
        self._finalizer = weakref.finalize(self, _remove, self.fd, self.path, os.getpid())
        self.full = False
        """There was not even room to begin with."""
        self._reserve()

    def _reserve(self) -> None:
        try:
            os.posix_fallocate(self.fd, 0, self.num_blocks * self.stride)
        except OSError as error:
            if error.errno in NO_SPACE:
                self.full = True
                os.ftruncate(self.fd, 0)
            elif error.errno not in NO_RESERVING:
                self.close()
                raise ConfigError(f"disk_path: no room could be reserved: {error.strerror}") from None

    def close(self) -> None:
        """Close and remove the file. May be called twice."""
        self._finalizer()

    def store(self, slot: int) -> None:
        """Write ``staging`` to a slot; `SlotFault` says why it is not there. What the slot held is lost either way."""
        self._serials[slot] = 0
        if self.full:
            raise SlotFault("no space")
        serial = self._next
        self._next += 1
        checksum = zlib.crc32(self.staging, zlib.crc32(struct.pack("<QQ", serial, self.block_bytes)))
        _HEADER.pack_into(self._buffer, 0, serial, self.block_bytes, checksum)
        try:
            written = os.pwrite(self.fd, self._whole, slot * self.stride)
        except OSError as error:
            raise SlotFault("no space" if error.errno in NO_SPACE else "write failed") from None
        if written != len(self._buffer):
            raise SlotFault("short write")
        self._serials[slot] = serial

    def load(self, slot: int) -> None:
        """Read a slot into ``staging``; `SlotFault` if it is not what was stored there last."""
        wanted = self._serials[slot]
        if not wanted:
            raise SlotFault("not stored")
        try:
            found = os.preadv(self.fd, [self._whole], slot * self.stride)
        except OSError:
            raise SlotFault("read failed") from None
        if found != len(self._buffer):
            raise SlotFault("truncated")
        serial, length, checksum = _HEADER.unpack_from(self._buffer)
        if checksum != zlib.crc32(self.staging, zlib.crc32(struct.pack("<QQ", serial, length))):
            raise SlotFault("damaged")
        if (serial, length) != (wanted, self.block_bytes):
            raise SlotFault("stale")

    def forget(self, slot: int) -> None:
        """What the slot holds is not to be loaded again."""
        self._serials[slot] = 0


def _remove(fd: int, path: Path, owner: int) -> None:
    os.close(fd)
    if os.getpid() == owner:  # a forked child holds the same file
        path.unlink(missing_ok=True)


class Spoils:
    """What moves have left undone since the engine last asked (`pagedlab.engine.orders.Damage`). O(1) a move."""

    def __init__(self) -> None:
        self._faults: list[TierFault] = []
        self._spoiled: set[tuple[int, int]] = set()

    def passed_on(self, move: Move) -> bool:
        """Whether the move's source is spoiled, and hence its target."""
        if (move.src_tier, move.src) not in self._spoiled:
            return False
        self._spoiled.add((move.dst_tier, move.dst))
        return True

    def done(self, move: Move) -> None:
        """The move's target is whole."""
        if self._spoiled:
            self._spoiled.discard((move.dst_tier, move.dst))

    def failed(self, move: Move, reason: str) -> None:
        """Note a fault: of two tiers it is the disk's."""
        loading = move.src_tier == DISK
        self._faults.append(TierFault(DISK, move.src if loading else move.dst, reason))
        self._spoiled.add((move.dst_tier, move.dst))
        if loading:
            self._spoiled.add((move.src_tier, move.src))

    def take(self) -> Damage | None:
        """Return what there is and start over; None if nothing."""
        if not self._faults:
            return None
        damage = Damage(self._faults, self._spoiled)
        self.__init__()  # type: ignore[misc]
        return damage
