"""The page for talking: a dialogue with any adapter that is served."""

from serving.web.page import Page, suggestions

TASK = "chat"

PAGE = Page(task=TASK, title="Chat", order=3, values=lambda settings: {"starters": suggestions(TASK, "message")})
