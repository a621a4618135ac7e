"""Damaged files of every kind that commands take: each is read, or refused in one line; nothing else happens."""

from __future__ import annotations

import contextlib
import io
import json
import random
import signal
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from stable_audio_lite.audio.io import audio_blocks, audio_info, read_metadata, write_audio
from stable_audio_lite.errors import UserError

pytestmark = pytest.mark.long

KINDS = {
    "a.wav": ("WAV", "PCM_16"),
    "b.wav": ("WAVEX", "PCM_24"),
    "c.wav": ("RF64", "FLOAT"),
    "a.w64": ("W64", "PCM_16"),
    "a.aiff": ("AIFF", "PCM_24"),
    "a.caf": ("CAF", "PCM_16"),
    "a.flac": ("FLAC", "PCM_16"),
    "a.ogg": ("OGG", "VORBIS"),
    "a.opus": ("OGG", "OPUS"),
    "a.mp3": ("MP3", "MPEG_LAYER_III"),
}
EXTREMES = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x01\0\0\0", b"\0\0\0\x01")


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Flip bytes, cut the end off, insert bytes, exchange two stretches, or set a field to an extreme."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        # Most of what programs trust is at the beginning.
        place = rng.randrange(min(len(found), rng.choice((64, 256, 1 << 30))) or 1)
        match rng.randrange(5):
            case 0:
                for _ in range(rng.randint(1, 8)):
                    place = (place + rng.randrange(16)) % max(len(found), 1)
                    found[place : place + 1] = bytes([rng.randrange(256)])
            case 1:
                del found[rng.randrange(len(found) + 1) :]
            case 2:
                found[place:place] = rng.randbytes(rng.choice((1, 4, 100, 3000)))
            case 3:
                size, other = rng.choice((1, 4, 8, 60)), rng.randrange(len(found) + 1)
                one, two = found[place : place + size], found[other : other + size]
                found[place : place + size], found[other : other + size] = two, one
            case 4:
                found[place : place + 4] = rng.choice(EXTREMES)
    return bytes(found)


