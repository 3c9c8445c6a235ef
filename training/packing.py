"""Samples packed end to end, without padding between them, and which keys each query may see.

Samples of one task begin alike: the instruction is the same, the question differs. The common prefix of neighbours in a
pack is computed once, as a segment of its own, and the rest of each sample attends to it. So the tokens that go through
the layers are neither padding nor repetition, and still every hidden state equals that of the sample alone.

    pack        P P P P a a b b b c Q Q Q d e ·      P: the prefix of samples a, b and c; Q: of d and e; ·: padding
    segments    P       a   b     c Q     d e

`Layout` says where the samples lie. training/packed_attention.py computes with it: `Layout.blocks` and `Layout.tables`
are for a CPU, `Layout.block_mask` is for FlexAttention on a GPU.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby, islice, takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from training.kernels import Attention

ROUND = 64  # tokens of a pack: oneDNN builds and keeps a kernel for every new shape, so there are to be few
SEGMENT_ROUND = 32
QUERIES = 256  # of a segment at a time, and
SEGMENTS = 8  # at a time: their scores stay in the processor's cache
SHORTEST_PREFIX = 16  # tokens; computing fewer twice costs less than one more segment


class Segment(NamedTuple):
    """`length` tokens from `start` on, which follow the `prefix_length` tokens from `prefix_start` on."""

    start: int
    length: int
    prefix_start: int = 0
    prefix_length: int = 0


@dataclass
class Layout:
    """Where the samples of a pack lie.

    Attributes:
        positions: [1, tokens], int64: each token's position in its sample.
        segments: they cover all tokens but the padding.
    """

    positions: Tensor
    segments: list[Segment]
    _blocks: dict[int | None, list["Block"]] = field(default_factory=dict)
    _tables: dict[int | None, "Tables"] = field(default_factory=dict)
    _ids: Tensor | None = None
    _block_masks: dict[int | None, BlockMask] = field(default_factory=dict)

    def blocks(self, window: int | None) -> list["Block"]:
        """The pack in blocks of queries, for a sliding window of `window` tokens or None; made once for each."""
        if window not in self._blocks:
            self._blocks[window] = list(_blocks(self.segments, self.positions.shape[1] - 1, window))
        return self._blocks[window]

    def tables(self, window: int | None) -> "Tables":
        """`blocks` as kernels.c takes them."""
        if window not in self._tables:
            self._tables[window] = _tables(self.blocks(window), self.positions.shape[1] - 1)
        return self._tables[window]

    def to(self, device: torch.device) -> "Layout":
        ids = self._segment_ids().to(device, non_blocking=True) if device.type == "cuda" else None
        return Layout(self.positions.to(device, non_blocking=True), self.segments, _ids=ids)

    def _segment_ids(self) -> Tensor:
        """[2, tokens], int64: the id of each token's segment (-1: padding) and of its prefix (-2: none).

        Made in main memory: on a GPU every segment would cost kernel launches, and a pack has hundreds of segments.
        """
        own, prefix = torch.full_like(self.positions[0], -1), torch.full_like(self.positions[0], -2)
        numbers = {segment.start: number for number, segment in enumerate(self.segments)}
        for number, segment in enumerate(self.segments):
            own[segment.start : segment.start + segment.length] = number
            if segment.prefix_length:
                prefix[segment.start : segment.start + segment.length] = numbers[segment.prefix_start]
        return torch.stack([own, prefix])

    def block_mask(self, window: int | None) -> BlockMask:
        """FlexAttention's mask: a token sees its own segment and that segment's prefix, up to itself."""
        if window not in self._block_masks:
            own, prefix = self._segment_ids() if self._ids is None else self._ids
            positions, tokens = self.positions[0], self.positions.shape[1]
            # A tensor and not a number: FlexAttention would compile the mask again for every window.
            earliest = positions - (tokens if window is None else window - 1)

            def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                same = (own[query] == own[key]) | (prefix[query] == own[key])
                return same & (positions[key] <= positions[query]) & (positions[key] >= earliest[query])

            create = compiled(create_block_mask) if positions.is_cuda else create_block_mask
            self._block_masks[window] = create(visible, None, None, tokens, tokens, device=str(positions.device))
        return self._block_masks[window]


class Pack(NamedTuple):
    """Packed samples: `ids` [1, tokens], int64, and where the tokens of each sample lie: in its prefix, then its rest.

    Samples are in the order in which they were given.
    """

    ids: Tensor
    layout: Layout
    prefixes: list[range]
    rests: list[range]


def shared_prefixes(samples: Sequence[Sequence[int]]) -> Iterator[tuple[int, range]]:
    """Group sorted `samples` (token ids) by a common prefix: its length (0: too short to share), and which samples.

    A sample joins the group before it where that saves more tokens than shortening the group's prefix costs.

    Example:
        >>> list(shared_prefixes([[*range(20), 1], [*range(20), 2], [7]]))
        [(20, range(0, 2)), (0, range(2, 3))]
    """
    first, prefix = 0, list(samples[0]) if samples else []
    for index in range(1, len(samples) + 1):
        if index < len(samples):
            common = sum(
                1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prefix, samples[index], strict=False))
            )
            together = index - first
            if common >= SHORTEST_PREFIX and together * common >= (together - 1) * len(prefix):
                prefix = prefix[:common]
                continue
        yield (len(prefix) if index - first > 1 else 0), range(first, index)
        if index < len(samples):
            first, prefix = index, list(samples[index])


def pack(samples: Sequence[Sequence[int]]) -> Pack:
    """Lay `samples` (token ids, sorted) end to end, shared prefixes once, padded to a multiple of ROUND tokens."""
    ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    prefixes, rests = [], []

    def lay(tokens: Sequence[int], prefix: range) -> range:
        place = range(len(ids), len(ids) + len(tokens))
        if tokens:
            segments.append(Segment(place.start, len(tokens), prefix.start, len(prefix)))
        ids.extend(tokens)
        positions.extend(range(len(prefix), len(prefix) + len(tokens)))
        return place

    for length, members in shared_prefixes(samples):
        prefix = lay(samples[members[0]][:length], range(0)) if length else range(0)
        for index in members:
            prefixes.append(prefix)
            rests.append(lay(samples[index][length:], prefix))
    padding = -(len(ids) + 1) % ROUND + 1  # one token at least: blocks are filled up with it
    layout = Layout(torch.tensor([positions + [0] * padding]), segments)
    return Pack(torch.tensor([ids + [0] * padding]), layout, prefixes, rests)


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled on first use, once for packs of any length. Uncompiled, FlexAttention and its mask both
    allocate a number for every pair of tokens."""
    # A few variants remain (lengths that 128 divides, one block, training or not); beyond 8, torch's default, it would
    # silently run uncompiled.
    torch._dynamo.config.recompile_limit = 32
    return torch.compile(function, dynamic=True)


