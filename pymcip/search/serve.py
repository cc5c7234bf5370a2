"""`pymcip serve`: a page and a JSON API to search an index with, over HTTP.

Only images of the index are served, by their row. On loopback only requests to a loopback name are
answered (another site's name may lead here); elsewhere every request needs the token.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import secrets
import socket
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pymcip
from pymcip.configs import ServeConfig
from pymcip.errors import ConfigError, MissingDependencyError, PymcipError
from pymcip.search.gallery import Gallery
from pymcip.search.index import Index

PAGE = Path(__file__).parent / "page"
FILES = {
    "/": "index.html",
    "/page.css": "page.css",
    "/page.js": "page.js",
    "/openapi.json": "openapi.json",
}
MOST_BYTES = 20 << 20  # of a picture that is sent
MOST_TEXT = 1_000  # characters
SECONDS = 30  # until a request is given up: for reading a picture, and for the answer
COOKIE = "pymcip_token"
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src "
    "'self'; img-src 'self' blob: data:; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}

_log = logging.getLogger("pymcip.search")


def serve(config: ServeConfig) -> str:
    """Serve an index until the process is interrupted.

    Raises:
        MissingDependencyError: Starlette or uvicorn is not installed.
        ConfigError: the address can't be listened on.
        DataError: the baseline holds other images.
        What `Index` raises.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise _missing(error) from error
    token = config.token
    if token is None and not is_loopback(config.host):
        token = secrets.token_urlsafe(24)
    baseline = None if config.baseline is None else Index(config.baseline, device=config.device)
    gallery = Gallery(Index(config.index, device=config.device), baseline)
    application = make_application(gallery, token)
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        listening = socket.create_server((config.host, config.port), family=family)
    except OSError as error:
        raise ConfigError(
            f"host={config.host!r}, port={config.port} can't be listened on: {error.strerror or error}; "
            "give another port, or 0 for a free one"
        ) from error
    # asyncio sets it on sockets that name their protocol; without it each answer waits 40 ms for an
    # acknowledgement. Connections have it from this socket.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    name = f"[{config.host}]" if ":" in config.host else config.host
    address = f"http://{name}:{listening.getsockname()[1]}/" + (f"?token={token}" if token else "")
    print(f"{len(gallery.index)} images: {address}", flush=True)
    options = uvicorn.Config(
        application, access_log=False, log_level="warning", server_header=False,
        limit_concurrency=512, timeout_graceful_shutdown=3, ws="none", lifespan="off",
    )  # fmt: skip
    uvicorn.Server(options).run(sockets=[listening])
    return ""