@contextlib.contextmanager
def no_longer_than(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fuzz(
    originals: dict[Path, bytes], count: int, read: Callable[[Path], object], record: Counter[str], seed: int = 0
) -> None:
    """Write `count` damaged versions of files over them, one at a time, and read each."""
    paths = list(originals)
    for path in paths:
        read(path)  # as it is
    for number in range(count):
        path, rng = paths[number % len(paths)], random.Random(f"{seed}/{number}")
        path.write_bytes(mutated(originals[path], rng))
        try:
            with no_longer_than(60):
                read(path)
            record["read"] += 1
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000, str(error)
            record["refused"] += 1
        except BaseException as error:
            kept = Path("/tmp") / f"fuzz-{number}-{path.name}"
            kept.write_bytes(path.read_bytes())
            raise AssertionError(f"{path.name} number {number} (see {kept}): {error!r}") from error
        finally:
            path.write_bytes(originals[path])
    assert record["refused"] > count / 20
    print(f"{', '.join(p.name for p in paths)}: {dict(record)}")


def sounds(folder: Path) -> dict[Path, bytes]:
    samples = 0.3 * np.random.default_rng(0).standard_normal((3000, 2)).clip(-1, 1)
    for name, (container, subtype) in KINDS.items():
        soundfile.write(folder / name, samples, 48000, format=container, subtype=subtype)
    write_audio(folder / "tagged.wav", samples.T, 48000, {"prompt": "a prompt", "seed": 1})
    return {path: path.read_bytes() for path in sorted(folder.iterdir())}


def read_sound(path: Path) -> None:
    frames = sum(block.shape[1] for block in audio_blocks(path, stereo=True))
    assert frames == audio_info(path).frames
    read_metadata(path)


@pytest.mark.parametrize(("ffmpeg", "count"), [(False, 1100), (True, 66)])
def test_sounds(ffmpeg: bool, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    originals = sounds(tmp_path)
    if not ffmpeg:
        monkeypatch.setenv("PATH", "")
    fuzz(originals, count, read_sound, Counter())


def lists(folder: Path) -> dict[Path, bytes]:
    rows = [{"file_name": f"{i}.wav", "text": f"piano, {i}", "captions": ["a", "b\u00e9"]} for i in range(5)]
    lines = [f'{i}.wav,"slow, ""warm"" piano {i}",{i}.5' for i in range(5)]
    (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "list.csv").write_text("\n".join(["file_name,text,seconds", *lines]))
    (folder / "list.txt").write_text("a.wav\nb.wav\n")
    return {path: path.read_bytes() for path in sorted(folder.glob("list.*"))}


def test_lists_and_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stable_audio_lite.data.manifest import read_items

    def read(path: Path) -> None:
        for item in read_items(path):
            with contextlib.suppress(UserError):
                audio_info(item.path)

    monkeypatch.setenv("PATH", "")
    fuzz(lists(tmp_path), 450, read, Counter())
    shard, wav = tmp_path / "a.tar", io.BytesIO()
    soundfile.write(wav, np.zeros((100, 2)), 44100, format="WAV")
    with tarfile.open(shard, "w") as tar:
        for name, data in (("x.1.wav", wav.getvalue()), ("x.1.json", b'{"text": "a"}'), ("y.wav", wav.getvalue())):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    fuzz({shard: shard.read_bytes()}, 250, read, Counter())


def test_configs(tmp_path: Path) -> None:
    from stable_audio_lite.config import load_config
    from stable_audio_lite.systems import load_system
    from training.train_diffusion import TrainDiffusionConfig

    configs = Path(__file__).parents[1] / "configs"
    for kind in ("stable_audio", "complex_stft", "spectrogram_transformer"):
        path = tmp_path / f"{kind}.yaml"
        path.write_bytes((configs / kind / "tiny.yaml").read_bytes())
        fuzz({path: path.read_bytes()}, 80, load_system, Counter())
    run = tmp_path / "run.yaml"
    run.write_bytes((configs / "stable_audio" / "train_diffusion.yaml").read_bytes())
    fuzz({run: run.read_bytes()}, 80, lambda path: load_config(path, TrainDiffusionConfig), Counter())


def test_weights_and_checkpoints(tmp_path: Path) -> None:
    import torch

    from evaluation.result import MetricValue, Result, SoundRecord, load_result, save_result
    from stable_audio_lite.bundle import read_part
    from stable_audio_lite.data.latents import CachedLatent, LatentCache, LatentMetadata, read_cache
    from stable_audio_lite.models.dac import read_dac
    from training.checkpoint import Resumable, load_checkpoint, save_checkpoint

    net = torch.nn.Linear(3, 3)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(3)).sum().backward()
    optimizer.step()
    average = {name: value.clone() for name, value in net.state_dict().items()}
    state = Resumable({"net": net}, {"net": optimizer}, {"net": average})
    folder = save_checkpoint(tmp_path / "checkpoints", 1, state, {"seed": 0})
    files = {path: path.read_bytes() for path in sorted(folder.iterdir())}
    fuzz(files, 200, lambda path: load_checkpoint(path.parent, state), Counter())

    part = tmp_path / "vae.safetensors"
    part.write_bytes(next(data for path, data in files.items() if path.suffix == ".safetensors"))
    fuzz({part: part.read_bytes()}, 150, lambda path: read_part(path.parent, "vae"), Counter())

    cache = LatentCache(tmp_path / "latents", "hash", 2)
    about = LatentMetadata(name="a", captions=("a",), metadata={}, seconds_start=0.0, seconds=1.0)
    cache.write(0, [CachedLatent(n, torch.randn(4, 9), about) for n in range(2)])
    cache.finish()
    files = {path: path.read_bytes() for path in sorted((tmp_path / "latents").iterdir())}

    def read(path: Path) -> None:
        LatentCache(path.parent, "hash", 2)
        read_cache(path.parent, "hash")

    fuzz(files, 200, read, Counter())

    dac, result = tmp_path / "dac.pth", tmp_path / "result.json"
    torch.save({"state_dict": {"encoder.block.0.bias": torch.ones(9)}, "metadata": {"kwargs": {}}}, dac)
    fuzz({dac: dac.read_bytes()}, 60, read_dac, Counter())
    metric = MetricValue(name="fd", value=1.5, low=1.0, high=2.0, n=3, baselines={"noise": 9.0})
    made = SoundRecord(path="a.wav", seconds=1.0, sample_rate=44100, channels=2)
    save_result(Result(model="a model", settings={"rate": 1}, metrics=(metric,), generated=(made,)), result)
    fuzz({result: result.read_bytes()}, 60, load_result, Counter())


def test_no_command_leaves_anything_half_written(
    tiny_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """`encode` of damaged sounds writes latents that can be read or nothing; `validate-dataset` reads them all."""
    from safetensors import safe_open

    from stable_audio_lite.cli import main

    folder = tmp_path / "sounds"
    folder.mkdir()
    for number, (path, data) in enumerate(5 * list(sounds(folder).items())):
        path.with_stem(f"{path.stem}{number}").write_bytes(mutated(data, random.Random(number)))
    files = sorted(folder.iterdir())
    statuses = []
    for path in files:
        out = tmp_path / "out" / path.name
        statuses.append(main(["encode", str(path), "-o", str(out), "--model", str(tiny_bundle)]))
        written = [file for file in out.rglob("*") if file.is_file()]
        assert len(written) == (statuses[-1] == 0), path.name
        for file in written:
            with safe_open(file, "pt") as latents:
                assert latents.get_slice("latent").get_shape()[0] == 64
    assert set(statuses) == {0, 2}
    assert "Traceback" not in capfd.readouterr().err
    assert main(["validate-dataset", str(folder), "--model", str(tiny_bundle), "--json"]) == 1
    assert json.loads(capfd.readouterr().out)["files"] == len(files)