class Block(NamedTuple):
    """Queries with all keys that they may see: several short segments with one prefix, or a slice of a long one.

    Attributes:
        queries: [segments, count], int64: positions of the queries; past a segment's end, one of padding.
        prefix: the positions of the prefix that they see.
        own: [segments, keys], int64: the positions in their own segment that they see, and padding.
        bias: [count, 1, prefix + own], float32: -inf where a key is later than the query or outside the window.
    """

    queries: Tensor
    prefix: slice
    own: Tensor
    bias: Tensor

    def gather_queries(self, tensor: Tensor, key: Tensor) -> Tensor:
        """[tokens, heads, size] → [segments · groups, count · heads per group, size]."""
        part = tensor[self.queries].unflatten(2, (key.shape[1], -1)).transpose(1, 2)
        return part.flatten(2, 3).flatten(0, 1)

    def gather_keys(self, tensor: Tensor) -> Tensor:
        """[tokens, groups, size] → [segments · groups, keys, size]."""
        earlier = tensor[self.prefix].expand(len(self.own), -1, -1, -1)
        return torch.cat([earlier, tensor[self.own]], 1).transpose(1, 2).flatten(0, 1)

    def scatter_queries(self, whole: Tensor, part: Tensor) -> None:
        """The inverse of `gather_queries`: write `part` into `whole`."""
        segments, count = self.queries.shape
        part = part.unflatten(0, (segments, -1)).unflatten(2, (count, -1)).transpose(1, 2)
        whole[self.queries] = part.flatten(2, 3)

    def add_keys(self, whole: Tensor, part: Tensor) -> None:
        """The inverse of `gather_keys`: add `part` to `whole`, float32."""
        part = part.unflatten(0, (len(self.own), -1)).transpose(1, 2).float()
        earlier = self.prefix.stop - self.prefix.start
        if earlier:
            whole[self.prefix] += part[:, :earlier].sum(0)
        whole[self.own] += part[:, earlier:]  # only padding is repeated, and its gradient is zero


