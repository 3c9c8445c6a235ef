#!/bin/sh
# Gemma 4's chat template puts the text beside a tool call after the tool's answer, and ends the model's turn there.
#
# A good engineer's guess: an assistant message with a text and a call is written as it was generated, text first, and
# with add_generation_prompt the rendered text ends inside a turn of the model, as it does for a call without a text.
# Seen (gemma4_v5.jinja of trl 1.16.0, by its head Google's template of 2026-07-09): the text is written after the call
# and the tool's answer, then comes <turn|>, and no turn of the model is opened. With thinking on, a thought is opened
# outside of any turn. Without the text all is as guessed. Once the model's next answer is in the messages, it follows
# the text in the same turn: the <turn|> that was rendered before is gone.
# Why it matters: models often say what they will do before they call. The next answer is then sampled after the end of
# a turn, the history is not what was generated, and a cache of the prompt's beginning no longer fits.
# This project: core/gemma4_turns.py writes the template's text to the character, this included. A client that wants
# another prompt leaves the text of messages with calls out.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q jinja2==3.1.6
venv/bin/pip install -q --no-deps trl==1.16.0
venv/bin/python - <<'PYTHON'
from importlib.metadata import distribution

from jinja2.sandbox import ImmutableSandboxedEnvironment

source = distribution("trl").locate_file("trl/chat_templates/gemma4_v5.jinja").read_text()
template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(source)  # as transformers
TEXT = "I will look."
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
ANSWER = '<|tool_response>response:weather{value:<|"|>rain<|"|>}<tool_response|>'


def messages(text):
    return [{"role": "user", "content": "Weather in Oslo?"},
            {"role": "assistant", "content": text, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "1", "content": "rain"}]


def ending(messages, **options):
    """What is rendered from the model's turn on."""
    return template.render(messages=messages, bos_token="<bos>", **options).partition("<|turn>model\n")[2]


asked = {text: ending(messages(text), add_generation_prompt=True) for text in ("", TEXT)}
thinking = ending(messages(TEXT), add_generation_prompt=True, enable_thinking=True)
answered = ending([*messages(TEXT), {"role": "assistant", "content": "It rains."}])
print("call alone:       ", repr(asked[""]))
print("text and call:    ", repr(asked[TEXT]))
print("same, thinking:   ", repr(thinking))
print("after the answer: ", repr(answered))
assert asked[""].endswith(ANSWER), "changed"
assert asked[TEXT] == f"{asked['']}{TEXT}<turn|>\n", "changed"
assert thinking == f"{asked[TEXT]}<|channel>thought\n", "changed"
assert answered == f"{asked['']}{TEXT}It rains.<turn|>\n" and not answered.startswith(asked[TEXT]), "changed"
PYTHON
