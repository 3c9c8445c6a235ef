"""Reads the messages of a dialogue in the forms in which other tools write them.

    [{"role": "user", "content": "Hi"}, …]                                  OpenAI, Hugging Face
    [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, …]      with its content in parts; Anthropic
    [{"role": "user", "parts": [{"text": "Hi"}]}, …]                        Gemini
    [{"from": "human", "value": "Hi"}, …]                                   ShareGPT
    [{"input": "Hi", "output": "Hello"}, …] or [["Hi", "Hello"], …]         exchanges
    ["Hi", "Hello", …]                                                      turns by turns, the user's first

as JSON, or as Python, pandas and numpy print them (data_prep/read_python.py). Parts of text are joined by line breaks,
as they are where a served model is asked (serving/openai_api.py). What is not text is refused by its name.

A mark on an answer decides whether it is learned: `weight` (OpenAI, Mistral), `train` or `training` (axolotl), `loss`
(ms-swift), `trainable`, `loss_mask` (verl); `mask` or `masked` (torchtune) are their contrary.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from data_prep.read_python import read_python
from data_prep.row_store import Unusable

# Besides system, user, assistant and tool.
ROLES = {
    **dict.fromkeys(("human", "prompter", "customer"), "user"),
    **dict.fromkeys(("gpt", "model", "ai", "bot", "chatbot", "chatgpt", "bing", "bard", "agent"), "assistant"),
    "developer": "system",
    **dict.fromkeys(("function", "observation", "tool_response", "ipython"), "tool"),
}
CALLING = ("function_call", "tool_call")  # roles whose text is a call
KNOWN = {"system", "user", "assistant", "tool", *ROLES, *CALLING}
SPEAKERS = ("role", "from", "author", "speaker")
TEXTS = ("content", "value", "parts", "text", "message", "data")
ASKED = ("input", "user", "human", "question", "prompt", "instruction")
ANSWERED = ("output", "assistant", "gpt", "bot", "answer", "response")
CALLS = ("tool_calls", "function_call", "tool_use", "functionCall", "function_calls", "toolUse")
THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thought")
# What a part that is not text is called in a sentence, by a word in its type, in the names of its fields or in its
# media type.
NOT_TEXT = {
    "image": "an image",
    "audio": "audio",
    "video": "a video",
    "document": "a document",
    "pdf": "a document",
    "file": "a file",
    "inline": "a file",
}
PLACEHOLDER = re.compile(r"\A\s*<(image|audio|video)>|<(image|audio|video)>\s*\Z")  # LLaVA's, at an end of the text
LEARNED = ("weight", "train", "training", "trainable", "learn", "loss", "loss_mask", "step_loss_mask")
CONTEXT = ("mask", "masked", "is_masked")
SAID = {"0": 0.0, "false": 0.0, "no": 0.0, "1": 1.0, "true": 1.0, "yes": 1.0}
_LIST = re.compile(r'\s*"?\s*(?:array\(\s*)?[\[({]')
_MESSAGES = re.compile(r"""\s*"?\s*(?:array\(\s*)?[\[(]\s*\{\s*\\?['"](?:role|from|content|value|parts)\\?['"]""")


def read_messages(cell: str, is_dialogue: bool = True) -> list[dict[str, Any]] | None:
    """The messages in the text of a cell, or None if it has none: then it is a message itself.

    Args:
        is_dialogue: the row has nothing else. Otherwise a list is text, as an answer in JSON is, unless each of its
            objects has a text and a role that is known here.

    Returns:
        Each as `{"role", "content"}`, its role any word, its content "" where it has no text; with `thought`; with
        `weight` where it is marked; and with `calls` where it calls a tool.

    Raises:
        Unusable: a list of messages that cannot be read, a message that is no text, or a mark that is none.
    """
    if not _LIST.match(cell):
        return None
    found = _parse(cell)
    if isinstance(found, Mapping):
        inner = next((found[name] for name in ("messages", "contents", "conversations") if name in found), None)
        found = inner or [found]
    messages: Sequence[Any] = []
    if isinstance(found, list | tuple) and found:
        messages = found if all(isinstance(part, Mapping) for part in found) else []
        if messages and (is_dialogue or all(map(_is_message, messages))):
            return [message for number, part in enumerate(messages, 1) for message in _of(part, number)]
        if is_dialogue and (texts := _turns(found)):
            return [_message(("user", "assistant")[place % 2], text) for place, text in enumerate(texts)]
    if _MESSAGES.match(cell) and not messages:
        raise Unusable("no list of messages", "it looks like one, but is neither JSON nor Python that can be read")
    return None


def read_parts(cell: str) -> str:
    """The text in a cell of content, such as Gemini's system instruction, `{"parts": [{"text": …}]}`.

    Raises:
        Unusable: it is no text.
    """
    found = _parse(cell)
    content = _first(found, TEXTS) if isinstance(found, Mapping) else found
    try:
        return _text_of(content, 0, {})
    except Unusable as why:
        raise Unusable(why.args[0], why.args[1].replace("message 0", "the system text")) from None


def _is_message(given: Mapping[str, Any]) -> bool:
    return _speaker(given) in KNOWN and any(name in given for name in (*TEXTS, *CALLS))


def _turns(found: Sequence[Any]) -> list[str]:
    """The texts of `["Hi", "Hello", …]` and of `[["Hi", "Hello"], …]`."""
    is_pairs = all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in found)
    turns = [text for pair in found for text in pair] if is_pairs else list(found)
    return ["" if text is None else text for text in turns] if all(isinstance(t, str | None) for t in turns) else []