def _blocks(segments: list[Segment], padding: int, window: int | None) -> Iterator[Block]:
    """`padding`: a position that belongs to no segment."""

    def rounded(length: int) -> int:
        return -(-length // SEGMENT_ROUND) * SEGMENT_ROUND

    def tokens(segment: Segment, begin: int, end: int) -> list[int]:
        real = range(segment.start + begin, segment.start + min(end, segment.length))
        return [*real, *[padding] * (end - begin - len(real))]

    def kind(segment: Segment) -> tuple[int, ...]:
        alone = segment.start if segment.length > QUERIES else -1
        return segment.prefix_length, segment.prefix_start, alone, rounded(segment.length)

    for (prefix_length, prefix_start, _, length), alike in groupby(sorted(segments, key=kind), kind):
        while members := list(islice(alike, SEGMENTS)):
            for begin in range(0, length, QUERIES):
                end = min(begin + QUERIES, length)
                first = max(0, prefix_length + begin - window + 1) // SEGMENT_ROUND * SEGMENT_ROUND if window else 0
                hidden = min(first, prefix_length)  # keys of the prefix, and of the segments, out of every window
                place = torch.arange(first, prefix_length + end)
                distance = torch.arange(prefix_length + begin, prefix_length + end)[:, None, None] - place
                unseen = (distance < 0) | (distance >= (window or end + prefix_length))
                yield Block(
                    torch.tensor([tokens(segment, begin, end) for segment in members]),
                    slice(prefix_start + hidden, prefix_start + prefix_length),
                    torch.tensor([tokens(segment, first - hidden, end) for segment in members]),
                    torch.zeros(unseen.shape).masked_fill_(unseen, float("-inf")),
                )


class Tables(NamedTuple):
    """All blocks of a layout as kernels.c takes them; an item is one segment of one block.

    Attributes:
        items: [items, 6], int32: offset and number of its queries, offset and number of its keys, offset of its bias,
            and the number of keys of all items before it, each item's rounded up to 32.
        queries, keys: int32, positions in the pack.
        bias: float32.
        sums: keys of all items, each item's rounded up to 32.
        padding: a position that belongs to no segment.
    """

    items: Tensor
    queries: Tensor
    keys: Tensor
    bias: Tensor
    sums: int
    padding: int

    def arguments(self, query: Tensor, key: Tensor, scale: float, softcap: float | None) -> Attention:
        places = (part.data_ptr() for part in (self.items, self.queries, self.keys, self.bias))
        return Attention(*places, len(self.items), query.shape[1], *key.shape[1:], self.padding, scale, softcap or 0.0)


def _tables(blocks: list[Block], padding: int) -> Tables:
    items: list[list[int]] = []
    keys: list[Tensor] = []
    places = [0] * 4  # past the last: queries, keys, bias, sums
    for block in blocks:
        count, seen = block.bias.shape[0], block.bias.shape[-1]
        for own in block.own:
            items.append([places[0], count, places[1], seen, places[2], places[3]])
            keys.append(torch.cat([torch.arange(block.prefix.start, block.prefix.stop), own]))
            places = [places[0] + count, places[1] + seen, places[2], places[3] - (-seen // 32) * 32]
        places[2] += block.bias.numel()
    nothing = torch.zeros(0)  # a pack may be padding alone
    return Tables(
        torch.tensor(items, dtype=torch.int32).view(-1, 6),
        torch.cat([block.queries.flatten() for block in blocks] or [nothing]).int(),
        torch.cat(keys or [nothing]).int(),
        torch.cat([block.bias.flatten() for block in blocks] or [nothing]),
        places[3],
        padding,
    )
