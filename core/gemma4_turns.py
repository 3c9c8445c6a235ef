"""Gemma 4's turns as text: a system turn, thoughts and tools.

    <|turn>system
    <|think|>                                                        thinking is on
    Be brief.<|tool>declaration:…<tool|><turn|>
    <|turn>user
    Is it raining?<turn|>
    <|turn>model
    <|channel>thought
    …
    <channel|><|tool_call>call:weather{city:<|"|>Rome<|"|>}<tool_call|><|tool_response>response:weather{…}<tool_response|>No.<turn|>

The text is that of the published chat templates of 9 July 2026, to the character (tests/test_gemma4_turns.py). The
large sizes (12B, 26B-A4B, 31B) are asked with an empty thought where thinking is off, the small ones (E2B, E4B) are
not. Texts that come from outside are disarmed before they are written (core/prompt.py). As that file, this one is part
of the client's wheel and needs only the standard library.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

TURN, END = "<|turn>", "<turn|>"
MODEL_TURN = f"{TURN}model\n"
THINK = "<|think|>\n"
THOUGHT, THOUGHT_END = "<|channel>thought\n", "<channel|>"
NO_THOUGHT = THOUGHT + THOUGHT_END
CALL, CALL_END = "<|tool_call>", "<tool_call|>"
RESPONSE, RESPONSE_END = "<|tool_response>", "<tool_response|>"
QUOTE = '<|"|>'

Messages = Sequence[Mapping[str, Any]]


def write_dialogue(
    messages: Messages,
    user_turn: Callable[[str], str],
    end: str,
    opening: str,
    thinking: bool,
    tools: Sequence[Mapping[str, Any]],
) -> str:
    """The text that the model is given to go on after `messages`, without `<bos>`.

    Args:
        messages: in OpenAI's form, as `check_turns` returns them; control tokens are disarmed.
        user_turn: the whole turn of the user's text.
        end: ends a turn of the model.
        opening: begins the answer that is asked for; the empty thought in it only this one, and not where thinking is
            on.
        tools: functions in OpenAI's form, `{"type": "function", "function": {"name", "description", "parameters"}}`.
    """
    text, rest = "", list(messages)
    if thinking or tools or rest[0]["role"] == "system":
        system = rest.pop(0)["content"] if rest[0]["role"] == "system" else ""
        declared = "".join(f"<|tool>{_declaration(tool['function'])}<tool|>" for tool in tools)
        text = f"{TURN}system\n{THINK * thinking}{system}{declared}{END}\n"
    asked = max((at for at, message in enumerate(rest) if message["role"] == "user"), default=-1)
    within = False  # a turn of the model
    begun = MODEL_TURN + opening.replace(NO_THOUGHT, "")
    for at, message in enumerate(rest):
        if message["role"] == "user":
            text += user_turn(message["content"])
            within = False
        elif message["role"] == "assistant":
            text += begun * (not within)
            if at > asked and message.get("thought"):
                text += f"{THOUGHT}{message['thought']}\n{THOUGHT_END}"
            calls = message.get("tool_calls") or []
            text += "".join(_call(call["function"]) for call in calls)
            answers = _answers(rest[at + 1 :]) if calls else []
            names = {call.get("id"): call["function"]["name"] for call in calls}
            text += "".join(_response(answer, names) for answer in answers)
            text += message["content"]
            is_last = at + 1 + len(answers) == len(rest)
            within = bool(answers) and (is_last or rest[at + 1 + len(answers)]["role"] == "assistant")
            if not within or (is_last and message["content"]):
                text += f"{end}\n"
    if not within:
        return text + (begun if thinking else MODEL_TURN + opening)
    return text + THOUGHT * thinking


def strip_thoughts(text: str) -> str:
    """An answer without its thoughts, as earlier turns are written."""
    parts = text.split(THOUGHT_END)
    return "".join(part.partition("<|channel>")[0] for part in parts).strip()


def _answers(messages: Messages) -> list[Mapping[str, Any]]:
    """The answers of tools at the beginning of `messages`."""
    found: list[Mapping[str, Any]] = []
    for message in messages:
        if message["role"] != "tool":
            break
        found.append(message)
    return found


def _call(function: Mapping[str, Any]) -> str:
    return f"{CALL}call:{function['name']}{{{_pairs(function['arguments'])}}}{CALL_END}"


def _response(answer: Mapping[str, Any], names: Mapping[Any, str]) -> str:
    name = names.get(answer.get("tool_call_id")) or answer.get("name") or "unknown"
    content = answer["content"]
    values = content if isinstance(content, Mapping) else {"value": content}
    return f"{RESPONSE}response:{name}{{{_pairs(values)}}}{RESPONSE_END}"


def _pairs(values: Mapping[str, Any]) -> str:
    return ",".join(f"{key}:{_value(value)}" for key, value in _sorted(values))


def _sorted(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return sorted(values.items(), key=lambda item: item[0].lower())  # as Jinja's dictsort


def _value(value: Any, quoted_keys: bool = False) -> str:
    match value:
        case None:
            return "null"
        case str():
            return f"{QUOTE}{value}{QUOTE}"
        case bool():
            return "true" if value else "false"
        case Mapping():
            quote = QUOTE if quoted_keys else ""
            pairs = (f"{quote}{key}{quote}:{_value(inner, quoted_keys)}" for key, inner in _sorted(value))
            return f"{{{','.join(pairs)}}}"
        case list() | tuple():
            return f"[{','.join(_value(inner, quoted_keys) for inner in value)}]"
    return str(value)


# --- declarations of tools ---------------------------------------------------------------------------------------


def _declaration(function: Mapping[str, Any]) -> str:
    parts = [f"description:{QUOTE}{function.get('description', '')}{QUOTE}"]
    if parameters := function.get("parameters"):
        inner = ""
        if properties := parameters.get("properties"):
            inner += f"properties:{{{_properties(properties)}}},"
        if required := parameters.get("required"):
            inner += f"required:[{_quoted(required)}],"
        parts.append(f"parameters:{{{inner}type:{QUOTE}{str(parameters.get('type') or 'object').upper()}{QUOTE}}}")
    return f"declaration:{function['name']}{{{','.join(parts)}}}"


def _quoted(texts: Sequence[str]) -> str:
    return ",".join(f"{QUOTE}{text}{QUOTE}" for text in texts)


def _properties(properties: Mapping[str, Any], without: Sequence[str] = ()) -> str:
    """JSON Schema's properties: of each its description, what its type needs, and its type."""
    return ",".join(f"{key}:{{{_schema(value)}}}" for key, value in _sorted(properties) if key not in without)


