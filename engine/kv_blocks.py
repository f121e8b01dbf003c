"""Memory for keys and values in blocks of 16 tokens, shared by requests that begin alike. Numbers only, no tensors.

A cache of one piece per request must reserve the longest answer there could be. Blocks are taken as tokens come, so at
most the rest of a last block is empty (PagedAttention, Kwon et al. 2023, arXiv 2309.06180). A full block whose tokens,
and all tokens before them, are those of another request's block holds the same numbers: it is found by a hash and used
again. Blocks that no request holds any more keep their contents until the space is needed, oldest first.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

from engine.request import Request

BLOCK = 16


class Blocks:
    """count blocks of size tokens each. reuse: whether prefixes are shared.

    A block is held by one or more requests, or by none: then it is in `free`, where the first is the next to be taken.
    """

    def __init__(self, count: int, size: int = BLOCK, *, reuse: bool = True) -> None:
        if count < 1 or size < 1:
            raise ValueError(f"{count} blocks of {size} tokens: both must be at least 1")
        self.count, self.size, self.reuse = count, size, reuse
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(count))
        self.holders = [0] * count
        self.key_of: dict[int, bytes] = {}  # block -> the hash of its contents and all before it
        self.block_at: dict[bytes, int] = {}  # and back

    def needed(self, tokens: int) -> int:
        """Blocks that so many tokens take."""
        return -(-tokens // self.size)

    # ---- taking and giving back

    def grow(self, request: Request, tokens: int) -> bool:
        """Give the request blocks for its first `tokens` tokens. False, and nothing changes, when there are too few."""
        more = self.needed(tokens) - len(request.blocks)
        if more > len(self.free):
            return False
        for _ in range(more):
            block, _ = self.free.popitem(last=False)
            self.forget(block)
            self.holders[block] = 1
            request.blocks.append(block)
        return True

    def release(self, request: Request) -> None:
        """Take all blocks back. The last ones are reused first: a beginning is likelier to be shared than an end."""
        for block in reversed(request.blocks):
            self.holders[block] -= 1
            if self.holders[block] == 0:
                self.free[block] = None
                if block not in self.key_of:  # nobody can find its contents again
                    self.free.move_to_end(block, last=False)
        request.blocks.clear()
        request.published = 0

    # ---- sharing

    def reuse_prefix(self, request: Request) -> int:
        """Give a request without blocks those that already hold its beginning; the tokens found.

        At least the last token is left to compute, since its output says what comes next.
        """
        if not self.reuse:
            return 0
        for i in range((len(request.tokens) - 1) // self.size):
            block = self.block_at.get(self.key(request, i))
            if block is None:
                break
            self.holders[block] += 1
            self.free.pop(block, None)
            request.blocks.append(block)
        request.published = len(request.blocks)
        return len(request.blocks) * self.size

    def publish(self, request: Request) -> None:
        """Let others find the full blocks that the request has computed, unless another block holds the same."""
        while self.reuse and (request.published + 1) * self.size <= request.computed:
            block, key = request.blocks[request.published], self.key(request, request.published)
            if key not in self.block_at:
                self.key_of[block], self.block_at[key] = key, block
            request.published += 1

    def key(self, request: Request, i: int) -> bytes:
        """The hash of the request's i-th full block: of its tokens, of all before them, and of the salt."""
        while len(request.keys) <= i:
            before = request.keys[-1] if request.keys else hashlib.sha256(request.salt.encode()).digest()
            start = len(request.keys) * self.size
            tokens = array("q", request.tokens[start : start + self.size])
            request.keys.append(hashlib.sha256(before + tokens.tobytes()).digest())
        return request.keys[i]

    def forget(self, block: int) -> None:
        key = self.key_of.pop(block, None)
        if key is not None:
            del self.block_at[key]

    def drop(self) -> list[int]:
        """Forget the contents of all that nobody holds; those blocks."""
        for block in self.free:
            self.forget(block)
        return list(self.free)

    # ---- what must always be true

    def check(self, requests: Sequence[Request]) -> None:
        """AssertionError unless every block is accounted for. requests: all that hold blocks."""
        held = [0] * self.count
        for request in requests:
            assert len(set(request.blocks)) == len(request.blocks), f"request {request.number} holds a block twice"
            assert len(request.blocks) * self.size >= request.computed, f"request {request.number} computed beyond it"
            for block in request.blocks:
                held[block] += 1
        assert held == self.holders, "holders are not those of the requests"
        assert set(self.free) == {b for b in range(self.count) if held[b] == 0}, "free is not what nobody holds"
        assert {key: block for block, key in self.key_of.items()} == self.block_at, "hashes and blocks disagree"
        for request in requests:
            for i, block in enumerate(request.blocks[: request.computed // self.size]):
                found = self.key_of.get(block)
                assert found in (None, self.key(request, i)), f"block {i} of request {request.number} is another's"
