"""Rows packed end to end, without padding between them, and attention that keeps them apart.

Rows of one task begin alike: the instruction is the same, the question differs. What neighbours in a pack have in
common is computed once, as a segment of its own, and each row's remainder attends to it. So the tokens that go
through the layers are neither padding nor repetition, and yet every hidden state is the one that its row alone has.
"""

from collections.abc import Callable, Iterator, Sequence
from ctypes import byref
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby, islice, takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, PreTrainedModel

from training.kernels import Attention, kernels_for

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
    """Where the rows of a pack lie.

    Attributes:
        positions: [1, tokens], int64: each token's place in its row.
        segments: they cover all real tokens.
    """

    positions: Tensor
    segments: list[Segment]
    _blocks: dict[int | None, list["Block"]] = field(default_factory=dict)
    _tables: dict[int | None, "Tables"] = field(default_factory=dict)
    _named: Tensor | None = None
    _block_masks: dict[int | None, BlockMask] = field(default_factory=dict)

    def blocks(self, window: int | None) -> list["Block"]:
        if window not in self._blocks:
            self._blocks[window] = list(_blocks(self.segments, self.positions.shape[1] - 1, window))
        return self._blocks[window]

    def tables(self, window: int | None) -> "Tables":
        if window not in self._tables:
            self._tables[window] = _tables(self.blocks(window), self.positions.shape[1] - 1)
        return self._tables[window]

    def to(self, device: torch.device) -> "Layout":
        named = self._names().to(device, non_blocking=True) if device.type == "cuda" else None
        return Layout(self.positions.to(device, non_blocking=True), self.segments, _named=named)

    def _names(self) -> Tensor:
        """[2, tokens], int64: the number of each token's segment (-1: padding) and of that before it (-2: none). Made
        in main memory: on a GPU every segment would cost launches, of which a pack has hundreds."""
        own, before = torch.full_like(self.positions[0], -1), torch.full_like(self.positions[0], -2)
        names = {segment.start: name for name, segment in enumerate(self.segments)}
        for name, segment in enumerate(self.segments):
            own[segment.start : segment.start + segment.length] = name
            if segment.prefix_length:
                before[segment.start : segment.start + segment.length] = names[segment.prefix_start]
        return torch.stack([own, before])

    def block_mask(self, window: int | None) -> BlockMask:
        """FlexAttention's mask: a token sees its own segment and the prefix of that, up to itself."""
        if window not in self._block_masks:
            own, before = self._names() if self._named is None else self._named
            positions, tokens = self.positions[0], self.positions.shape[1]
            # A tensor for all windows: with a number for each, every one would be compiled apart.
            earliest = positions - (tokens if window is None else window - 1)

            def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                same = (own[query] == own[key]) | (before[query] == own[key])
                return same & (positions[key] <= positions[query]) & (positions[key] >= earliest[query])

            create = _compiled(create_block_mask) if positions.is_cuda else create_block_mask
            self._block_masks[window] = create(visible, None, None, tokens, tokens, device=str(positions.device))
        return self._block_masks[window]


class Pack(NamedTuple):
    """`ids` [1, tokens] and, for every row in the order given, where its tokens lie: `prefix`, then `rest`."""

    ids: Tensor
    layout: Layout
    prefixes: list[range]
    rests: list[range]


def shared_prefixes(rows: Sequence[Sequence[int]]) -> Iterator[tuple[int, range]]:
    """Cut `rows`, sorted, into neighbours with a common beginning: its length (0: not worth it), and which rows.

    A row joins its neighbours where that saves more tokens than shortening their prefix costs.
    """
    first, prefix = 0, list(rows[0]) if rows else []
    for index in range(1, len(rows) + 1):
        if index < len(rows):
            common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prefix, rows[index], strict=False)))
            together = index - first
            if common >= SHORTEST_PREFIX and together * common >= (together - 1) * len(prefix):
                prefix = prefix[:common]
                continue
        yield (len(prefix) if index - first > 1 else 0), range(first, index)
        if index < len(rows):
            first, prefix = index, list(rows[index])


def pack(rows: Sequence[Sequence[int]]) -> Pack:
    """Lay `rows` (token ids, sorted) end to end, what neighbours share only once, in a multiple of ROUND tokens."""
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

    for length, members in shared_prefixes(rows):
        prefix = lay(rows[members[0]][:length], range(0)) if length else range(0)
        for index in members:
            prefixes.append(prefix)
            rests.append(lay(rows[index][length:], prefix))
    padding = -(len(ids) + 1) % ROUND + 1  # one token at least: blocks are filled up with it
    layout = Layout(torch.tensor([positions + [0] * padding]), segments)
    return Pack(torch.tensor([ids + [0] * padding]), layout, prefixes, rests)