def _schema(value: Any) -> str:
    schema = value if isinstance(value, Mapping) else {}
    kind = str(schema.get("type", "")).upper()
    parts = []
    if schema.get("description"):
        parts.append(f"description:{QUOTE}{schema['description']}{QUOTE}")
    if kind == "STRING" and schema.get("enum"):
        parts.append(f"enum:{_value(schema['enum'])}")
    if kind == "ARRAY" and isinstance(schema.get("items"), Mapping) and schema["items"]:
        parts.append(f"items:{{{','.join(_item(*item) for item in _sorted(schema['items']) if item[1] is not None)}}}")
    if schema.get("nullable"):
        parts.append("nullable:true")
    if kind == "OBJECT":
        inner = schema.get("properties")
        standard = ("description", "type", "properties", "required", "nullable")
        shown = _properties(inner) if isinstance(inner, Mapping) else _properties(schema, standard)
        parts.append(f"properties:{{{shown}}}")
        if schema.get("required"):
            parts.append(f"required:[{_quoted(schema['required'])}]")
    return ",".join([*parts, f"type:{QUOTE}{kind}{QUOTE}"])


def _item(key: str, value: Any) -> str:
    """An entry of the schema of a list's items."""
    if key == "properties":
        return f"properties:{{{_properties(value) if isinstance(value, Mapping) else ''}}}"
    if key == "required":
        return f"required:[{_quoted(value)}]"
    if key == "type":
        return f"type:{_value(value.upper() if isinstance(value, str) else [str(one).upper() for one in value])}"
    return f"{key}:{_value(value, quoted_keys=True)}"


