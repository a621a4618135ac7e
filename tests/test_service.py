"""The service: what it makes is what the model makes, it refuses in one line, and a stop or a crash loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import numpy as np
import pytest
import soundfile
import torch
import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient

from stable_audio_lite import cli
from stable_audio_lite.audio.decoding import Stored
from stable_audio_lite.audio.io import encode_audio, read_audio, read_metadata
from stable_audio_lite.errors import UserError
from stable_audio_lite.pipeline import Plan, StableAudio
from stable_audio_lite.server import host
from stable_audio_lite.server.app import create_app
from stable_audio_lite.server.host import open_socket
from stable_audio_lite.server.jobs import Bounds, Jobs
from stable_audio_lite.server.messages import ServiceLimits
from stable_audio_lite.server.models import ModelStore
from stable_audio_lite.server.sounds import SoundStream, read_sound

ROOT = Path(__file__).parents[1]
ASK = {"prompt": "piano", "seconds": 0.2, "steps": 2, "seed": 1}
LIMITS = ServiceLimits(seconds=10, steps=100, count=4, upload_bytes=500_000)


@pytest.fixture
def serve(store: ModelStore) -> Iterator[Callable[..., TestClient]]:
    """Start services, which end with the test."""
    running: list[Jobs] = []

    def start(token: str | None = None, **bounds: Any) -> TestClient:
        running.append(Jobs(store, Bounds(**bounds)))
        client = TestClient(create_app(running[-1], LIMITS, token), raise_server_exceptions=False)
        client.jobs = running[-1]  # type: ignore[attr-defined]
        return client

    yield start
    for jobs in running:
        jobs.close()


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """An event before which nothing is sampled."""
    opened, render = threading.Event(), StableAudio.render

    def wait(model: StableAudio, plan: Plan, batch: int, progress: Any) -> Any:
        assert opened.wait(60)
        return render(model, plan, batch, progress)

    monkeypatch.setattr(StableAudio, "render", wait)
    return opened


def wav(seconds: float = 0.5, channels: int = 2, rate: int = 44100, prompt: str = "") -> bytes:
    """A tone that swells."""
    ramp = np.arange(round(seconds * rate)) / rate
    buffer = io.BytesIO()
    soundfile.write(buffer, np.tile((0.3 * ramp * np.sin(2764 * ramp))[:, None], channels), rate, format="WAV")
    return buffer.getvalue()


def read(body: bytes) -> torch.Tensor:
    return read_audio(Stored("answer", lambda: io.BytesIO(body)))


def made(client: TestClient, ask: dict[str, Any] = ASK, sound: bytes | None = None) -> dict[str, Any]:
    """The job of a request, when it has ended."""
    if sound is None:
        answer = client.post("/v1/generations?wait=60", json=ask)
    else:
        parts = {"request": (None, json.dumps(ask), "application/json"), "sound": ("a.wav", sound, "audio/wav")}
        answer = client.post("/v1/generations?wait=60", files=parts)
    assert answer.status_code == 202, answer.text
    job = answer.json()
    assert answer.headers["location"] == f"/v1/generations/{job['id']}"
    return ended(client, job)


def ended(client: TestClient | httpx.Client, job: dict[str, Any]) -> dict[str, Any]:
    """The job when it has ended, however slow the machine."""
    while job["state"] in ("queued", "running"):
        job = client.get(f"/v1/generations/{job['id']}?wait=60").json()
    return job


def line_of(answer: httpx.Response, status: int) -> str:
    """The one line of a request that was refused."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == status and problem["title"] and set(problem) == {"type", "title", "status", "detail"}
    assert problem["detail"] and "\n" not in problem["detail"] and len(problem["detail"]) < 500
    return problem["detail"]


def test_sounds_are_those_of_the_model_in_each_format(serve: Callable[..., TestClient], store: ModelStore) -> None:
    client = serve()
    job = made(client, ASK | {"count": 2})
    assert (job["state"], job["progress"], job["error"], len(job["sounds"])) == ("done", 1, None, 2)
    expected = store.load(store.choose()).generate("piano", seconds=0.2, steps=2, seed=1, count=2)
    assert [sound["settings"] for sound in job["sounds"]] == expected.settings
    for item, sound in enumerate(job["sounds"]):
        whole = expected.audio[item] / max(float(expected.audio[item].abs().max()), 1)
        for kind, within in (("wav", 1e-4), ("flac", 1e-4), ("opus", 0.5)):
            answer = client.get(sound["address"], params={"format": kind})
            assert answer.status_code == 200 and answer.headers["content-type"].startswith("audio/")
            body = Stored("answer", lambda answer=answer: io.BytesIO(answer.content))
            assert read_metadata(body).settings == sound["settings"]
            torch.testing.assert_close(read(answer.content), whole, atol=within, rtol=0)
        streamed = client.get(sound["stream"], params={"format": "flac"})
        assert read(streamed.content).shape == whole.shape and "content-length" not in streamed.headers


