"""The blocks of the KV cache: who holds which, and which hold a known prefix.

The prefix cache is the free list itself, kept in the order of last use: a free block keeps its contents, and its place
in the index of prefixes, until it is taken for something else. Blocks without a prefix go first.
"""

from __future__ import annotations

import secrets
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from hashlib import blake2b

from inference_worker.engine.sequence import Sequence


class BlockPool:
    """Hands out blocks and counts who holds them.

    Invariants: a block is free exactly when nobody holds it; a block held by several sequences is full; the prefix
    index names a block at most once.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._holders = [0] * num_blocks
        self._free = OrderedDict.fromkeys(range(num_blocks))  # first one taken first
        self._hash_of_block: list[bytes | None] = [None] * num_blocks
        self._block_of_hash: dict[bytes, int] = {}
        # Hashes alone tell prefixes apart: nobody may look for two that collide before they are made.
        self._hash_key = secrets.token_bytes(16)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def count_cached_tokens(self, sequence: Sequence) -> int:
        """Tokens at the start of `sequence` whose KV is in the cache now. Takes nothing."""
        return len(self._cached_blocks(sequence)) * self.block_size

    def attach_prefix(self, sequence: Sequence) -> None:
        """Give a sequence without blocks the longest cached prefix of its tokens.

        At least one token is left to compute, since a step must give logits.
        """
        sequence.block_table = [self._take(block) for block in self._cached_blocks(sequence)]
        sequence.num_computed_tokens = len(sequence.block_table) * self.block_size

    def fits(self, sequence: Sequence, num_spare: int) -> bool:
        """Whether all tokens of a sequence without blocks could be held now, with `num_spare` blocks left over.

        Asked before anything is taken, since taking a free block forgets the prefix in it.
        """
        num_reused = sum(self._holders[block] > 0 for block in self._cached_blocks(sequence))
        num_blocks = -(-len(sequence.token_ids) // self.block_size)
        return num_blocks - num_reused + num_spare <= len(self._free)

    def count_missing(self, sequence: Sequence, num_tokens: int) -> int:
        """Blocks that a sequence lacks to hold its first `num_tokens` tokens; negative if it has more than enough."""
        return -(-num_tokens // self.block_size) - len(sequence.block_table)

    def reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Extend the block table to hold the first `num_tokens` tokens; False, and nothing done, if blocks lack."""
        missing = self.count_missing(sequence, num_tokens)
        if missing > len(self._free):
            return False
        sequence.block_table.extend([self._take_oldest() for _ in range(missing)])
        return True

    def publish(self, sequence: Sequence, start: int, stop: int) -> None:
        """Index the blocks that became full when tokens `start` .. `stop` - 1, all known, were computed."""
        size = self.block_size
        for i in range(start // size, stop // size):
            block, block_hash = sequence.block_table[i], self._hash(sequence, i)
            if block_hash not in self._block_of_hash:
                self._block_of_hash[block_hash] = block
                self._hash_of_block[block] = block_hash

    def release(self, sequence: Sequence) -> None:
        """Take a sequence's blocks back; its KV is gone for it, though the cache may still know it."""
        # tails are reused before the heads they hang from
        for block in reversed(sequence.block_table):
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free[block] = None
                if self._hash_of_block[block] is None:  # nobody can find what is in it
                    self._free.move_to_end(block, last=False)
        sequence.block_table = []
        sequence.num_computed_tokens = 0

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Verify the invariants against all sequences that hold blocks.

        Raises: AssertionError, saying which block is wrong.
        """
        held = Counter(block for sequence in sequences for block in sequence.block_table)
        for block in range(self.num_blocks):
            if self._holders[block] != held[block]:
                raise AssertionError(
                    f"block {block}: {self._holders[block]} counted, {held[block]} hold it"
                )
            if (block in self._free) != (held[block] == 0):
                raise AssertionError(
                    f"block {block}: held by {held[block]}, free: {block in self._free}"
                )
            block_hash = self._hash_of_block[block]
            if block_hash is not None and self._block_of_hash.get(block_hash) != block:
                raise AssertionError(f"block {block}: its prefix is indexed elsewhere")
        num_indexed = sum(block_hash is not None for block_hash in self._hash_of_block)
        if num_indexed != len(self._block_of_hash):
            raise AssertionError(
                f"{len(self._block_of_hash)} prefixes are indexed, {num_indexed} blocks hold one"
            )
        if lost := held.keys() - set(range(self.num_blocks)):
            raise AssertionError(f"blocks {sorted(lost)} do not exist")

    def _take(self, block: int) -> int:
        if not self._holders[block]:
            del self._free[block]
        self._holders[block] += 1
        return block

    def _take_oldest(self) -> int:
        block = next(iter(self._free))
        if (block_hash := self._hash_of_block[block]) is not None:
            self._hash_of_block[block] = None
            del self._block_of_hash[block_hash]
        return self._take(block)

    def _cached_blocks(self, sequence: Sequence) -> list[int]:
        blocks: list[int] = []
        if sequence.must_compute_prompt:
            return blocks
        for i in range((len(sequence.token_ids) - 1) // self.block_size):
            block = self._block_of_hash.get(self._hash(sequence, i))
            if block is None:
                break
            blocks.append(block)
        return blocks

    def _hash(self, sequence: Sequence, i: int) -> bytes:
        """Hash of a full block's tokens and all before it, chained from the sequence's salt."""
        hashes, size = sequence.block_hashes, self.block_size
        while len(hashes) <= i:
            start = len(hashes) * size
            tokens = array("q", sequence.token_ids[start : start + size]).tobytes()
            parent = hashes[-1] if hashes else self._digest(sequence.cache_salt)
            hashes.append(self._digest(parent + tokens))
        return hashes[i]

    def _digest(self, data: bytes) -> bytes:
        return blake2b(data, digest_size=16, key=self._hash_key).digest()
