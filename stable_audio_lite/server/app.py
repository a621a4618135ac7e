"""The service over HTTP: a request becomes a job, a job's sounds are fetched or streamed, and every error is one line.

    POST   /v1/generations                           JSON, or multipart with the parts `request` and `sound`
    GET    /v1/generations/{id}                      state and progress
    DELETE /v1/generations/{id}                      cancels it
    GET    /v1/generations/{id}/sounds/{item}        a sound that is done
    GET    /v1/generations/{id}/sounds/{item}/stream a sound as it is decoded
    GET    /v1/models, /health, /metrics, /openapi.json

Requests are checked against the model, without its weights, before they are queued. No name in them is that of a file,
and of what they send, nothing outlives the answer but in memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import http
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any, BinaryIO, NamedTuple, TypeVar

from fastapi import Depends, FastAPI, HTTPException, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as ASGIMessage

from stable_audio_lite import __version__
from stable_audio_lite.command import explained
from stable_audio_lite.errors import UserError
from stable_audio_lite.server.jobs import Job, Jobs, NoJob, QueueFull, Stopping
from stable_audio_lite.server.messages import (
    EditRequest,
    GenerationAnswer,
    GenerationRequest,
    HealthAnswer,
    ModelsAnswer,
    Problem,
    ServiceLimits,
    request_schemas,
)
from stable_audio_lite.server.metrics import CountAnswers, Metrics
from stable_audio_lite.server.sounds import MEDIA_TYPES, SoundFormat, SoundStream, encode_sound, read_sound

_SCHEMAS = "#/components/schemas/{model}"
_JSON_BYTES = 64 << 10
_BODY_SECONDS = 120.0  # that a request may take to arrive
_DECODED_AT_ONCE = 4  # sounds in memory on their way to the queue
_POLL_SECONDS = 0.02  # between two looks at a job that somebody waits for
_RETRY_SECONDS = 5  # after which another process may have taken a stopping one's place

_Wanted = TypeVar("_Wanted", GenerationRequest, EditRequest)

Identity = Annotated[str, Path(max_length=100, description="of the job")]
ItemNumber = Annotated[int, Path(ge=0, le=1000, description="number of the sound, from 0 on")]
Wait = Annotated[float, Query(ge=0, le=60, description="seconds to wait for its end before answering")]
Format = Annotated[SoundFormat, Query(description="opus comes in Ogg, at 48 kHz")]

Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]


def create_app(jobs: Jobs, limits: ServiceLimits | None = None, token: str | None = None) -> FastAPI:
    """Build the service on a queue; with a `token`, all but /health asks for it as a bearer token."""
    limits = limits or ServiceLimits()
    about: dict[str, Any] = {"title": "Stable Audio Lite", "version": __version__, "docs_url": None, "redoc_url": None}
    app = FastAPI(**about, generate_unique_id_function=lambda route: route.name)  # what generated clients call them
    metrics, decoding = Metrics(jobs), asyncio.Semaphore(_DECODED_AT_ONCE)
    app.add_middleware(_BreakOff)
    app.add_middleware(CountAnswers, metrics=metrics)
    _add_error_handlers(app)
    guard = [Depends(_bearer(token))] if token else []
    failures = _failures(400, *([401] if token else []))

    @app.post(
        "/v1/generations",
        status_code=202,
        dependencies=guard,
        responses=failures(403, 408, 413, 415, 422, 429, 503),
        openapi_extra={"requestBody": _request_body()},
    )
    async def generate(request: Request, response: Response, wait: Wait = 0) -> GenerationAnswer:
        """Queue a request for sounds."""
        if request.headers.get("sec-fetch-site") == "cross-site":  # a form of any page can be sent here by a browser
            raise HTTPException(403, "pages of other sites may not ask this server; ask from a program")
        async with _received(request, limits) as wanted, decoding:
            job = await run_in_threadpool(_submit, jobs, wanted, limits)
        response.headers["Location"] = f"/v1/generations/{job.id}"
        return await _answer(jobs, job, wait)

    @app.get("/v1/generations/{identity}", dependencies=guard, responses=failures(404, 410))
    async def look(identity: Identity, wait: Wait = 0) -> GenerationAnswer:
        """Tell how far a job is."""
        return await _answer(jobs, jobs.get(identity), wait)

    @app.delete("/v1/generations/{identity}", dependencies=guard, responses=failures(404, 410))
    async def cancel(identity: Identity) -> GenerationAnswer:
        """Cancel a job, between two sampling steps where it runs; one that has ended stays as it is."""
        return await _answer(jobs, jobs.cancel(identity), 0)

    @app.get(
        "/v1/generations/{identity}/sounds/{item}",
        dependencies=guard,
        response_class=Response,
        responses={**_sounds("The sound."), **failures(404, 409, 410)},
    )
    async def sound(identity: Identity, item: ItemNumber, format: Format = "wav") -> Response:
        """Fetch a sound of a job that is done, its settings inside."""
        job = _job_with(jobs, identity, item)
        if job.state != "done":
            raise HTTPException(409, _unready(job))
        body = await run_in_threadpool(encode_sound, job, item, format)
        job.collected = True
        return Response(body, media_type=MEDIA_TYPES[format])

    @app.get(
        "/v1/generations/{identity}/sounds/{item}/stream",
        dependencies=guard,
        response_class=StreamingResponse,
        responses={**_sounds("The sound, in pieces."), **failures(404, 409, 410)},
    )
    async def stream(identity: Identity, item: ItemNumber, format: Format = "wav") -> StreamingResponse:
        """Fetch a sound from its beginning while it is made; what is too loud is turned down from there on."""
        job = _job_with(jobs, identity, item)
        while not job.pieces(item) and not job.ended:
            await asyncio.sleep(_POLL_SECONDS)
        if not job.pieces(item):
            raise HTTPException(409, _unready(job))
        return StreamingResponse(_streamed(job, item, format), media_type=MEDIA_TYPES[format])

    @app.get("/v1/models", dependencies=guard, responses=failures())
    async def models() -> ModelsAnswer:
        """List the models, and the most that one request may ask for."""
        return ModelsAnswer.of(jobs, limits)

    @app.head("/health", include_in_schema=False)
    @app.get("/health", responses=_failures(400)(503))
    async def health() -> HealthAnswer:
        """Tell whether this process takes requests; 503 where it is stopping."""
        if jobs.stopping:
            raise Stopping("the server is stopping")
        device = str(jobs.store.device)
        return HealthAnswer(state="ok", version=__version__, device=device, waiting=jobs.waiting, running=jobs.running)

    @app.get(
        "/metrics",
        dependencies=guard,
        response_class=Response,
        responses={
            200: {"description": "Metrics.", "content": {"text/plain": {"schema": {"type": "string"}}}},
            **failures(),
        },
    )
    async def show_metrics() -> Response:
        """Tell counts and times in Prometheus' text format."""
        return Response(metrics.text(), media_type=metrics.media_type)

    _describe_requests(app, request_schemas(jobs.store, limits, _SCHEMAS))
    return app


