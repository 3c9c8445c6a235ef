"""From tokens to text as it grows: half characters wait, and so does what may become a stop string."""

from typing import Any

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer makes of half a character


class AnswerText:
    """The text of one answer. `text` never changes but by growing, until a stop string cuts it."""

    def __init__(self, tokenizer: Any, stops: tuple[str, ...], min_tokens: int) -> None:
        self.tokenizer, self.stops, self.min_tokens = tokenizer, stops, min_tokens
        self.tokens: list[int] = []
        self.text = ""
        self.sent = 0  # characters given away by `part`
        self.searched = 0  # characters in which no stop string begins
        # Tokens are decoded in pieces that begin where a character does. The piece before goes along: a tokenizer may
        # treat the first token of a text differently.
        self.before, self.done = 0, 0

    def add(self, token: int, *, last: bool = False) -> bool:
        """
        Args:
            token: the next one.
            last: whether the answer ends with it, so that nothing waits any longer.

        Returns:
            Whether a stop string is complete; the text then ends before it.
        """
        self.tokens.append(token)
        old = self._decode(self.before, self.done)
        new = self._decode(self.before, len(self.tokens))
        if len(new) > len(old) and (last or not (new.endswith(UNFINISHED) or self._is_byte(token))):
            self.text += new[len(old) :]
            self.before, self.done = self.done, len(self.tokens)
        if len(self.tokens) <= self.min_tokens:
            self.searched = len(self.text)
            return False
        found = [at for stop in self.stops if (at := self.text.find(stop, self.searched)) >= 0]
        if found:
            self.text = self.text[: min(found)]
            return True
        self.searched = max(self.searched, len(self.text) - max(map(len, self.stops), default=1) + 1)
        return False

    def part(self, *, last: bool = False) -> str:
        """The text that has not been given away and cannot change any more."""
        end = len(self.text) if last else len(self.text) - self._may_become_stop()
        part = self.text[self.sent : end]
        self.sent = max(self.sent, end)
        return part

    def _is_byte(self, token: int) -> bool:
        """Whether it is one byte of a character without a token of its own, which is decoded with the next ones."""
        name = self.tokenizer.id_to_token(token)
        return bool(name) and len(name) == 6 and name.startswith("<0x")

    def _decode(self, start: int, end: int) -> str:
        return self.tokenizer.decode(self.tokens[start:end], skip_special_tokens=True) if start < end else ""

    def _may_become_stop(self) -> int:
        """How many characters at the end are the beginning of a stop string."""
        for length in range(min(max(map(len, self.stops), default=1) - 1, len(self.text) - self.sent), 0, -1):
            end = self.text[-length:]
            if any(stop.startswith(end) for stop in self.stops):
                return length
        return 0