def test_sound_goes_in_for_variations_gaps_and_continuations(serve: Callable[..., TestClient], store) -> None:
    client, source = serve(), wav()
    ask = {"prompt": "piano", "steps": 2, "seed": 1}
    edits = {
        "variation": ({"strength": 0.0}, 22050),
        "inpainting": ({"stretches": [{"start": 0.1, "end": 0.3}]}, 22050),
        "continuation": ({}, 22050 + 8820),
    }
    sounds = {}
    for kind, (settings, samples) in edits.items():
        more = {"seconds": 0.2} if kind == "continuation" else {}
        job = made(client, ask | more | {"edit": {"kind": kind} | settings}, source)
        assert job["state"] == "done", job
        sounds[kind] = read(client.get(job["sounds"][0]["address"]).content)
        assert sounds[kind].shape == (2, samples)
    given = read_sound(source, 44100, 10).audio
    torch.testing.assert_close(sounds["continuation"][:, :22050], given, atol=1e-4, rtol=0)
    torch.testing.assert_close(sounds["inpainting"][:, 17000:], given[:, 17000:], atol=1e-4, rtol=0)
    assert not torch.allclose(sounds["inpainting"][:, 6000:12000], given[:, 6000:12000], atol=1e-2)
    loop = made(client, ask | {"prompt": "piano, 400 bpm", "edit": {"kind": "loop", "bars": 1}})
    assert loop["sounds"][0]["settings"]["seconds"] == 0.6


def test_the_prompt_inside_a_sound_is_used_where_none_is_given(serve: Callable[..., TestClient]) -> None:
    client = serve()
    first = made(client, ASK | {"prompt": "warm piano", "seconds": 0.4})
    sound = client.get(first["sounds"][0]["address"]).content
    job = made(client, {"steps": 2, "edit": {"kind": "variation"}}, sound)
    assert job["sounds"][0]["settings"]["prompt"] == "warm piano"
    assert job["sounds"][0]["settings"]["init"] == "sound"


def test_prompts_of_any_characters_come_back_in_each_format(serve: Callable[..., TestClient]) -> None:
    """One inside a sound is bounded like one that is sent."""
    client = serve()
    for prompt in ("a\0b", "two\nlines = ; \t", "\U0001f3b9" * 50, "\u202e]]>"):
        job = made(client, ASK | {"prompt": prompt})
        for kind in ("wav", "flac", "opus"):
            body = client.get(job["sounds"][0]["address"], params={"format": kind}).content
            assert read_metadata(Stored("answer", lambda body=body: io.BytesIO(body))).settings["prompt"] == prompt
    long = encode_audio(read(body).numpy(), 44100, ".wav", {"prompt": "a" * 2001})
    parts = {"request": (None, json.dumps({"edit": {"kind": "variation"}})), "sound": ("a.wav", long)}
    assert "at most 2000 characters here, got 2001" in line_of(client.post("/v1/generations", files=parts), 422)


def test_pages_of_other_sites_can_t_ask(serve: Callable[..., TestClient]) -> None:
    """A browser sends any page's form here, and says whose it is."""
    client = serve()
    refused = client.post("/v1/generations", json=ASK, headers={"Sec-Fetch-Site": "cross-site"})
    assert "pages of other sites" in line_of(refused, 403)
    assert client.post("/v1/generations", json=ASK, headers={"Sec-Fetch-Site": "none"}).status_code == 202