def use_packed_attention(gemma: PreTrainedModel) -> str:
    """Let `gemma` take `layout=` in its forward pass; returns the attention it had."""
    before: str = gemma.config._attn_implementation
    gemma.set_attn_implementation("packed")
    return before


def _packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    layout: Layout,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, heads, tokens, size], key and value [1, groups, tokens, size]."""
    if query.is_cuda:
        return _flex_attention(query, key, value, layout, scaling, sliding_window, softcap), None
    query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
    return attend(query, key, value, layout, scaling, sliding_window, softcap)[None], None


def attend(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """Attention of packed rows on a CPU: query [tokens, heads, size], key and value [tokens, groups, size]."""
    if kernels_for(query, key, value):
        return _KernelAttention.apply(query, key, value, layout.tables(window), scale, softcap)
    return _SegmentAttention.apply(query, key, value, layout.blocks(window), scale, softcap)


AttentionInterface.register("packed", _packed_attention)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled on first use, once for packs of any length: uncompiled, attention and its mask both hold a
    number for every pair of tokens."""
    # Some forms are left: lengths that 128 divides, one block, training or not. At 8 of them torch goes on uncompiled.
    torch._dynamo.config.recompile_limit = 32
    return torch.compile(function, dynamic=True)


def _flex_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float, window: int | None, softcap: float | None
) -> Tensor:
    flex: Any = _compiled(flex_attention) if query.is_cuda else flex_attention
    out = flex(
        query,
        key,
        value,
        score_mod=_soft_cap(softcap) if softcap else None,
        block_mask=layout.block_mask(window),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2)


@cache
def _soft_cap(limit: float) -> Callable[..., Tensor]:
    def capped(score: Tensor, *place: Tensor) -> Tensor:
        return limit * torch.tanh(score / limit)

    return capped


class _SegmentAttention(torch.autograd.Function):
    """softmax(scale · Q Kᵀ) V block by block: query [tokens, heads, size], key and value [tokens, groups, size].

    PyTorch's own attention on a CPU has a backward pass several times slower than these products, and wants rows of
    equal length. Only the inputs are kept; the backward pass computes the probabilities again (FlashAttention, Dao
    et al., 2022, algorithm 4). Products are rounded to the dtype of the inputs, the softmax is in float32.
    """

    @staticmethod
    def forward(ctx, query, key, value, blocks, scale, softcap):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(query, key, value)
        ctx.arguments = blocks, scale, softcap
        out = torch.zeros_like(query, memory_format=torch.contiguous_format)
        for block in blocks:
            probability, _ = _probability(block.of_queries(query, key), block.of_keys(key), block, scale, softcap)
            block.put(out, probability.to(query.dtype) @ block.of_keys(value))
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        query, key, value = ctx.saved_tensors
        blocks, scale, softcap = ctx.arguments
        grad_query = torch.zeros_like(query, memory_format=torch.contiguous_format)
        grad_key, grad_value = (torch.zeros_like(part, dtype=torch.float32) for part in (key, value))
        for block in blocks:
            queries, keys, values = block.of_queries(query, key), block.of_keys(key), block.of_keys(value)
            grads = block.of_queries(grad, key)  # those of padding are zero: nobody reads its output
            probability, slope = _probability(queries, keys, block, scale, softcap)
            block.add(grad_value, probability.to(grad.dtype).mT @ grads)
            grad_score = torch._softmax_backward_data((grads @ values.mT).float(), probability, -1, torch.float32)
            if slope is not None:
                grad_score.mul_(slope)
            grad_score = grad_score.mul_(scale).to(grad.dtype)
            block.put(grad_query, grad_score @ keys)
            block.add(grad_key, grad_score.mT @ queries)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None, None


