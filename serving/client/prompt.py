"""The prompt a model was trained with. In the wheel, setup.py puts core/prompt.py itself in the place of this file."""

from core.prompt import AnswerPart, AnswerReader, Prompt, ToolCall, disarm

__all__ = ["AnswerPart", "AnswerReader", "Prompt", "ToolCall", "disarm"]