def _parse(cell: str) -> object:
    """The value of JSON, of JSON in a text of JSON, or of Python; None if it is none of these."""
    try:
        found = json.loads(cell, strict=False)
        return _parse(found) if isinstance(found, str) else found
    except (ValueError, RecursionError):
        pass
    try:
        return read_python(cell)
    except ValueError:
        return None


def _message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _of(given: Mapping[str, Any], number: int) -> list[dict[str, Any]]:
    """The message, or the messages of an exchange."""
    speaker = _speaker(given)
    asked, said = _first(given, ASKED), _first(given, ANSWERED)
    if not speaker and asked is not None and said is not None:
        system = given.get("system") if number == 1 else None
        opening = [_message("system", system)] if isinstance(system, str) and system.strip() else []
        user, answer = _message("user", ""), _message("assistant", "") | _marked(given, number)
        for message, content in ((user, asked), (answer, said)):
            message["content"] = _text_of(content, number, message)
        return [*opening, user, answer]
    message = _message(ROLES.get(speaker, speaker), "") | _marked(given, number)
    message["content"] = _text_of(_first(given, TEXTS), number, message)
    if speaker in CALLING or any(given.get(call) for call in CALLS):
        message["calls"] = True
    if thought := _first(given, THOUGHTS):
        message["thought"] = str(thought)
    return [message]


def _speaker(given: Mapping[str, Any]) -> str:
    """The role in small letters; that of LangChain is its type."""
    kind = given.get("type")
    return str(_first(given, SPEAKERS) or (kind if kind in ("human", "ai", "system", "tool") else "")).lower()


def _first(given: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((given[name] for name in names if given.get(name) is not None), None)


# --- content --------------------------------------------------------------------------------------------------


def _text_of(content: Any, number: int, message: dict[str, Any]) -> str:
    """The text of a content: parts joined by line breaks. Thoughts and calls in parts are noted in `message`."""
    parts = content if isinstance(content, list | tuple) else [content]
    texts = [text for part in parts if (text := _text_of_part(part, number, message))]
    return "\n".join(texts)


def _text_of_part(part: Any, number: int, message: dict[str, Any]) -> str:
    if isinstance(part, str):
        if held := PLACEHOLDER.search(part):
            raise _no_text(number, NOT_TEXT[held[1] or held[2]])
        return part
    if part is None:
        return ""
    if not isinstance(part, Mapping):
        raise _no_text(number, f"content of the type {type(part).__name__}")
    filled = {name: value for name, value in part.items() if value is not None}
    kind = str(filled.get("type", ""))
    if kind in ("thinking", "reasoning", "redacted_thinking") or filled.get("thought") is True:
        message["thought"] = str(filled.get("thinking") or filled.get("text") or "")
        return ""
    if any(call in filled for call in CALLS) or kind in (*CALLS, *CALLING):
        message["calls"] = True
        return ""
    for result in ("functionResponse", "function_response", "toolResult", "tool_result"):
        if result in (kind, *filled):
            message["role"] = "tool"
            answer = filled.get(result, filled)
            return _answer_of_tool(answer, number, message)
    text = filled.get("text")
    if isinstance(text, Mapping):  # of OpenAI's Assistants: {"value", "annotations"}
        text = text.get("value")
    if isinstance(text, str) and kind in ("", "text", "input_text", "output_text"):
        return text
    if isinstance(filled.get("refusal"), str):
        return str(filled["refusal"])
    if not kind and isinstance(filled.get("content"), str):  # LangChain's data
        return str(filled["content"])
    described = " ".join((kind, *filled, *(str(value) for value in _media_types(filled)))).lower()
    what = next((what for word, what in NOT_TEXT.items() if word in described), "")
    raise _no_text(number, what or f"a part of the type {kind!r}" if what or kind else "a part that is no text")


def _answer_of_tool(answer: Any, number: int, message: dict[str, Any]) -> str:
    """The answer of a tool as text; one of JSON as JSON."""
    content = _first(answer, ("content", "response", "output")) if isinstance(answer, Mapping) else answer
    if isinstance(content, Mapping) and "type" not in content and "text" not in content:
        return json.dumps(content, ensure_ascii=False)
    return _text_of(content, number, message)


def _media_types(part: Mapping[str, Any]) -> list[Any]:
    inner = [part, *(value for value in part.values() if isinstance(value, Mapping))]
    return [one[name] for one in inner for name in ("mimeType", "mime_type", "media_type") if one.get(name)]


def _no_text(number: int, what: str) -> Unusable:
    return Unusable("images, audio and other things than text cannot be learned", f"message {number} holds {what}")


# --- marks ----------------------------------------------------------------------------------------------------


def _marked(given: Mapping[str, Any], number: int) -> dict[str, float]:
    """`{"weight": …}` if the message says whether it is to be learned."""
    weights = [_weight(given[name], name, number) for name in LEARNED if _is_given(given.get(name))]
    weights += [float(not _weight(given[name], name, number)) for name in CONTEXT if _is_given(given.get(name))]
    parts = given.get("train_detail") or given.get("training_detail") or []
    if 0 not in weights and any(isinstance(part, Mapping) and part.get("train") is False for part in parts):
        raise Unusable("answers cannot be learned in part", f"message {number} has train_detail with train: false")
    return {"weight": min(weights)} if weights else {}


def _is_given(value: Any) -> bool:
    return value is not None and value == value  # NaN, of pandas, is not itself


def _weight(value: Any, name: str, number: int) -> float:
    found = SAID.get(value.strip().lower()) if isinstance(value, str) else value
    if isinstance(found, bool | int | float) and 0 <= found < float("inf"):
        return float(found)
    raise Unusable("a mark that is none", f"message {number} has {name}: {str(value)[:40]!r}, which is neither 0 nor 1")