class Block(NamedTuple):
    """Queries with all keys that they may see: several short segments with one prefix, or a piece of a long one.

    Attributes:
        queries: [segments, count], int64: their tokens; past a segment's end, a token of padding.
        earlier: the prefix's tokens that they see.
        own: [segments, keys], int64: the segments' tokens that they see, and padding.
        bias: [count, 1, earlier + own], float32: -inf where a key is later than the query or outside the window.
    """

    queries: Tensor
    earlier: slice
    own: Tensor
    bias: Tensor

    def of_queries(self, tensor: Tensor, key: Tensor) -> Tensor:
        """[tokens, heads, size] → [segments · groups, count · heads per group, size]."""
        part = tensor[self.queries].unflatten(2, (key.shape[1], -1)).transpose(1, 2)
        return part.flatten(2, 3).flatten(0, 1)

    def of_keys(self, tensor: Tensor) -> Tensor:
        """[tokens, groups, size] → [segments · groups, keys, size]."""
        earlier = tensor[self.earlier].expand(len(self.own), -1, -1, -1)
        return torch.cat([earlier, tensor[self.own]], 1).transpose(1, 2).flatten(0, 1)

    def put(self, whole: Tensor, part: Tensor) -> None:
        """The reverse of `of_queries`, into `whole`."""
        segments, count = self.queries.shape
        part = part.unflatten(0, (segments, -1)).unflatten(2, (count, -1)).transpose(1, 2)
        whole[self.queries] = part.flatten(2, 3)

    def add(self, whole: Tensor, part: Tensor) -> None:
        """The reverse of `of_keys`, added to `whole`."""
        part = part.unflatten(0, (len(self.own), -1)).transpose(1, 2).float()
        earlier = self.earlier.stop - self.earlier.start
        if earlier:
            whole[self.earlier] += part[:, :earlier].sum(0)
        whole[self.own] += part[:, earlier:]  # no token stands here twice but padding, whose gradient is zero


def _blocks(segments: list[Segment], padding: int, window: int | None) -> Iterator[Block]:
    """`padding`: some token that belongs to no segment."""

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
    """All blocks of a layout as kernels.c takes them, a segment of a block to an item.

    Attributes:
        items: [items, 6], int32: where its queries begin, how many, where its keys begin, how many, where its bias
            begins, and how many keys, each item's rounded up, the items before it have.
        queries, keys: int32, tokens.
        bias: float32.
        sums: keys of all items, each item's rounded up.
        padding: some token that belongs to no segment.
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
            keys.append(torch.cat([torch.arange(block.earlier.start, block.earlier.stop), own]))
            places = [places[0] + count, places[1] + seen, places[2], places[3] - (-seen // 32) * 32]
        places[2] += block.bias.numel()
    nothing = torch.zeros(0)  # of a pack of padding alone
    return Tables(
        torch.tensor(items, dtype=torch.int32).view(-1, 6),
        torch.cat([block.queries.flatten() for block in blocks] or [nothing]).int(),
        torch.cat(keys or [nothing]).int(),
        torch.cat([block.bias.flatten() for block in blocks] or [nothing]),
        places[3],
        padding,
    )


class _KernelAttention(torch.autograd.Function):
    """`_SegmentAttention` by kernels.c: one call, scores in float32 from the product on.

    Forward and backward of packs of 1,200 to 2,500 tokens (Gemma 3 270M, one core of a Zen 5) take a third of the time
    of `_SegmentAttention` in float32, 0.55 to 0.63 of it where both are confined to AVX2, and 0.75 in bfloat16.
    """

    @staticmethod
    def forward(ctx, query, key, value, tables, scale, softcap):  # type: ignore[no-untyped-def]
        query, key, value = (part.contiguous() for part in (query, key, value))
        ctx.save_for_backward(query, key, value)
        ctx.arguments = tables, scale, softcap
        out = torch.zeros_like(query)
        kernels_for(query).attention_forward(
            *(part.data_ptr() for part in (out, query, key, value)), byref(tables.arguments(query, key, scale, softcap))
        )
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        query, key, value = ctx.saved_tensors
        tables, scale, softcap = ctx.arguments
        grad, grad_query = grad.contiguous(), torch.zeros_like(query)
        grad_key, grad_value = (torch.zeros_like(part, dtype=torch.float32) for part in (key, value))
        sums = torch.empty(tables.sums, 2, *key.shape[1:])
        kernels_for(query).attention_backward(
            *(part.data_ptr() for part in (grad_query, grad_key, grad_value, sums, grad, query, key, value)),
            byref(tables.arguments(query, key, scale, softcap)),
        )
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None, None


def _probability(
    queries: Tensor, keys: Tensor, block: Block, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Softmax over visible keys, [segments · groups, count · heads per group, keys], and the soft-capping's slope."""
    score = (queries @ keys.mT).unflatten(1, (block.queries.shape[1], -1))
    slope = None
    if softcap:
        tanh = score.float().mul_(scale / softcap).tanh_()
        slope = (1 - tanh.square()).flatten(1, 2)
        score, scale = tanh, softcap
    score = torch.add(block.bias, score, alpha=scale)
    return torch.softmax(score, -1).flatten(1, 2), slope
