"""The site as an ASGI application: the pages that tasks bring, those of its own, and the guards in front of all."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Form, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse
from fastapi.staticfiles import StaticFiles
from fastapi.templating import Jinja2Templates
from jinja2 import ChoiceLoader, Environment, FileSystemLoader, PrefixLoader, StrictUndefined
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from core.licence import LICENCES, Licence
from serving.client import Adapter, AsyncClient, ServingError
from serving.rate_limit import Rate, client_of
from serving.web import answers, runs
from serving.web.guard import HeadAsGet, SameOrigin, SecurityHeaders, SignIn, VisitorLimits
from serving.web.page import FoundPage, find_pages
from serving.web.runs import finished_runs
from serving.web.settings import Settings, session_key

HERE = Path(__file__).parent
LARGEST_BODY = 128 * 1024
RATES = {
    "": Rate(per_minute=600, burst=200),
    "/api/answer": Rate(per_minute=30, burst=15),
    "/sign-in": Rate(per_minute=6, burst=5),
}
WATCH = 2  # seconds between two checks of what is served
log = logging.getLogger("serving.web")


def create_app(settings: Settings) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        for found in pages:
            if found.page.start:
                await asyncio.to_thread(found.page.start, settings)
        # An absent model is reported at once rather than after long retries: visitors have a button to try again.
        async with AsyncClient(settings.triton, first_token_deadline=45, token_deadline=10, retry_for=3) as client:
            app.state.client, app.state.served, app.state.waiting = client, None, {}
            watch = asyncio.create_task(_watch(app))
            yield
            watch.cancel()

    pages = find_pages()
    rates = RATES | {path: rate for found in pages for path, rate in found.page.rates.items()}
    password_guard = []
    if settings.password:
        password_guard = [Middleware(SignIn, password=settings.password, key=session_key(settings.storage))]
    guards = [
        Middleware(RequestLog),
        Middleware(SecurityHeaders),
        Middleware(TrustedHostMiddleware, allowed_hosts=list(settings.hosts), www_redirect=False),
        Middleware(
            VisitorLimits, rates=rates, streaming="/api/answer", at_once=settings.at_once, in_all=settings.in_all
        ),
        Middleware(SameOrigin),
        *password_guard,
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
    app.state.settings, app.state.pages = settings, pages
    templates = Jinja2Templates(
        env=Environment(
            loader=ChoiceLoader(
                [
                    FileSystemLoader(HERE / "templates"),
                    PrefixLoader({found.name: FileSystemLoader(found.folder) for found in pages}),
                ]
            ),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
    )

    def page(request: Request, name: str, status: int = 200, template: str = "", **values: Any) -> Response:
        served: list[Adapter] | None = getattr(app.state, "served", None)
        shared = {
            "page": name,
            "pages": pages,
            "has_password": bool(settings.password),
            "clean": settings.clean,
            "licences": licences({adapter.licence for adapter in served or []}),
            "served_names": None if served is None else [adapter.name for adapter in served],
        }
        return templates.TemplateResponse(request, template or f"{name}.html", {**shared, **values}, status)

    def page_of(found: FoundPage) -> Callable[[Request], Response]:
        def show(request: Request) -> Response:
            values = {"task": found.page.task, **found.page.values(settings)}
            return page(request, found.name, template=f"{found.name}/page.html", **values)

        return show

    for router in (answers.router, runs.router, *(found.page.router for found in pages)):
        if router:
            app.include_router(router)
    for found in pages:
        for path in {found.path, f"/{found.name}"}:
            app.add_api_route(path, page_of(found), response_class=HTMLResponse)
        if (found.folder / "static").is_dir():
            app.mount(f"/static/{found.name}", StaticFiles(directory=found.folder / "static"))
    app.mount("/static", StaticFiles(directory=HERE / "static"), name="static")
    if not pages:
        app.add_api_route("/", lambda: RedirectResponse("/runs"), response_class=RedirectResponse)

    @app.get("/runs")
    async def runs_page(request: Request) -> Response:
        served, cards = app.state.served, await asyncio.to_thread(finished_runs, settings.runs)
        return page(
            request, "runs", served=served, cards=cards, of_run={(card.task, card.name): card for card in cards}
        )

    @app.get("/api/status")
    async def status() -> dict[str, Any]:
        served: list[Adapter] = app.state.served or []
        adapters = [
            {
                "name": a.name,
                "title": a.title,
                "has_turns": a.has_turns,
                "thinks": a.prompt.has_gemma4_turns,
                "run": a.run,
                "base": a.base,
            }
            for a in served
        ]
        return {"ready": app.state.served is not None, "adapters": adapters}

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"site": "ok"}

    @app.get("/robots.txt")
    def robots() -> Response:
        return PlainTextResponse("User-agent: *\nDisallow: /api/\nDisallow: /runs\n")

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
            sign_in: SignIn = request.scope["sign_in"]
            if not sign_in.is_right(password):
                return page(request, "sign_in", 403, next=_own_path(next), wrong=True)
            response = RedirectResponse(_own_path(next), 303)
            secure = request.url.scheme == "https"
            response.set_cookie(SignIn.COOKIE, sign_in.cookie(), httponly=True, samesite="lax", secure=secure)
            return response

    @app.exception_handler(HTTPException)
    def failed(request: Request, error: HTTPException) -> Response:
        if request.url.path.startswith("/api/"):
            return JSONResponse({"detail": error.detail}, error.status_code, error.headers)
        sentence = "There is no such page." if error.detail == "Not Found" else error.detail
        return page(request, "error", error.status_code, sentence=sentence)

    @app.exception_handler(RequestValidationError)
    def malformed(request: Request, error: RequestValidationError) -> Response:
        # FastAPI's own response repeats the input; this one only says where it is wrong.
        found = [f"{'.'.join(map(str, problem['loc'][1:]))}: {problem['msg']}" for problem in error.errors()[:3]]
        return JSONResponse({"detail": "This request is malformed. " + "; ".join(found)}, 422)

    return app


def licences(served: set[str]) -> dict[str, Licence]:
    """Those of the models that are served; all there are while that is not known, as with a base alone."""
    return {name: licence for name, licence in LICENCES.items() if name in (served or LICENCES)}


async def _watch(app: FastAPI) -> None:
    """Keep `app.state.served` equal to what Triton serves, None while it is not ready, so that no page waits for it."""
    while True:
        client: AsyncClient = app.state.client
        try:
            async with asyncio.timeout(5):
                app.state.served = await client.adapters() if await client.is_ready() else None
        except (ServingError, TimeoutError):
            app.state.served = None
        await asyncio.sleep(WATCH)


def _own_path(path: str) -> str:
    """`path` if it is on this site, else the front page: signing in never redirects to another site."""
    return path if path.startswith("/") and not path.startswith(("//", "/\\")) and path.isprintable() else "/"


class RequestLog:
    """Logs one line per request, without body and query, so never what was asked."""

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