def test_jobs_are_seen_cancelled_and_refused_when_there_are_too_many(serve, held: threading.Event) -> None:
    client = serve(waiting=1, batch=1)
    first = client.post("/v1/generations", json=ASK).json()
    while client.get(f"/v1/generations/{first['id']}").json()["state"] == "queued":
        time.sleep(0.01)
    second = client.post("/v1/generations", json=ASK).json()
    assert (second["state"], second["position"], second["progress"]) == ("queued", 0, 0)
    full = client.post("/v1/generations", json=ASK)
    assert "1 jobs wait; try again in" in line_of(full, 429) and int(full.headers["retry-after"]) >= 1
    early = client.get(second["sounds"][0]["address"])
    assert "is queued, so there is no sound; wait for it" in line_of(early, 409)
    gone = client.delete(f"/v1/generations/{second['id']}")
    assert gone.status_code == 200 and gone.json()["state"] == "cancelled"
    assert "is cancelled" in line_of(client.get(second["sounds"][0]["stream"]), 409)
    held.set()
    assert ended(client, first)["state"] == "done"
    assert client.delete(f"/v1/generations/{first['id']}").json()["state"] == "done"


def test_a_token_is_asked_for_where_one_is_set(serve: Callable[..., TestClient]) -> None:
    client = serve(token="geheim ä")
    for header in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Basic Z2VoZWlt"},
        {"Authorization": "Bearer "},
    ):
        for path in ("/v1/models", "/metrics", "/v1/generations/1"):
            answer = client.get(path, headers=header)
            assert (
                "token is missing or wrong" in line_of(answer, 401) and answer.headers["www-authenticate"] == "Bearer"
            )
        assert client.post("/v1/generations", json=ASK, headers=header).status_code == 401
    assert client.get("/health").status_code == 200
    right = {"Authorization": "Bearer geheim ä".encode()}
    assert client.get("/v1/models", headers=right).status_code == 200
    assert "bearer" in json.dumps(client.get("/openapi.json").json()["components"]["securitySchemes"]).lower()


def test_models_health_and_metrics(serve: Callable[..., TestClient], store: ModelStore, tiny_bundle: Path) -> None:
    client = serve()
    listed = client.get("/v1/models").json()
    assert [model["name"] for model in listed["models"]] == [listed["default"]] == [str(tiny_bundle)]
    assert listed["models"][0]["hash"] == store.outline(store.choose()).hash and listed["limits"]["seconds"] == 10
    assert client.get("/health").json()["state"] == "ok"
    assert (probed := client.head("/health")).status_code == 200 and not probed.content
    made(client, ASK | {"count": 2})
    client.get("/nothing")
    text = client.get("/metrics").text
    for line in (
        'jobs_total{state="done"} 1.0',
        "batches_total 1.0",
        "sounds_total 2.0",
        'answers_total{method="POST",route="/v1/generations",status="202"} 1.0',
        'answers_total{method="any",route="none",status="404"} 1.0',
        "waiting_jobs 0.0",
    ):
        assert f"stable_audio_lite_{line}" in text
    client.jobs.stop()  # type: ignore[attr-defined]
    for answer in (client.get("/health"), client.post("/v1/generations", json=ASK)):
        assert "stopping" in line_of(answer, 503) and answer.headers["retry-after"]


def test_openapi_describes_every_answer(serve: Callable[..., TestClient]) -> None:
    client = serve()
    schema = client.get("/openapi.json").json()
    assert client.options("/v1/generations/1").headers["allow"] == "DELETE, GET"
    assert len(schema["paths"]) == 7 and len(schema["paths"]["/v1/generations/{identity}"]) == 2
    for path in schema["paths"].values():
        for operation in path.values():
            assert operation["summary"] and operation["description"]
            for status, answer in operation["responses"].items():
                kinds = set(answer["content"])
                assert kinds == {"application/problem+json"} if int(status) >= 400 else kinds
            assert "400" in operation["responses"]
    references = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(schema)))
    assert references <= set(schema["components"]["schemas"])
    assert references >= {"GenerationRequest", "EditRequest", "EditForm", "Problem"}


