"""The page of reviews: questions, each answer beside the reviews that it can be checked against."""

from typing import Any

from fastapi import HTTPException, Request
from fastapi.responses import FileResponse

from serving.web.guard import SANDBOX
from serving.web.page import Page, suggestions, task_config
from serving.web.settings import Settings
from tasks.reviews.evidence import reviews_of, router

TASK = "squid_game"


def values(settings: Settings) -> dict[str, Any]:
    known = reviews_of(settings.data, TASK)
    return {
        "film": task_config(TASK)["data"]["reviews"],
        "questions": suggestions(TASK, "question"),
        "knowledge": known and known.knowledge,
    }


@router.get("/reviews/aspects.svg")
def aspects(request: Request) -> FileResponse:
    """The chart of aspects that `make data` drew; sandboxed, as all files that another program wrote."""
    file = request.app.state.settings.data / TASK / "aspects.svg"
    if not file.is_file():
        raise HTTPException(404, "The picture has not been made yet.")
    return FileResponse(file, headers={"content-security-policy": SANDBOX})


PAGE = Page(
    task=TASK,
    title="Reviews",
    order=2,
    values=values,
    router=router,
    start=lambda settings: reviews_of(settings.data, TASK),  # or the first visitor would wait for the files to be read
)
