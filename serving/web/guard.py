"""Middleware between the internet and the pages: security headers, request limits, CSRF protection and the password.

Each class is an ASGI middleware; app.py decides their order. FastAPI's max_body_size limits bodies, and Starlette's
TrustedHostMiddleware host names.
"""

import hmac
import time
from collections import Counter
from hashlib import sha256
from http.cookies import SimpleCookie
from urllib.parse import quote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.rate_limit import Rate, RateLimiter, client_of

# No inline script or style, nothing from other sites; trusted-types: none of our scripts can turn text into markup.
CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
# For a file that another program wrote (a report, a picture): it gets an origin of its own and runs no scripts.
SANDBOX = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"
HEADERS = {
    "content-security-policy": CONTENT_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",  # "no-referrer" would remove the origin of the sign-in form, too
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "cache-control": "private, no-cache",
}
SESSION = 7 * 24 * 3600  # seconds that a sign-in lasts
OPEN = ("/sign-in", "/static/", "/robots.txt", "/health")  # paths that need no password


class SecurityHeaders:
    """Adds those of `HEADERS` that a response does not set itself."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, with_headers)


class VisitorLimits:
    """Refuses, with 429, clients that send too many requests or have too many answers streaming.

    Args:
        rates: path → its rate, for POST requests; "" applies to every request.
        streaming: the path whose requests count as answers.
        at_once: answers that may stream to one client at a time; `in_all`: to all clients together, else 503.
    """

    def __init__(self, app: ASGIApp, rates: dict[str, Rate], streaming: str, at_once: int, in_all: int) -> None:
        self._app, self._rates, self._streaming = app, rates, streaming
        self._at_once, self._in_all = at_once, in_all
        self._limiter = RateLimiter()
        self._running: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        client, path, posted = client_of(scope), scope["path"], scope["method"] == "POST"
        limits = [""] + [path] * (posted and path in self._rates)
        wait = max(self._limiter.take(f"{client} {limit}", self._rates[limit]) for limit in limits)
        if wait > 0:
            said = f"Too many requests. Try again in {_seconds(wait)}."
            return await refuse(scope, 429, said, wait)(scope, receive, send)
        if not posted or path != self._streaming:
            return await self._app(scope, receive, send)
        if self._running[client] >= self._at_once:
            said = "Your earlier answers are still being written. Stop one of them, or wait until it is done."
            return await refuse(scope, 429, said, 2)(scope, receive, send)
        if self._running.total() >= self._in_all:
            said = "Many people are asking right now. Try again in a few seconds."
            return await refuse(scope, 503, said, 5)(scope, receive, send)
        self._running[client] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._running[client] -= 1
            self._running += Counter()  # forgets those at zero


class SameOrigin:
    """Refuses, with 403, requests that change something and do not come from a page of this site (CSRF).

    Browsers send the page's origin with every such request; other programs have to send it, too.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            headers = Headers(scope=scope)
            origin = urlsplit(headers.get("origin", "")).netloc
            if not origin or origin != headers.get("host"):
                return await refuse(scope, 403, "This request did not come from a page of this site.")(
                    scope, receive, send
                )
        await self._app(scope, receive, send)


class HeadAsGet:
    """Handles HEAD like GET; the server omits the body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_head = scope["type"] == "http" and scope["method"] == "HEAD"
        await self._app({**scope, "method": "GET"} if is_head else scope, receive, send)


class SignIn:
    """Requires the password. The cookie is signed with `key` and the password, so a new password ends all sessions."""

    COOKIE = "session"

    def __init__(self, app: ASGIApp, password: str, key: bytes) -> None:
        self._app, self._password = app, password.encode()
        self._key = hmac.digest(key, b"session " + self._password, sha256)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # The sign-in page checks the password and gets the cookie through the scope.
        scope["sign_in"] = self
        path = scope.get("path", "")
        if scope["type"] != "http" or path.startswith(OPEN) or self._signed_in(scope):
            return await self._app(scope, receive, send)
        if path.startswith("/api/"):
            return await refuse(scope, 401, "Sign in first: reload the page.")(scope, receive, send)
        await RedirectResponse(f"/sign-in?next={quote(path, safe='/')}", 303)(scope, receive, send)

    def is_right(self, password: str) -> bool:
        return hmac.compare_digest(
            hmac.digest(self._key, password.encode(), sha256), hmac.digest(self._key, self._password, sha256)
        )

    def cookie(self) -> str:
        until = str(int(time.time()) + SESSION)
        return f"{until}.{hmac.digest(self._key, until.encode(), sha256).hex()}"

    def _signed_in(self, scope: Scope) -> bool:
        until, _, signature = cookie_of(scope, self.COOKIE).partition(".")
        right = hmac.digest(self._key, until.encode(), sha256).hex()
        return hmac.compare_digest(right.encode(), signature.encode()) and until.isdigit() and int(until) > time.time()


def cookie_of(scope: Scope, name: str) -> str:
    cookies: SimpleCookie = SimpleCookie()
    try:
        cookies.load(Headers(scope=scope).get("cookie", ""))
    except Exception:  # whatever a stranger sends
        return ""
    return cookies[name].value if name in cookies else ""


def refuse(scope: Scope, status: int, sentence: str, wait: float = 0) -> Response:
    """A refusal in one sentence, in the form that the site's scripts or a visitor can read."""
    headers = {"retry-after": str(max(1, round(wait)))} if wait else None
    if scope["path"].startswith("/api/"):
        return JSONResponse({"detail": sentence}, status, headers)
    return PlainTextResponse(sentence, status, headers)


def _seconds(wait: float) -> str:
    return "a second" if wait < 1.5 else f"{round(wait)} seconds"