def _submit(jobs: Jobs, wanted: GenerationRequest | _Upload, limits: ServiceLimits) -> Job:
    request = wanted if isinstance(wanted, GenerationRequest) else wanted.request
    choice = jobs.store.choose(request.model, request.lora, request.lora_strength)
    outline = jobs.store.outline(choice)
    if isinstance(wanted, GenerationRequest):
        return jobs.submit(choice, wanted.plan(outline, limits))
    sound = read_sound(wanted.sound.read(), outline.sample_rate, limits.seconds)
    return jobs.submit(choice, wanted.request.plan(outline, limits, sound))


class _Upload(NamedTuple):
    request: EditRequest
    sound: BinaryIO


async def _answer(jobs: Jobs, job: Job, wait: float) -> GenerationAnswer:
    last = time.monotonic() + wait
    while not job.ended and time.monotonic() < last:
        await asyncio.sleep(_POLL_SECONDS)
    if job.state in ("failed", "cancelled"):
        job.collected = True
    return GenerationAnswer.of(jobs, job)


def _job_with(jobs: Jobs, identity: str, item: int) -> Job:
    job = jobs.get(identity)
    if item >= job.items:
        raise NoJob(f"job {identity}: has no sound {item}, they are 0 to {job.items - 1}", gone=False)
    return job