def is_loopback(host: str) -> bool:
    """Whether a host name or address is of this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def make_application(gallery: Gallery, token: str | None = None) -> Callable[..., Any]:
    """Make the ASGI application of a gallery.

    Args:
        gallery: what is searched.
        token: what every request must bring, but for /health; None: only requests to a loopback name
            are answered.

    Raises:
        MissingDependencyError: Starlette is not installed.
    """
    try:
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.requests import Request
        from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
        from starlette.routing import Route
    except ImportError as error:
        raise _missing(error) from error

    counts: Counter[tuple[str, int]] = Counter()
    seconds = {"sum": 0.0, "count": 0}
    searching, drawing = ThreadPoolExecutor(1), ThreadPoolExecutor(2)
    reading = asyncio.Semaphore(8)  # pictures that are received at a time: they take memory
    files = {
        path: ((PAGE / name).read_bytes(), KINDS[Path(name).suffix]) for path, name in FILES.items()
    }

    async def done(pool: ThreadPoolExecutor, function: Callable[[], Any]) -> Any:
        """The result of a function in a pool; 503 if it takes too long, in the queue or there."""
        try:
            return await asyncio.wait_for(
                asyncio.get_running_loop().run_in_executor(pool, function), SECONDS
            )
        except asyncio.TimeoutError:
            raise HTTPException(503, "the server is busy; try again later") from None

    async def picture_of(request: Request) -> bytes | None:
        async def received() -> bytes:
            content = bytearray()
            async for piece in request.stream():
                content += piece
                if len(content) > MOST_BYTES:
                    raise HTTPException(
                        413, f"a picture of at most {MOST_BYTES >> 20} MiB is allowed"
                    )
            return bytes(content)

        if int(request.headers.get("content-length", 0)) > MOST_BYTES:
            raise HTTPException(413, f"a picture of at most {MOST_BYTES >> 20} MiB is allowed")
        try:
            async with reading:
                return await asyncio.wait_for(received(), SECONDS) or None
        except asyncio.TimeoutError:
            raise HTTPException(408, "the picture takes too long to arrive") from None

    async def search(request: Request) -> Response:
        query = _parsed(request.query_params)
        if request.method == "POST":
            query["picture"] = await picture_of(request)
        started = time.perf_counter()
        found = await done(searching, lambda: gallery.search(**query))
        seconds["sum"] += time.perf_counter() - started
        seconds["count"] += 1
        return JSONResponse(found, headers={"cache-control": "no-store"})

    async def thumbnail(request: Request) -> Response:
        row = _parsed({"row": request.path_params["row"]})["row"]
        try:
            content = await done(drawing, lambda: gallery.thumbnail(row))
        except PymcipError as error:
            raise HTTPException(404, str(error)) from error
        kept = (
            "private, max-age=86400, immutable" if "content" in request.query_params else "no-store"
        )
        return Response(content, media_type="image/jpeg", headers={"cache-control": kept})

    async def metrics(request: Request) -> Response:
        lines = ["# TYPE pymcip_images gauge", f"pymcip_images {len(gallery.index)}"]
        lines += ["# TYPE pymcip_requests_total counter"]
        for (name, status), count in sorted(counts.items()):
            lines.append(f'pymcip_requests_total{{endpoint="{name}",status="{status}"}} {count}')
        lines += ["# TYPE pymcip_search_seconds summary"]
        lines += [f"pymcip_search_seconds_{name} {value:g}" for name, value in seconds.items()]
        return PlainTextResponse("\n".join(lines) + "\n")

    async def about(request: Request) -> Response:
        return JSONResponse({**gallery.about(), "version": pymcip.__version__})

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def file(request: Request) -> Response:
        content, kind = files[request.url.path]
        return Response(content, media_type=kind, headers={"cache-control": "no-cache"})

    async def failed(request: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 400)
        return JSONResponse({"error": getattr(error, "detail", str(error))}, status)

    async def broken(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": "an error inside the server; its log says which"}, 500)

    routes = [
        *(Route(path, file) for path in FILES),
        Route("/api/about", about),
        Route("/api/search", search, methods=["GET", "POST"]),
        Route("/thumbnails/{row}", thumbnail),
        Route("/health", health),
        Route("/metrics", metrics),
    ]
    handlers: dict[Any, Any] = {HTTPException: failed, PymcipError: failed, Exception: broken}
    inner = Starlette(routes=routes, exception_handlers=handlers)

    def refusal(request: Request) -> Response | None:
        if token is None:
            name = urlsplit("//" + request.headers.get("host", "")).hostname or ""
            if not is_loopback(name):
                return JSONResponse({"error": f"this server is not {name!r}"}, 421)
            return None
        if request.url.path == "/health":
            return None
        linked = request.query_params.get("token")
        if request.url.path == "/" and linked is not None and _same(linked, token):
            answer = RedirectResponse("/", 303)
            answer.set_cookie(COOKIE, token, httponly=True, samesite="strict")
            return answer
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if _same(given or request.cookies.get(COOKIE, ""), token):
            return None
        return JSONResponse({"error": "open the page by its link, which has a token"}, 401)

    async def application(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await inner(scope, receive, send)
            return

        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                endpoint = getattr(scope.get("endpoint"), "__name__", "none")
                counts[endpoint, message["status"]] += 1
                message["headers"] += [
                    (key.encode(), value.encode()) for key, value in HEADERS.items()
                ]
            await send(message)

        request = Request(scope)
        try:
            answer = refusal(request)
        except ValueError:  # a Host header that is none
            answer = JSONResponse({"error": "the Host header is not valid"}, 400)
        await (answer or inner)(scope, receive, sending)

    return application


KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
}


def _parsed(given: Any) -> dict[str, Any]:
    """The arguments of `Gallery.search` in a query string.

    Raises:
        ConfigError: one is unknown, or no number where it must be one.
    """
    kinds: dict[str, type] = {
        "text": str, "row": int, "weight": float, "strength": float, "offset": int, "limit": int,
    }  # fmt: skip
    query: dict[str, Any] = {}
    for name, value in given.items():
        if name not in kinds:
            raise ConfigError(f"{name}= is not allowed; allowed: {', '.join(kinds)}")
        if len(value) > MOST_TEXT:
            raise ConfigError(f"{name}= is too long; at most {MOST_TEXT} characters are allowed")
        try:
            query[name] = kinds[name](value)
        except ValueError as error:
            raise ConfigError(f"{name}={value!r} is not allowed; it must be a number") from error
    if not str(query.get("text", "x")).strip():
        del query["text"]
    return query


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(), token.encode())


def _missing(error: ImportError) -> MissingDependencyError:
    return MissingDependencyError(
        f"pymcip serve needs the extra 'serve': pip install 'pymcip[serve]' ({error})"
    )
