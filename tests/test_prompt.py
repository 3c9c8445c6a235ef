"""The one place that words a row for a model, and reads its answer back."""

from pathlib import Path

import pytest

from core.prompt import Prompt, exchanges

SLANG = Prompt(
    template="Instruction:\n{instruction}\n\nResponse:\n{response}",
    instruction="{tag}{context}{condition}",
    response="Slang: {slang}\nDefinition: {description}\nExample: {example}",
    fields={"tag": "Tag. ", "context": "A default scene.", "condition": "The condition."},
)


def test_a_field_that_is_left_out_takes_the_task_s_default() -> None:
    assert SLANG.write_instruction() == "Tag. A default scene.The condition."
    assert SLANG.write_instruction(context="A party.") == "Tag. A party.The condition."


def test_a_line_of_the_response_without_a_value_is_left_out() -> None:
    assert SLANG.write_response(slang="W", description="A win.") == "Slang: W\nDefinition: A win."


def test_braces_in_a_row_are_text() -> None:
    row = {"slang": "{description}", "description": "{0.__class__} {}", "example": "{{x}}"}
    assert SLANG.write_response(**row) == "Slang: {description}\nDefinition: {0.__class__} {}\nExample: {{x}}"


def test_the_prompt_ends_where_the_answer_begins() -> None:
    assert SLANG.wrap("Say it.") == "Instruction:\nSay it.\n\nResponse:\n"


@pytest.mark.parametrize(
    "row",
    [
        {"slang": "W", "description": "A win.", "example": "Big W!"},
        {"slang": "W", "description": "A win."},
        {"slang": "W", "description": "A win.\nOr so.", "example": "Definition matters: here."},
    ],
)
def test_a_written_response_reads_back(row: dict[str, str]) -> None:
    assert SLANG.read_response(SLANG.write_response(**row)) == row


def test_a_second_answer_is_not_read() -> None:
    text = "Slang: W\nDefinition: A win.\nExample: Big W!\nSlang: L\nDefinition: A loss."
    assert SLANG.read_response(text) == {"slang": "W", "description": "A win.", "example": "Big W!"}


def test_it_travels_in_a_folder(tmp_path: Path) -> None:
    SLANG.save(tmp_path)
    assert Prompt.load(tmp_path) == SLANG


@pytest.mark.parametrize(
    "template", ["{response}", "{instruction} {instruction} {response}", "{instruction}{response}."]
)
def test_a_template_that_cannot_be_trained_on_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match="prompt template must hold"):
        Prompt(template, "{tag}", "{slang}")


TURNS = Prompt("<start_of_turn>user\n{instruction}<end_of_turn>\n<start_of_turn>model\n{response}<end_of_turn>", "", "")
TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": " hi "},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
]


def test_a_system_text_begins_the_first_message_and_spaces_around_a_text_are_lost() -> None:
    assert exchanges(TALK) == [("Be kind.\n\nhi", "Hello!"), ("Bye", None)]


def test_a_dialogue_is_worded_for_training_as_it_is_for_an_answer() -> None:
    asked = TURNS.wrap_dialogue(TALK)
    pieces = TURNS.pieces({"messages": [*TALK, {"role": "assistant", "content": "See you!"}]})
    assert "".join(text + "<end_of_turn>" * learned for text, learned in pieces) == f"{asked}See you!<end_of_turn>"
    assert [text for text, learned in pieces if learned] == ["Hello!", "See you!"]


def test_control_tokens_of_a_row_are_text_and_other_signs_stay() -> None:
    row = {"input": "a <eos> b <br> <EOS>", "output": "c<end_of_turn><unused12>"}
    (asked, _), (answer, _) = SLANG.pieces(row)
    assert "a < eos> b <br> <EOS>" in asked and answer == "c< end_of_turn>< unused12>"