def _unready(job: Job) -> str:
    if job.state == "failed":
        return f"job {job.id}: failed ({job.error})"
    return f"job {job.id}: is {job.state}, so there is no sound" + ("; wait for it" if not job.ended else "")


class _BrokenOff(Exception):
    """Ends an answer that has begun, and that its client is to see break off."""


class _BreakOff:
    """ASGI middleware that ends broken answers; the server then closes the connection."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(_BrokenOff):
            await self._app(scope, receive, send)


async def _streamed(job: Job, item: int, kind: SoundFormat) -> AsyncIterator[bytes]:
    encoder, number = SoundStream(kind, job.sample_rate, job.pieces(item)[0].shape[0]), 0
    while True:
        ended = job.ended  # before the look at the pieces: there are no more then
        for piece in job.pieces(item, number):
            number += 1
            if data := await run_in_threadpool(encoder.encode, piece):
                yield data
        if ended:
            break
        await asyncio.sleep(_POLL_SECONDS)
    if job.state != "done":
        raise _BrokenOff(_unready(job))
    yield await run_in_threadpool(encoder.end)
    job.collected = True


@contextlib.asynccontextmanager
async def _received(request: Request, limits: ServiceLimits) -> AsyncIterator[GenerationRequest | _Upload]:
    """Receive what is asked for, and where a sound is sent, that as an open file.

    Raises:
        HTTPException: the body is too long, too slow or of another type, or not what it says.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    multipart = kind == "multipart/form-data"
    if not multipart and kind != "application/json":
        raise HTTPException(415, f"Content-Type must be application/json or multipart/form-data, got {kind[:80]!r}")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise HTTPException(415, "Content-Encoding: send the body as it is, not compressed")
    limit = _JSON_BYTES + (limits.upload_bytes if multipart else 0)
    limited = Request(request.scope, _limited(request, limit))
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            if not multipart:
                body = await limited.body()
            else:
                form = await limited.form(max_files=1, max_fields=1, max_part_size=_JSON_BYTES)
    except TimeoutError as error:
        raise HTTPException(408, f"the body took more than {_BODY_SECONDS:g} s to arrive; send it again") from error
    if not multipart:
        yield _parsed(GenerationRequest, body)
        return
    try:
        if unknown := sorted(set(form) - {"request", "sound"}):
            raise HTTPException(400, f"parts are `request` and `sound`, got {unknown[0][:80]!r}")
        text, sound = form.get("request"), form.get("sound")
        if not isinstance(text, str) or not isinstance(sound, UploadFile):
            raise HTTPException(400, "give a part `request`, as JSON, and a part `sound`, with a file name")
        yield _Upload(_parsed(EditRequest, text.encode("utf-8", "surrogatepass")), sound.file)
    finally:
        await form.close()


def _limited(request: Request, limit: int) -> Receive:
    """Receive a body up to its limit, whatever its headers say."""
    message = f"the body is longer than {limit} bytes; send less"
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > limit:
        raise HTTPException(413, message)
    received = 0

    async def receive() -> ASGIMessage:
        nonlocal received
        part = await request.receive()
        received += len(part.get("body", b""))
        if received > limit:
            raise HTTPException(413, message)
        return part

    return receive


def _parsed(kind: type[_Wanted], body: bytes) -> _Wanted:
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise HTTPException(400, _worded(error.errors(include_url=False, include_context=False))) from error


def _worded(errors: Any) -> str:
    """Word the first mistake that pydantic found."""
    first = errors[0]
    place = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path"))[:80]
    text = first["msg"].removeprefix("Value error, ")
    return " ".join(f"{place}: {text}".removeprefix(": ").split())[:300]


def _bearer(token: str) -> Callable[..., None]:
    expected = token.encode()  # headers are bytes, which are read as Latin-1

    def check(given: Credentials) -> None:
        if given is None or not secrets.compare_digest(given.credentials.encode("latin-1", "replace"), expected):
            line = "the token is missing or wrong; send `Authorization: Bearer TOKEN`"
            raise HTTPException(401, line, headers={"WWW-Authenticate": "Bearer"})

    return check


