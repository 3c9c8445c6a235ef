"""What stands between the internet and the pages: security headers, limits, same-origin changes and the password.

Each class is an ASGI middleware of its own; app.py says in which order they stand. Bodies are bounded by FastAPI's
max_body_size and hosts by Starlette's TrustedHostMiddleware.
"""

import hmac
import ipaddress
import time
from collections import Counter, OrderedDict
from hashlib import sha256
from http.cookies import SimpleCookie
from typing import NamedTuple
from urllib.parse import quote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# No inline script or style, nothing from elsewhere; trusted-types: no text becomes markup in a script of ours.
CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
# A file that another program wrote (a report, a picture): shown, in an origin of its own, with no script whatever.
SANDBOX = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"
HEADERS = {
    "content-security-policy": CONTENT_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",  # "no-referrer" would take the origin from the sign-in form too
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "cache-control": "private, no-cache",
}
CLIENTS = 10_000  # remembered at most; the longest unseen is forgotten
SESSION = 7 * 24 * 3600  # seconds that a sign-in lasts
OPEN = ("/sign-in", "/static/", "/robots.txt", "/health")  # without the password


class SecurityHeaders:
    """Adds `HEADERS` where a response does not say otherwise."""

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


class Rate(NamedTuple):
    """`burst` requests at once, and `per_minute` over time."""

    per_minute: float
    burst: float


class Limits:
    """Refuses with 429 a client that asks too often, or for too many answers at once.

    Args:
        rates: path → its rate, for POST requests; "" is that of every request.
        streaming: the path whose requests count as answers.
        at_once: answers that one client may have on their way; `in_all`: all clients together, else 503.
    """

    def __init__(self, app: ASGIApp, rates: dict[str, Rate], streaming: str, at_once: int, in_all: int) -> None:
        self._app, self._rates, self._streaming = app, rates, streaming
        self._at_once, self._in_all = at_once, in_all
        self._buckets: OrderedDict[tuple[str, str], tuple[float, float]] = OrderedDict()  # → tokens, when
        self._running: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        client, path, posted = client_of(scope), scope["path"], scope["method"] == "POST"
        limits = [""] + [path] * (posted and path in self._rates)
        wait = max(self._take(client, limit) for limit in limits)
        if wait > 0:
            said = f"That was a lot of requests. Try again in {_seconds(wait)}."
            return await refuse(scope, 429, said, wait)(scope, receive, send)
        if not posted or path != self._streaming:
            return await self._app(scope, receive, send)
        if self._running[client] >= self._at_once:
            said = "Answers to you are still on their way. Stop one of them, or wait until it is done."
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

    def _take(self, client: str, limit: str) -> float:
        """One request's worth from the client's bucket: 0, or the seconds until it holds one."""
        rate, now, key = self._rates[limit], time.monotonic(), (client, limit)
        tokens, then = self._buckets.pop(key, (rate.burst, now))
        tokens = min(rate.burst, tokens + (now - then) * rate.per_minute / 60)
        self._buckets[key] = (tokens - 1 if tokens >= 1 else tokens), now
        if len(self._buckets) > CLIENTS:
            self._buckets.popitem(last=False)
        return 0.0 if tokens >= 1 else (1 - tokens) * 60 / rate.per_minute


def client_of(scope: Scope) -> str:
    """Whose limits count: an IPv4 address, or the /64 that one IPv6 customer has."""
    host = scope["client"][0] if scope.get("client") else ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    return str(ipaddress.ip_network(f"{host}/64", strict=False)) if address.version == 6 else host


class SameOrigin:
    """Refuses with 403 what changes something and does not come from a page of this site (CSRF).

    Browsers name the page's origin in every such request; programs that are no browser have to name it too.
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
    """Answers HEAD as the GET that the pages know; the server leaves the body out."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_head = scope["type"] == "http" and scope["method"] == "HEAD"
        await self._app({**scope, "method": "GET"} if is_head else scope, receive, send)


class SignIn:
    """Lets nobody past without the password. The cookie is signed with `key` and the password: a new one ends all."""

    COOKIE = "session"

    def __init__(self, app: ASGIApp, password: str, key: bytes) -> None:
        self._app, self._password = app, password.encode()
        self._key = hmac.digest(key, b"session " + self._password, sha256)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # The sign-in page asks whether the password is right, and for the cookie, through the scope.
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
    """A refusal in words, as the site's scripts or a visitor read it."""
    headers = {"retry-after": str(max(1, round(wait)))} if wait else None
    if scope["path"].startswith("/api/"):
        return JSONResponse({"detail": sentence}, status, headers)
    return PlainTextResponse(sentence, status, headers)


def _seconds(wait: float) -> str:
    return "a second" if wait < 1.5 else f"{round(wait)} seconds"
