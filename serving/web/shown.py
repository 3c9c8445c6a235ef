"""The part of a growing text that a visitor sees."""

from data_prep.clean_text import mask_explicit

LONGEST_TERM = 6  # words, in the lists that mask_explicit uses


class Shown:
    """The part of a growing text that a visitor sees. With `clean`, explicit terms are masked.

    The last words are then held back until it is clear whether they are part of such a term.

    Attributes:
        text: everything shown so far.
    """

    def __init__(self, clean: bool) -> None:
        self._clean, self._whole, self.text = clean, "", ""

    def add(self, part: str) -> str:
        """The newly visible text; "" while it is held back."""
        self._whole += part
        if not self._clean:
            return self._show(self._whole)
        words = self._whole.split(" ")
        return self._show(mask_explicit(self._whole)[: len(" ".join(words[:-LONGEST_TERM]))])

    def rest(self) -> str:
        return self._show(mask_explicit(self._whole) if self._clean else self._whole)

    def _show(self, text: str) -> str:
        new = text[len(self.text) :]
        self.text += new
        return new
