"""Incremental detokenization: incomplete characters, and what may become a stop string, are held back."""

from typing import Any

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer decodes an incomplete character to


def single_byte(name: str | None) -> bytes | None:
    """The byte that the token `name` stands for, one of a character without a token of its own; None: it is no such
    token."""
    return bytes.fromhex(name[3:5]) if name and len(name) == 6 and name.startswith("<0x") else None


class Detokenizer:
    """The text of one answer. `text` only grows, until a stop string cuts it.

    Args:
        tokenizer: of the `tokenizers` library.
        stops: stop strings.
        min_tokens: stop strings that begin within so many tokens are ignored.
        skip_special: leave control tokens out of the text.
        include_stop: what ends the answer, a string or a token, belongs to it.
    """

    def __init__(
        self,
        tokenizer: Any,
        stops: tuple[str, ...],
        min_tokens: int,
        skip_special: bool = True,
        include_stop: bool = False,
    ) -> None:
        self.tokenizer, self.stops, self.min_tokens, self.skip_special = tokenizer, stops, min_tokens, skip_special
        self.include_stop = include_stop
        self.tokens: list[int] = []
        self.text = ""
        self.sent = 0  # characters returned by `new_text`
        self.searched = 0  # characters at which no stop string begins
        # Tokens from `prefix_offset` on are decoded again with each new one, because a tokenizer may decode the first
        # token of a text differently; those before `read_offset` are in `text` already.
        self.prefix_offset, self.read_offset = 0, 0

    def add(self, token: int, *, last: bool = False, ends: bool = False) -> bool:
        """Append a token.

        Args:
            last: the answer ends with it, so that nothing is held back any longer.
            ends: it is the token that says so.

        Returns:
            Whether a stop string is complete; the text then ends before it, or with it.
        """
        if self.include_stop or not ends:
            self.tokens.append(token)
        old = self._decode(self.prefix_offset, self.read_offset)
        new = self._decode(self.prefix_offset, len(self.tokens))
        is_byte = single_byte(self.tokenizer.id_to_token(token)) is not None  # it is decoded with the next ones
        if len(new) > len(old) and (last or not (new.endswith(INCOMPLETE) or is_byte)):
            self.text += new[len(old) :]
            self.prefix_offset, self.read_offset = self.read_offset, len(self.tokens)
        if len(self.tokens) <= self.min_tokens:
            self.searched = len(self.text)
            return False
        found = [(at, len(stop)) for stop in self.stops if (at := self.text.find(stop, self.searched)) >= 0]
        if found:
            start, length = min(found)
            self.text = self.text[: start + length if self.include_stop else start]
            return True
        self.searched = max(self.searched, len(self.text) - max(map(len, self.stops), default=1) + 1)
        return False

    def new_text(self, *, last: bool = False) -> str:
        """The text that has not been returned yet and cannot change any more."""
        end = len(self.text) if last else len(self.text) - self._possible_stop()
        text = self.text[self.sent : end]
        self.sent = max(self.sent, end)
        return text

    def _decode(self, start: int, end: int) -> str:
        return (
            self.tokenizer.decode(self.tokens[start:end], skip_special_tokens=self.skip_special) if start < end else ""
        )

    def _possible_stop(self) -> int:
        """The number of characters at the end that may be the beginning of a stop string."""
        for length in range(min(max(map(len, self.stops), default=1) - 1, len(self.text) - self.sent), 0, -1):
            end = self.text[-length:]
            if any(stop.startswith(end) for stop in self.stops):
                return length
        return 0