def test_a_request_is_answered_by_400_only_where_its_schema_forbids_it(serve: Callable[..., TestClient]) -> None:
    """So that what a generated client can send is met, or told by 422 what the model can't do; `{}` is no request."""
    client = serve(waiting=100)
    components = client.get("/openapi.json").json()["components"]
    wanted = {"$ref": "#/components/schemas/GenerationRequest", "components": components}
    validator = jsonschema.Draft202012Validator(wanted)
    asked = {
        name: sent["json"] for name, (method, _, sent) in bad_requests().items() if method == "POST" and "json" in sent
    }
    asked = {name: body for name, body in asked.items() if not name.endswith(" wait")}
    asked |= {
        "nothing": {},
        "good": ASK | {"steps": 2.0},
        "loop": ASK | {"seconds": None, "prompt": "drums, 400 bpm", "edit": {"kind": "loop", "bars": 1}},
    }
    asked |= {
        "nulls": dict.fromkeys(components["schemas"]["GenerationRequest"]["properties"]) | {"prompt": "a", "count": 1}
    }
    for name, body in asked.items():
        status = client.post("/v1/generations", json=body).status_code
        allowed = {202, 422} if validator.is_valid(body) else {400, 422}
        assert status in allowed, (name, status)
        assert (status == 202) == (name in ("good", "loop", "nulls")), (name, status)
    for name in (
        "nothing",
        "no prompt",
        "too many seconds",
        "too many steps",
        "too many",
        "sampler",
        "edit without sound",
    ):
        assert not validator.is_valid(asked[name]), name


def flac_bomb() -> bytes:
    """A minute of silence in few bytes."""
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros((60 * 8000, 1), np.int16), 8000, format="FLAC")
    return buffer.getvalue()


def endless_flac(flac: bytes) -> bytes:
    """A FLAC that doesn't tell its length."""
    return flac[:21] + bytes([flac[21] & 0xF0]) + bytes(4) + flac[26:]


def zip_bomb() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.wav", bytes(10_000_000))
    return buffer.getvalue()


