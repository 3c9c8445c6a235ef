"""The site as an ASGI application: its pages, what stands before them, and what they share."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Form, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, RedirectResponse
from fastapi.staticfiles import StaticFiles
from fastapi.templating import Jinja2Templates
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.client import Adapter, AsyncClient, ServingError
from serving.web import answers, dictionary, evidence, runs
from serving.web.evidence import reviews_of
from serving.web.guard import SANDBOX, HeadAsGet, Limits, Rate, SameOrigin, SecurityHeaders, SignIn, client_of
from serving.web.runs import finished_runs
from serving.web.tasks import suggestions, task_config

HERE = Path(__file__).parent
FILM = "squid_game"  # the task of the page of reviews
LARGEST_BODY = 128 * 1024
RATES = {
    "": Rate(per_minute=600, burst=200),
    "/api/answer": Rate(per_minute=30, burst=15),
    "/api/dictionary": Rate(per_minute=30, burst=30),
    "/sign-in": Rate(per_minute=6, burst=5),
}
WATCH = 2  # seconds between two looks at what is served
log = logging.getLogger("serving.web")


@dataclass(frozen=True)
class Settings:
    """What an operator decides.

    Attributes:
        triton: where the model is, as serving.client takes it.
        runs, data: folders of `make train` and `make data`.
        hosts: names by which the site may be called; others are refused, so that no stranger's domain name reaches it.
        password: asked of every visitor unless empty.
        clean: explicit terms are refused in questions and masked in answers.
        rates, at_once: see guard.Limits.
    """

    triton: str = "127.0.0.1:8001"
    runs: Path = Path("runs")
    data: Path = Path("data")
    database: Path = dictionary.DATABASE
    hosts: tuple[str, ...] = ("127.0.0.1", "localhost")
    password: str = ""
    clean: bool = False
    at_once: int = 3
    in_all: int = 64


def create_app(settings: Settings) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(reviews_of, settings.data, FILM)  # or the first visitor would wait for the reading
        # Not there now is shown at once, not after a long patience: a visitor has a button to try again.
        async with AsyncClient(settings.triton, first_token_deadline=45, token_deadline=10, retry_for=3) as client:
            app.state.client, app.state.served = client, None
            watch = asyncio.create_task(_watch(app))
            yield
            watch.cancel()

    store = dictionary.Dictionary(settings.database)
    guards = [
        Middleware(RequestLog),
        Middleware(SecurityHeaders),
        Middleware(TrustedHostMiddleware, allowed_hosts=list(settings.hosts), www_redirect=False),
        Middleware(Limits, rates=RATES, streaming="/api/answer", at_once=settings.at_once, in_all=settings.in_all),
        Middleware(SameOrigin),
        *([Middleware(SignIn, password=settings.password, key=store.key)] if settings.password else []),
        Middleware(GZipMiddleware, minimum_size=1000),
        Middleware(HeadAsGet),
    ]
    app = FastAPI(
        title="Own Gemma",
        lifespan=lifespan,
        middleware=guards,
        max_body_size=LARGEST_BODY,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
    )
    app.state.settings, app.state.dictionary = settings, store
    templates = Jinja2Templates(
        env=Environment(
            loader=FileSystemLoader(HERE / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
    )
    app.state.templates = templates
    for router in (answers.router, dictionary.router, evidence.router, runs.router):
        app.include_router(router)
    app.mount("/static", StaticFiles(directory=HERE / "static"), name="static")

    def page(request: Request, name: str, status: int = 200, **values: Any) -> Response:
        shared = {"page": name, "has_password": bool(settings.password), "clean": settings.clean}
        return templates.TemplateResponse(request, f"{name}.html", {**shared, **values}, status)

    @app.get("/")
    def slang(request: Request) -> Response:
        return page(
            request, "slang", fields=task_config("slang")["prompt"]["fields"], scenes=suggestions("slang", "context")
        )

    @app.get("/reviews")
    def reviews(request: Request) -> Response:
        film = task_config(FILM)["data"]["reviews"]
        known = reviews_of(settings.data, FILM)
        return page(
            request,
            "reviews",
            task=FILM,
            film=film,
            questions=suggestions(FILM, "question"),
            knowledge=known and known.knowledge,
        )

    @app.get("/reviews/aspects.svg")
    def aspects() -> Response:
        file = settings.data / FILM / "aspects.svg"
        if not file.is_file():
            raise HTTPException(404, "The picture is not there yet.")
        return FileResponse(file, headers={"content-security-policy": SANDBOX})

    @app.get("/chat")
    def chat(request: Request) -> Response:
        return page(request, "chat", starters=suggestions("chat", "message"))

    @app.get("/runs")
    async def runs_page(request: Request) -> Response:
        served, cards = app.state.served, await asyncio.to_thread(finished_runs, settings.runs)
        return page(
            request, "runs", served=served, cards=cards, of_run={(card.task, card.name): card for card in cards}
        )

    @app.get("/api/status")
    async def status() -> dict[str, Any]:
        served: list[Adapter] = app.state.served or []
        adapters = [{"name": a.name, "title": a.title, "has_turns": a.has_turns, "run": a.run} for a in served]
        return {"ready": app.state.served is not None, "adapters": adapters}

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"site": "ok"}

    @app.get("/robots.txt")
    def robots() -> Response:
        return PlainTextResponse("User-agent: *\nDisallow: /api/\nDisallow: /runs\nDisallow: /dictionary.csv\n")

    @app.get("/privacy")
    def privacy(request: Request) -> Response:
        return page(request, "privacy")

    if settings.password:

        @app.get("/sign-in")
        def sign_in(request: Request, next: str = "/") -> Response:
            return page(request, "sign_in", next=_own_path(next), wrong=False)

        @app.post("/sign-in")
        def signed_in(
            request: Request, password: Annotated[str, Form(max_length=1000)], next: Annotated[str, Form()] = "/"
        ) -> Response:
            door: SignIn = request.scope["sign_in"]
            if not door.is_right(password):
                return page(request, "sign_in", 403, next=_own_path(next), wrong=True)
            response = RedirectResponse(_own_path(next), 303)
            secure = request.url.scheme == "https"
            response.set_cookie(SignIn.COOKIE, door.cookie(), httponly=True, samesite="lax", secure=secure)
            return response

    @app.exception_handler(HTTPException)
    def failed(request: Request, error: HTTPException) -> Response:
        if request.url.path.startswith("/api/"):
            return JSONResponse({"detail": error.detail}, error.status_code, error.headers)
        sentence = "There is no such page." if error.detail == "Not Found" else error.detail
        return page(request, "error", error.status_code, sentence=sentence)

    @app.exception_handler(RequestValidationError)
    def malformed(request: Request, error: RequestValidationError) -> Response:
        # FastAPI's own answer repeats what was sent; this names only where it is wrong.
        found = [f"{'.'.join(map(str, problem['loc'][1:]))}: {problem['msg']}" for problem in error.errors()[:3]]
        return JSONResponse({"detail": "This request is not as it should be. " + "; ".join(found)}, 422)

    return app


async def _watch(app: FastAPI) -> None:
    """Keeps `app.state.served` at what Triton serves, None while it is not ready, so that no page waits for it."""
    while True:
        client: AsyncClient = app.state.client
        try:
            async with asyncio.timeout(5):
                app.state.served = await client.adapters() if await client.is_ready() else None
        except (ServingError, TimeoutError):
            app.state.served = None
        await asyncio.sleep(WATCH)


def _own_path(path: str) -> str:
    """`path` if it is one of this site, else its front page: nobody is sent elsewhere after the password."""
    return path if path.startswith("/") and not path.startswith(("//", "/\\")) and path.isprintable() else "/"


class RequestLog:
    """One line a request: never what was asked, so neither body nor query."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began, status = time.monotonic(), 0

        async def seen(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, seen)
        finally:
            took = 1000 * (time.monotonic() - began)
            log.info("%s %s %s %d %.0f ms", client_of(scope), scope["method"], ascii(scope["path"])[1:-1], status, took)
