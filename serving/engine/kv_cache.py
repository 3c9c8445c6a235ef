"""Blocks of the key/value cache, reference-counted, with automatic prefix caching.

A block holds the keys and values of `BLOCK` tokens in every layer that has its own. A full block is identified by the
hash of all tokens up to its end and of the adapter that computed them, so that the next request with the same prefix
reuses it.
Unreferenced blocks stay cached until their memory is needed; the least recently used one is evicted first.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

BLOCK = 8


def block_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The hash, 16 bytes, of a block with these `BLOCK` tokens after the block with the hash `parent`."""
    return hashlib.blake2b(parent + b",".join(b"%d" % token for token in tokens), digest_size=16).digest()


class BlockPool:
    """The allocator. A block is free, in use by `ref_counts[block]` requests, or evictable: unused, but still cached.

    Args:
        blocks: of the cache.
    """

    def __init__(self, blocks: int) -> None:
        self.free = list(range(blocks - 1, -1, -1))
        self.ref_counts = [0] * blocks
        self.by_hash: dict[bytes, int] = {}
        self.hashes: dict[int, bytes] = {}
        self.evictable: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """The number of blocks that `allocate` can return."""
        return len(self.free) + len(self.evictable)

    @property
    def in_use(self) -> int:
        return len(self.ref_counts) - self.available

    def allocate(self) -> int:
        """A block with one reference, evicting a cached one if none is free.

        Raises:
            KeyError: none is available.
        """
        if self.free:
            block = self.free.pop()
        else:
            block, _ = self.evictable.popitem(last=False)
            self.evict([block])
        self.ref_counts[block] = 1
        return block

    def lookup(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the longest cached prefix, without a reference to them: see `acquire`."""
        found: list[int] = []
        for hash_ in hashes:
            block = self.by_hash.get(hash_)
            if block is None:
                break
            found.append(block)
        return found

    def acquire(self, blocks: Iterable[int]) -> None:
        """Add a reference to each."""
        for block in blocks:
            if not self.ref_counts[block]:
                del self.evictable[block]
            self.ref_counts[block] += 1

    def publish(self, block: int, hash_: bytes) -> None:
        """Make a full block available to `lookup`. Of blocks with the same hash, the first stays the cached one."""
        if hash_ not in self.by_hash:
            self.by_hash[hash_] = block
            self.hashes[block] = hash_

    def evict(self, blocks: Iterable[int]) -> None:
        """Remove these from the prefix cache."""
        for block in blocks:
            if hash_ := self.hashes.pop(block, None):
                del self.by_hash[hash_]
            if block in self.evictable:
                del self.evictable[block]
                self.free.append(block)

    def release(self, blocks: Iterable[int]) -> None:
        """Drop a reference to each."""
        # In reverse, so that the end of a prefix is evicted before its beginning.
        for block in reversed(list(blocks)):
            self.ref_counts[block] -= 1
            if not self.ref_counts[block]:
                if block in self.hashes:
                    self.evictable[block] = None
                else:
                    self.free.append(block)