@functools.cache
def bad_requests() -> dict[str, tuple[str, str, dict[str, Any]]]:
    """Method, path and arguments of requests that can't be met, by what is wrong with them."""
    post, path, good = "POST", "/v1/generations", wav()
    found: dict[str, tuple[str, str, dict[str, Any]]] = {}
    for name, change in {
        "number as prompt": {"prompt": 5},
        "empty prompt": {"prompt": ""},
        "blank prompt": {"prompt": " \n"},
        "long prompt": {"prompt": "a" * 2001},
        "no prompt": {"prompt": None},
        "list as prompt": {"prompt": ["piano"]},
        "text as seconds": {"seconds": "3"},
        "no seconds": {"seconds": 0},
        "negative seconds": {"seconds": -1.0},
        "too many seconds": {"seconds": 11.0},
        "endless seconds": {"seconds": 1e300},
        "truth as seconds": {"seconds": True},
        "no steps": {"steps": 0},
        "half steps": {"steps": 2.5},
        "too many steps": {"steps": 101},
        "cfg": {"cfg": -1.0},
        "rescale": {"rescale": 2.0},
        "sampler": {"sampler": "magic"},
        "negative without guidance": {"cfg": 1.0, "negative": "drums"},
        "negative seed": {"seed": -1},
        "huge seed": {"seed": 2**64},
        "no count": {"count": 0},
        "too many": {"count": 5},
        "start after end": {"seconds_start": 9.0, "seconds_total": 8.0},
        "beyond the timing": {"seconds_total": 99.0},
        "unknown key": {"format": "mp3"},
        "unknown model": {"model": "gpt"},
        "path as model": {"model": "../../../../etc/passwd"},
        "file as model": {"model": "/etc"},
        "hub as model": {"model": "stabilityai/stable-audio-open-1.0"},
        "path as LoRA": {"lora": "/tmp"},
        "strength without LoRA": {"lora_strength": 0.5},
        "edit without sound": {"edit": {"kind": "variation"}},
        "unknown edit": {"edit": {"kind": "remix"}},
        "edit as text": {"edit": "loop"},
        "loop without tempo": {"edit": {"kind": "loop", "bars": 4}},
        "loop too slow": {"edit": {"kind": "loop", "bpm": 1.0}},
    }.items():
        found[name] = (post, path, {"json": ASK | change})
    for name, content in {
        "no JSON": b"prompt=piano",
        "empty body": b"",
        "half JSON": b'{"prompt": "pia',
        "list": b"[]",
        "null": b"null",
        "NaN": b'{"prompt": "piano", "seconds": NaN}',
        "not UTF-8": b'{"prompt": "caf\xe9"}',
        "lone surrogate": b'{"prompt": "\\ud800"}',
        "deep": b"[" * 20000,
        "long": b'{"prompt": "' + b"a" * 70000 + b'"}',
    }.items():
        found[name] = (post, path, {"content": content, "headers": {"Content-Type": "application/json"}})
    for name, headers in {
        "no type": {},
        "form": {"Content-Type": "application/x-www-form-urlencoded"},
        "no boundary": {"Content-Type": "multipart/form-data"},
        "other boundary": {"Content-Type": "multipart/form-data; boundary=x"},
        "compressed": {"Content-Type": "application/json", "Content-Encoding": "gzip"},
        "lying length": {"Content-Type": "application/json", "Content-Length": "99999999999"},
    }.items():
        found[name] = (post, path, {"content": json.dumps(ASK), "headers": headers})
    vary = {"prompt": "piano", "steps": 2, "edit": {"kind": "variation"}}
    nan = io.BytesIO()
    soundfile.write(nan, np.full((1000, 2), np.nan), 44100, format="WAV", subtype="FLOAT")
    for name, sound in {
        "empty sound": b"",
        "text as sound": b"hello" * 100,
        "truncated sound": good[:5000],
        "zip": zip_bomb(),
        "a minute": flac_bomb(),
        "unknown length": endless_flac(flac_bomb()),
        "absurd rate": good[:24] + struct.pack("<I", 1) + good[28:],
        "silence": wav(0.5)[:44] + bytes(88200),
        "NaN sound": nan.getvalue(),
        "playlist": b"#EXTM3U\nfile:///etc/passwd\n",
        "too large": bytes(700_000),
        "too short": wav(0.001),
    }.items():
        files = {"request": (None, json.dumps(vary)), "sound": ("../../etc/passwd", sound)}
        found[name] = (post, path, {"files": files})
    request, sound_part = (None, json.dumps(vary)), ("a.wav", good)
    for name, files in {
        "no request part": {"sound": sound_part},
        "no sound part": {"request": request},
        "sound as text": {"request": request, "sound": (None, "abc")},
        "another part": {"request": request, "sound": sound_part, "more": (None, "x")},
        "request as file": {"request": ("a", b"{}"), "sound": sound_part},
        "sound without edit": {"request": (None, json.dumps(ASK)), "sound": sound_part},
        "stretch beyond": {
            "request": (
                None,
                json.dumps(vary | {"edit": {"kind": "inpainting", "stretches": [{"start": 0.1, "end": 5.0}]}}),
            ),
            "sound": sound_part,
        },
        "continuation of no length": {
            "request": (None, json.dumps(vary | {"edit": {"kind": "continuation"}})),
            "sound": sound_part,
        },
    }.items():
        found[name] = (post, path, {"files": files})
    found["truncated upload"] = (
        post,
        path,
        {
            "content": b'--x\r\nContent-Disposition: form-data; name="request"\r\n\r\n{"prompt": "pi',
            "headers": {"Content-Type": "multipart/form-data; boundary=x"},
        },
    )
    found |= {
        "unknown path": ("GET", "/v1/nothing", {}),
        "wrong method": ("PUT", "/v1/generations", {"json": ASK}),
        "path trick": ("GET", "/v1/generations/..%2f..%2fetc%2fpasswd", {}),
        "unknown job": ("GET", "/v1/generations/1", {}),
        "unknown job's sound": ("GET", "/v1/generations/1/sounds/0", {}),
        "no number": ("GET", "/v1/generations/1/sounds/a", {}),
        "long id": ("DELETE", f"/v1/generations/{'a' * 5000}", {}),
        "long wait": ("POST", "/v1/generations?wait=1e9", {"json": ASK}),
        "NaN wait": ("POST", "/v1/generations?wait=nan", {"json": ASK}),
    }
    return found


def test_bad_requests_are_refused_in_one_line_and_the_server_lives(serve: Callable[..., TestClient]) -> None:
    client, requests = serve(), bad_requests()
    assert len(requests) >= 60
    wrong = []
    for name, (method, path, arguments) in requests.items():
        answer = client.request(method, path, **arguments)
        if not 400 <= answer.status_code < 500:
            wrong.append(f"{name}: {answer.status_code} {answer.text}")
            continue
        line_of(answer, answer.status_code)
    assert not wrong, "\n".join(wrong)
    assert made(client)["state"] == "done"
    assert client.jobs.totals.finished.total() == 1  # type: ignore[attr-defined]