# --- what comes from outside ----------------------------------------------------------------------------------------


def check_turns(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A dialogue for Gemma 4 as `write_dialogue` takes it, which ends with the user or with the answer of a tool.

    White space around texts is removed, thoughts in the text of an answer are left out, and the JSON of calls is read.

    Raises:
        ValueError: a message has another role than is due there, has no text, or a call of a tool cannot be read.
    """
    found = list[dict[str, Any]]()
    for number, message in enumerate(messages, 1):
        role, content = message.get("role"), message.get("content")
        role = {"model": "assistant", "developer": "system"}.get(str(role), role)
        last = found[-1] if found else {"role": "system"}
        calls = message.get("tool_calls") if role == "assistant" else None
        is_due = {
            "system": number == 1,
            "user": last["role"] == "system" or (last["role"] == "assistant" and not last.get("tool_calls")),
            "assistant": last["role"] in ("user", "tool"),
            "tool": last["role"] == "tool" or bool(last.get("tool_calls")),
        }
        if not is_due.get(str(role)):
            due = ("a tool's answer" if last.get("tool_calls") else "assistant") if not is_due["user"] else "user"
            raise ValueError(
                f"message {number} has role {role!r} where {due} is expected: user and assistant alternate, "
                f"after one system message at most"
            )
        if not isinstance(content, str) or not content.strip():
            if not calls and role != "tool":
                raise ValueError(f"message {number} has no text")
            content = content if role == "tool" and content else ""
        if role != "tool":
            content = strip_thoughts(content) if role == "assistant" else content.strip()
        thought = message.get("reasoning") or message.get("reasoning_content")
        known = {"role": role, "content": content, "tool_call_id": message.get("tool_call_id")}
        known |= {"name": message.get("name"), "thought": thought, "tool_calls": _calls(calls or [], number)}
        found.append({name: value for name, value in known.items() if value or name == "content"})
    if not found or all(message["role"] == "system" for message in found):
        raise ValueError("the dialogue has no user message")
    if found[-1]["role"] == "assistant":
        raise ValueError("the dialogue ends with the model; its last message must be the user's")
    return found


def _calls(calls: Any, number: int) -> list[dict[str, Any]]:
    read = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function") if isinstance(call, Mapping) else None
        name, arguments = (function.get("name"), function.get("arguments")) if isinstance(function, Mapping) else (0, 0)
        try:
            arguments = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments or {}
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(name, str) or not isinstance(arguments, Mapping):
            raise ValueError(f"message {number}: a call of a tool needs a name and its arguments as a JSON object")
        read.append({"id": call.get("id"), "function": {"name": name, "arguments": arguments}})
    return read


def check_tools(tools: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """`tools` itself.

    Raises:
        ValueError: one of them is no function in OpenAI's form.
    """
    for number, tool in enumerate(tools, 1):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        parameters = function.get("parameters") or {} if isinstance(function, Mapping) else None
        if not isinstance(parameters, Mapping) or not re.fullmatch(r"[\w.\-]+", str(function.get("name") or "")):  # type: ignore[union-attr]
            raise ValueError(
                f'tools: number {number} is no function: {{"type": "function", "function": {{"name", "description", '
                f'"parameters"}}}}'
            )
        try:
            if not isinstance(parameters.get("properties") or {}, Mapping):
                raise TypeError
            _declaration(tool["function"])
        except (TypeError, AttributeError, RecursionError):
            raise ValueError(f"tools: the parameters of number {number} are no JSON schema") from None
    return tools
