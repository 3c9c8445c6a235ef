"""Structured answers: which tokens may come next where an answer must match a schema, an expression or a grammar.

llguidance computes the masks. It works on bytes, so it is given the bytes of every token as the tokenizer decodes it.
A mask is exact: a token is in it if and only if the answer so far, with it, can be completed; a token that ends an
answer if and only if the answer may end there. (llguidance would otherwise allow of text that has to come only the
tokens into which the tokenizer would cut it.)

A grammar is compiled before its request is queued, in a thread of its own, once it was tried in a process of its own
(grammar_check.py). What it may cost there and in a step has limits; one that exceeds them fails its own request alone.
"""

import contextlib
import json
import signal
import subprocess
import sys
from dataclasses import asdict
from subprocess import PIPE
from typing import Any

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from serving.engine import grammar_check
from serving.engine.detokenizer import single_byte
from serving.protocol import UNAVAILABLE
from serving.sampling_parameters import RequestError, StructuredOutputs

FROM_OUTSIDE = (-signal.SIGTERM, -signal.SIGKILL, -signal.SIGHUP)  # its own limits end it otherwise


class CannotGoOn(Exception):
    """No next token can be chosen; the message says why."""


class Constraint:
    """What may come next in one answer."""

    def __init__(self, matcher: LLMatcher, kind: str) -> None:
        self._matcher, self._kind = matcher, kind

    @property
    def is_complete(self) -> bool:
        """Whether the answer cannot go on."""
        return bool(self._matcher.is_stopped())

    def mask(self) -> npt.NDArray[np.uint8]:
        """The tokens that may come next: one bit each, the lowest of a byte first.

        Raises:
            CannotGoOn: it exceeds the limits.
        """
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return mask

    def accept(self, token: int) -> None:
        """Append a token.

        Raises:
            CannotGoOn: the grammar exceeds the limits.
        """
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if "NoExtension" in self._matcher.get_error():
            raise CannotGoOn(f"structured_outputs.{self._kind}: no text matches it; here no token may come next")
        if self._matcher.is_error():
            raise CannotGoOn(f"structured_outputs.{self._kind} is too complex: {self._matcher.stop_reason()}")


class GrammarCompiler:
    """Makes constraints for one tokenizer.

    Args:
        tokenizer: of the `tokenizers` library.
        eos_token_ids: tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, eos_token_ids: tuple[int, ...]) -> None:
        # It takes a second or so, and Python's other threads wait.
        tokens = _Tokens(tokenizer, eos_token_ids)
        self._checker = _Checker()
        self._tokenizer = LLTokenizer(
            TokenizerWrapper(tokens), n_vocab=len(tokens.tokens), eos_token=list(eos_token_ids)
        )

    def compile(self, wanted: StructuredOutputs) -> Constraint:
        """Check `wanted` and compile it. Not from two threads at once.

        Raises:
            RequestError: it is no schema, expression or grammar, or one that is not supported or costs too much; the
                message says what is wrong, and where.
        """
        kind, given = next((name, one) for name, one in asdict(wanted).items() if one is not None)
        matcher = LLMatcher(self._tokenizer, self._checker.lark(kind, given), log_level=0, limits=grammar_check.LIMITS)
        if message := matcher.get_error():  # with the tokens of this model alone
            raise RequestError(f"structured_outputs.{kind}: {grammar_check.sentence(message, kind)}")
        return Constraint(matcher, kind)


class _Checker:
    """The process in which grammars are tried first: compiling some takes hours, and a thread cannot be stopped."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def lark(self, kind: str, given: Any) -> str:
        """What is to be compiled.

        Raises:
            RequestError: it is wrong, or costs too much; or the process was ended by somebody else.
        """
        if self._process is None or self._process.poll() is not None:
            command = [sys.executable, "-P", grammar_check.__file__]
            # of this session, so that who ends an engine ends and reaps it too
            self._process = subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True, encoding="utf-8")
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):  # it has just ended
            self._process.stdin.write(json.dumps([kind, given]) + "\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            if self._process.wait() in FROM_OUTSIDE:
                raise RequestError("the process that checks structured_outputs was ended; ask again", UNAVAILABLE)
            raise RequestError(f"structured_outputs.{kind} takes too long to compile, or too much memory; simplify it")
        lark, error = json.loads(answer)
        if error:
            raise RequestError(error)
        return str(lark)


class _Tokens:
    """What llguidance wants to know of a tokenizer."""

    bos_token_id = None

    def __init__(self, tokenizer: Any, eos_token_ids: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = eos_token_ids[0]
        self.special_token_ids = [number for number, one in tokenizer.get_added_tokens_decoder().items() if one.special]
        names = tokenizer.get_vocab(with_added_tokens=True)
        self.tokens = [b""] * (max(names.values()) + 1)
        for name, number in names.items():
            self.tokens[number] = token_bytes(name)

    def __call__(self, text: bytes | str) -> list[int]:
        text = text if isinstance(text, str) else text.decode(errors="replace")
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)


def token_bytes(name: str) -> bytes:
    """The bytes that Gemma's tokenizer decodes a token to, by its name in the vocabulary."""
    return single_byte(name) or name.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()