def test_what_is_wrong_is_said(serve: Callable[..., TestClient]) -> None:
    client = serve()
    for name, (status, message) in {
        "text as seconds": (400, "seconds: Input should be a valid number"),
        "too many seconds": (422, "seconds: at most 10 may be asked for here, got 11"),
        "negative without guidance": (422, "negative changes guidance, and there is none at cfg 1"),
        "path as model": (422, "model: there is no '../../../../etc/passwd' here; choose one of"),
        "a minute": (422, "sound: lasts longer than 10 s"),
        "unknown length": (422, "sound: lasts longer than 10 s"),
        "zip": (422, "sound: can't be read as audio"),
        "silence": (422, "sound: is silent"),
        "too large": (413, "the body is longer than"),
        "lying length": (413, "the body is longer than"),
        "compressed": (415, "Content-Encoding"),
        "edit without sound": (400, "edit: starts from a sound; send one beside the request, as multipart/form-data"),
        "sound without edit": (400, "edit: Field required"),
        "long wait": (400, "wait: Input should be less than or equal to 60"),
        "truncated upload": (400, "give a part `request`"),
        "path trick": (404, "not found"),
    }.items():
        method, path, arguments = bad_requests()[name]
        assert message in line_of(client.request(method, path, **arguments), status), name


def test_a_fault_inside_is_a_problem_too(serve: Callable[..., TestClient], monkeypatch: pytest.MonkeyPatch) -> None:
    client = serve()
    monkeypatch.setattr(Jobs, "submit", lambda *_: {}["x"])
    assert "an error inside" in line_of(client.post("/v1/generations", json=ASK), 500)
    assert 'status="500"} 1.0' in client.get("/metrics").text


@pytest.mark.parametrize("kind", ["wav", "flac", "opus"])
def test_a_stream_is_the_sound_in_pieces_within_full_scale(kind: str) -> None:
    ramp = torch.arange(44100) / 44100
    sound = torch.stack([0.5 * (2764 * ramp).sin(), 0.5 * (1382 * ramp).sin()])
    stream = SoundStream(kind, 44100, 2)  # type: ignore[arg-type]
    parts = [stream.encode(sound[:, first : first + 9000]) for first in range(0, 44100, 9000)] + [stream.end()]
    assert sum(map(bool, parts)) > 1
    found = read(b"".join(parts))
    assert found.shape == sound.shape  # near its end, Opus rings
    torch.testing.assert_close(found[:, :-2000], sound[:, :-2000], atol=1e-4 if kind != "opus" else 0.05, rtol=0)
    loud = SoundStream("wav", 44100, 2)
    body = b"".join([loud.encode(3 * sound), loud.end()])
    assert float(read(body).abs().max()) <= 1


def test_a_stranger_s_sound_is_bounded_and_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two uploads of one size and name are told apart, even where lengths are counted; ffmpeg is not asked."""
    monkeypatch.setattr("shutil.which", lambda name: pytest.fail("ffmpeg was looked for"))
    bodies = []
    for seconds in (0.3, 0.4):
        buffer = io.BytesIO()
        soundfile.write(
            buffer, 0.1 * np.random.default_rng(0).standard_normal((round(seconds * 8000), 1)), 8000, format="FLAC"
        )
        bodies.append(endless_flac(buffer.getvalue()))
    size = max(map(len, bodies))
    padding = [(size - len(body)).to_bytes(3, "big") + bytes(size - len(body)) for body in bodies]
    alike = [body[:42] + b"\1" + more + body[42:] for body, more in zip(bodies, padding, strict=True)]
    lengths = [read_sound(body, 44100, 10).seconds for body in alike]
    assert lengths == pytest.approx([0.3, 0.4], abs=0.01)
    with pytest.raises(UserError, match="can't be read as audio"):
        read_sound(b"\0" * 1000, 44100, 10)


class Running:
    """A service on a real socket, in a thread."""

    def __init__(self, app: Any) -> None:
        self.listener = open_socket("127.0.0.1", 0)
        self.address = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})
        self.thread.start()

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join()


def test_sound_is_sent_while_it_is_made(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first piece arrives before the second one is there; a stream of what fails breaks off."""
    more, jobs = threading.Event(), Jobs(store)
    fails = False

    def render(model: StableAudio, plan: Plan, *_: Any) -> Iterator[tuple[int, torch.Tensor]]:
        yield 0, torch.full((2, 20000), 0.5)
        assert more.wait(60)
        if fails:
            raise UserError("it broke")
        yield 0, torch.full((2, 10000), -0.5)

    monkeypatch.setattr(StableAudio, "render", render)
    try:
        with Running(create_app(jobs)) as running, httpx.Client(base_url=running.address, timeout=None) as client:
            for fails in (False, True):
                more.clear()
                job = client.post("/v1/generations", json=ASK).json()
                with client.stream("GET", job["sounds"][0]["stream"]) as answer:
                    pieces, body = answer.iter_raw(), b""
                    while len(body) < 44 + 20000 * 6:
                        body += next(pieces)
                    assert client.get(f"/v1/generations/{job['id']}").json()["state"] == "running"
                    more.set()
                    if fails:
                        with pytest.raises(httpx.RemoteProtocolError):
                            list(pieces)
                    else:
                        assert read(body + b"".join(pieces)).shape == (2, 30000)
            assert 'stream",status="200"} 2.0' in (text := client.get("/metrics").text) and 'status="500"' not in text
            assert "Traceback" not in capsys.readouterr().err
    finally:
        jobs.close()


