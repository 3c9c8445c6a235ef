"""Blocks of the key/value cache: who holds which, and which of them equal beginnings may share.

A block holds the keys and values of `BLOCK` tokens in every layer. A full block is known by the digest of all tokens up
to its end and of the adapter that computed them, so that the next request with the same beginning takes it as it is.
Blocks nobody holds stay known until their room is needed, the longest unused first.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

BLOCK = 8


def digest(before: bytes, tokens: Sequence[int]) -> bytes:
    """The name of a block: of its `BLOCK` tokens after those that `before` names."""
    return hashlib.blake2b(before + b",".join(b"%d" % token for token in tokens), digest_size=16).digest()


class BlockPool:
    """Counts holders. A block is free, held by `holders[block]` requests, or idle: held by none, but still known."""

    def __init__(self, blocks: int) -> None:
        self.free = list(range(blocks - 1, -1, -1))
        self.holders = [0] * blocks
        self.known: dict[bytes, int] = {}
        self.names: dict[int, bytes] = {}
        self.idle: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Blocks that `take` can give."""
        return len(self.free) + len(self.idle)

    @property
    def held(self) -> int:
        return len(self.holders) - self.available

    def take(self) -> int:
        """A block of one's own."""
        if self.free:
            block = self.free.pop()
        else:
            block, _ = self.idle.popitem(last=False)
            self.forget([block])
        self.holders[block] = 1
        return block

    def find(self, names: Iterable[bytes]) -> list[int]:
        """The blocks of the longest beginning that is known. They are not held yet: see `hold`."""
        found: list[int] = []
        for name in names:
            block = self.known.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def hold(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            if not self.holders[block]:
                del self.idle[block]
            self.holders[block] += 1

    def name(self, block: int, name: bytes) -> None:
        """Let others find a full block. The first of equal ones is the one to be found."""
        if name not in self.known:
            self.known[name] = block
            self.names[block] = name

    def forget(self, blocks: Iterable[int]) -> None:
        """Let nobody find these any more."""
        for block in blocks:
            if name := self.names.pop(block, None):
                del self.known[name]
            if block in self.idle:
                del self.idle[block]
                self.free.append(block)

    def release(self, blocks: Iterable[int]) -> None:
        # From the end, so that of an unused beginning the end is dropped first.
        for block in reversed(list(blocks)):
            self.holders[block] -= 1
            if not self.holders[block]:
                if block in self.names:
                    self.idle[block] = None
                else:
                    self.free.append(block)