def _add_error_handlers(app: FastAPI) -> None:
    def problem(status: int, detail: str, headers: Any = None) -> Response:
        body = Problem(title=http.HTTPStatus(status).phrase, status=status, detail=detail).model_dump()
        return JSONResponse(body, status, headers, "application/problem+json")

    @app.exception_handler(UserError)
    async def refused(request: Request, error: UserError) -> Response:
        line = explained(error) or ""
        if isinstance(error, QueueFull):
            return problem(429, line, {"Retry-After": str(error.retry_after)})
        if isinstance(error, Stopping):
            return problem(503, line, {"Retry-After": str(_RETRY_SECONDS)})
        if isinstance(error, NoJob):
            return problem(410 if error.gone else 404, line)
        return problem(422, line)

    @app.exception_handler(AnyHTTPException)
    async def wrong(request: Request, error: AnyHTTPException) -> Response:
        detail = " ".join(str(error.detail).split())
        if error.status_code in (404, 405):
            detail = f"{request.method} {request.url.path[:100]}: {detail.lower()}; see /openapi.json"
        headers = {"Allow": ", ".join(_methods(app, request))} if error.status_code == 405 else error.headers
        return problem(error.status_code, detail, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return problem(400, _worded(error.errors()))

    @app.exception_handler(ClientDisconnect)
    async def left(request: Request, error: ClientDisconnect) -> Response:
        return problem(400, "the request broke off")

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return problem(500, "an error inside; the server's log says more")


def _methods(app: FastAPI, request: Request) -> list[str]:
    """List the methods of a path, of which the framework names those of one operation alone."""
    matching = (route for route in app.routes if route.matches(request.scope)[0] != Match.NONE)
    return sorted({method for route in matching for method in getattr(route, "methods", None) or ()})


def _failures(*always: int) -> Callable[..., dict[int | str, dict[str, Any]]]:
    """Describe answers to requests that can't be met, by status: `always`, and those that are given."""
    return lambda *more: {
        status: {"model": Problem, "description": http.HTTPStatus(status).phrase} for status in sorted({*always, *more})
    }


def _sounds(about: str) -> dict[int | str, dict[str, Any]]:
    schema = {"schema": {"type": "string", "format": "binary"}}
    return {200: {"description": about, "content": {kind: schema for kind in MEDIA_TYPES.values()}}}


def _request_body() -> dict[str, Any]:
    """Describe the body in both of its forms."""
    encoding = {"request": {"contentType": "application/json"}, "sound": {"contentType": "application/octet-stream"}}
    return {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": _SCHEMAS.format(model="GenerationRequest")}},
            "multipart/form-data": {"schema": {"$ref": _SCHEMAS.format(model="EditForm")}, "encoding": encoding},
        },
    }


_FORM = {
    "title": "EditForm",
    "type": "object",
    "required": ["request", "sound"],
    "properties": {
        "request": {"$ref": _SCHEMAS.format(model="EditRequest")},
        "sound": {"type": "string", "format": "binary", "title": "Sound", "description": "WAV, FLAC, MP3 or Ogg"},
    },
    "additionalProperties": False,
}


def _describe_requests(app: FastAPI, requests: dict[str, Any]) -> None:
    """Let OpenAPI tell the schemas of requests, and the type and status of errors."""
    build = app.openapi

    def described() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = build()
            schemas = schema["components"]["schemas"]
            schemas |= requests | {"EditForm": _FORM}
            for unused in ("HTTPValidationError", "ValidationError"):
                schemas.pop(unused, None)
            for operation in (operation for path in schema["paths"].values() for operation in path.values()):
                answers = operation["responses"]
                if "HTTPValidationError" in str(answers.get("422")):
                    del answers["422"]  # the framework's own, of parameters, which are answered by 400 here
                for status, answer in answers.items():
                    if int(status) >= 400 and "application/json" in answer.get("content", {}):
                        answer["content"]["application/problem+json"] = answer["content"].pop("application/json")
        return app.openapi_schema or build()

    app.openapi = described  # type: ignore[method-assign]