def test_a_stop_hangs_up_on_who_listens_without_end(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As an open page does; nothing is logged."""
    monkeypatch.setattr(host, "_LAST_ANSWERS", 0.1)
    app, listener, heard = FastAPI(), open_socket("127.0.0.1", 0), []

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x"
            await asyncio.sleep(0.01)

    @app.get("/")
    async def listened() -> StreamingResponse:
        return StreamingResponse(endless())

    def listen() -> None:
        with contextlib.suppress(httpx.HTTPError), httpx.stream("GET", address, timeout=None) as answer:
            for piece in answer.iter_raw():
                if not heard:
                    os.kill(os.getpid(), signal.SIGTERM)
                heard.append(piece)

    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    listening = threading.Thread(target=listen)
    listening.start()
    host.serve_app(app, Jobs(store), listener, grace=60)
    listening.join()
    assert heard and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--queue", "0"], "--queue must be above 0"),
        (["--port", "99999"], "can't listen at 127.0.0.1:99999"),
        (["--host", "192.0.2.1", "--port", "0"], "can't listen at 192.0.2.1"),
        (["--model", "nowhere", "--port", "0"], "nowhere: no such bundle"),
        (["--lora", "nowhere", "--port", "0"], "nowhere: no such folder"),
    ],
)
def test_mistakes_at_the_start_are_one_line(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", *args]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def start_process(bundle: Path, folder: Path, *args: str) -> tuple[subprocess.Popen[str], str]:
    """Start the command in an empty folder; returns it and its address."""
    command = [sys.executable, "-m", "stable_audio_lite.cli", "serve", "--model", str(bundle), "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
    process = subprocess.Popen(
        [*command, "--dtype", "float32", *args], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, process.stdout.readline().split()[0]


def files_in(folder: Path) -> list[Path]:
    """All but empty folders, as torch makes one for its cache."""
    return [path for path in folder.rglob("*") if not path.is_dir()]


@pytest.mark.long
def test_a_stop_finishes_what_runs_and_hands_back_what_waits(tiny_bundle: Path, tmp_path: Path) -> None:
    process, address = start_process(tiny_bundle, tmp_path, "--port", "0", "--batch", "1", "--grace", "3600")
    with httpx.Client(base_url=address, timeout=None) as client:
        ask = ASK | {"steps": 200}
        running, waiting = (client.post("/v1/generations", json=ask).json() for _ in range(2))
        while client.get(f"/v1/generations/{running['id']}").json()["state"] == "queued":
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        while client.get("/health").status_code == 200:
            time.sleep(0.01)
        answers = [ended(client, job) for job in (running, waiting)]
        assert [answer["state"] for answer in answers] == ["done", "failed"]
        assert "did not begin this; send the request again" in answers[1]["error"]
        assert read(client.get(running["sounds"][0]["address"]).content).shape == (2, 8820)
    assert process.wait() == 0 and not files_in(tmp_path)


@pytest.mark.long
def test_after_a_crash_clients_are_told(tiny_bundle: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    process, address = start_process(tiny_bundle, tmp_path, "--port", port)
    job = httpx.post(f"{address}/v1/generations", json=ASK | {"steps": 250}, timeout=None).json()
    process.kill()
    process.wait()
    process, _ = start_process(tiny_bundle, tmp_path, "--port", port)
    with httpx.Client(base_url=address, timeout=None) as client:
        assert "started again since" in line_of(client.get(f"/v1/generations/{job['id']}"), 410)
        assert "started again since" in line_of(client.get(job["sounds"][0]["address"]), 410)
        assert ended(client, client.post("/v1/generations", json=ASK).json())["state"] == "done"
    process.kill()
    process.wait()
    assert not files_in(tmp_path)
