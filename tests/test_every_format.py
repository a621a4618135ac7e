"""Every kind of sound file: what the reader gives is what decoding gives, to the sample, in every command."""

from __future__ import annotations

import functools
import json
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from stable_audio_lite.audio.decoding import AudioFile, Stored
from stable_audio_lite.audio.io import audio_blocks, audio_info
from stable_audio_lite.cli import main
from stable_audio_lite.errors import UserError

needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")
RATES = (8000, 11025, 16000, 22050, 32000, 44100, 48000, 96000, 192000)
EXACT = {
    "u8.wav": ("WAV", "PCM_U8"),
    "16.wav": ("WAV", "PCM_16"),
    "24.wav": ("WAV", "PCM_24"),
    "32.wav": ("WAV", "PCM_32"),
    "float.wav": ("WAV", "FLOAT"),
    "double.wav": ("WAV", "DOUBLE"),
    "extensible.wav": ("WAVEX", "PCM_24"),
    "rf64.wav": ("RF64", "PCM_16"),
    "sony.w64": ("W64", "PCM_24"),
    "apple.aiff": ("AIFF", "PCM_24"),
    "short.aif": ("AIFF", "FLOAT"),
    "core.caf": ("CAF", "PCM_24"),
    "sun.au": ("AU", "PCM_16"),
    "free.flac": ("FLAC", "PCM_24"),
}
LOSSY = {"vorbis.ogg": ("OGG", "VORBIS"), "opus.opus": ("OGG", "OPUS"), "mpeg.mp3": ("MP3", "MPEG_LAYER_III")}
BY_FFMPEG = {
    "aac.m4a": ["-c:a", "aac"],
    "lossless.m4a": ["-c:a", "alac"],
    "windows.wma": [],
    "true.tta": [],
    "pack.wv": [],
    "matroska.mka": ["-c:a", "flac"],
}


def sound(frames: int, channels: int = 2) -> np.ndarray:
    """(T, C): noise at a level that changes, then tones, so that bit rates and places can be told apart."""
    rng, t = np.random.default_rng(frames), np.arange(frames)
    loud = np.where(t < frames // 3, 0.2, 0.002)[:, None] * rng.standard_normal((frames, channels))
    return np.clip(loud + 0.1 * np.sin(t[:, None] * (0.02 + 0.01 * np.arange(channels) + t[:, None] / 1e8)), -1, 1)


def write(path: Path, kind: tuple[str, str], frames: int, rate: int = 44100, channels: int = 2, **more: object) -> Path:
    soundfile.write(path, sound(frames, channels), rate, format=kind[0], subtype=kind[1], **more)
    return path


def by_ffmpeg(source: Path, path: Path, *options: str) -> Path:
    command = ["ffmpeg", "-v", "error", "-y", "-i", str(source), *options, str(path)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return path


def decoded_by_ffmpeg(path: Path, channels: int) -> int:
    """Frames that ffmpeg makes of a file."""
    command = ["ffmpeg", "-v", "error", "-i", str(path), "-ac", str(channels), "-f", "s16le", "-"]
    return len(subprocess.run(command, check=True, capture_output=True).stdout) // (2 * channels)


def assert_reads(path: Path, frames: int, rate: int, channels: int, wanted: np.ndarray | None = None) -> None:
    """The length that is told is the one read, in blocks, from a shard, and where one begins in the middle."""
    whole = np.concatenate(list(audio_blocks(path, 10_007)), 1)
    info = audio_info(path)
    assert (info.frames, info.sample_rate, info.channels) == (frames, rate, channels), path.name
    assert whole.shape == (channels, frames), path.name
    if wanted is not None:
        assert np.abs(whole - wanted.T).max() < 0.01, path.name
    stored = Stored(f"tar/{path}", functools.partial(path.open, "rb"))
    assert audio_info(stored) == info
    for source, begin in ((path, frames // 2), (stored, frames * 3 // 4), (path, frames - 1)):
        with AudioFile(source) as file:
            error = np.abs(file.read(begin, frames) - whole[:, begin:]).max()
        assert error <= (1e-4 if file.format == "OGG" else 0), f"{path.name} from {begin}: {error}"


@pytest.mark.parametrize("name", EXACT)
def test_every_lossless_kind_is_read_to_the_sample(name: str, tmp_path: Path) -> None:
    for rate, channels in ((44100, 2), (8000, 1), (192000, 6)):
        path = write(tmp_path / name, EXACT[name], 30_011, rate, channels)
        assert_reads(path, 30_011, rate, channels, sound(30_011, channels))
    for channels in (1, 2):
        assert_reads(write(tmp_path / name, EXACT[name], 1, 44100, channels), 1, 44100, channels)
    write(tmp_path / name, EXACT[name], 0)
    with pytest.raises(UserError, match=name):
        audio_info(tmp_path / name)


@pytest.mark.parametrize("name", LOSSY)
def test_every_lossy_kind_is_as_long_as_what_was_encoded(name: str, tmp_path: Path) -> None:
    for rate, channels in ((48000, 2), (24000, 1), (16000, 2)):
        path = write(tmp_path / name, LOSSY[name], 70_001, rate, channels)
        assert_reads(path, 70_001, rate, channels)


@pytest.mark.long
def test_every_rate_and_number_of_channels(tmp_path: Path) -> None:
    for name, kind in EXACT.items():
        for rate in RATES:
            for channels in (1, 2, 6):
                assert_reads(write(tmp_path / name, kind, 5003, rate, channels), 5003, rate, channels)


def without_mp3_header(path: Path) -> None:
    data = path.read_bytes()
    assert b"Xing" in data or b"Info" in data
    path.write_bytes(data.replace(b"Xing", bytes(4), 1).replace(b"Info", bytes(4), 1))


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
def test_an_mp3_has_the_length_of_its_frames(mode: str, tmp_path: Path) -> None:
    """With its header, without, with tags around it, and two after one another: all that ffmpeg finds as well."""
    path = write(tmp_path / "a.mp3", LOSSY["mpeg.mp3"], 300_000, bitrate_mode=mode, compression_level=0.4)
    assert_reads(path, 300_000, 44100, 2)
    whole, plain = path.read_bytes(), tmp_path / "plain.mp3"
    plain.write_bytes(whole)
    without_mp3_header(plain)
    frames = audio_info(plain).frames
    assert frames % 1152 == 0 and 300_000 < frames < 300_000 + 4 * 1152
    assert_reads(plain, frames, 44100, 2)
    bare, tag = plain.read_bytes(), b"ID3\4\0\0\0\0\2\0" + bytes(256)
    ape = b"APETAGEX" + struct.pack("<IIII", 2000, 5000 + 32, 1, 1 << 31) + bytes(8)
    tagged = tmp_path / "tagged.mp3"
    tagged.write_bytes(tag + bare + ape + bytes(5000) + ape + b"TAG" + bytes(125))
    assert_reads(tagged, frames, 44100, 2)
    double = tmp_path / "double.mp3"
    double.write_bytes(whole + whole)
    assert_reads(double, audio_info(double).frames, 44100, 2)
    assert abs(audio_info(double).frames - 2 * frames) <= 2 * 1152
    if shutil.which("ffmpeg"):
        assert abs(decoded_by_ffmpeg(plain, 2) - frames) <= 1152


def patched(path: Path, place: int, data: bytes) -> Path:
    whole = bytearray(path.read_bytes())
    whole[place : place + len(data)] = data
    path.write_bytes(whole)
    return path


@pytest.mark.parametrize("size", [0, 0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_a_wav_of_unknown_length_is_read_to_its_end(size: int, tmp_path: Path) -> None:
    """As ffmpeg, sox, arecord and others write it to a pipe; any other length that the file lacks is a truncation."""
    path = write(tmp_path / "pipe.wav", EXACT["16.wav"], 30_011)
    patched(path, 4, struct.pack("<I", min(size + 36, 0xFFFFFFFF) if size else 0))
    assert_reads(patched(path, 40, struct.pack("<I", size)), 30_011, 44100, 2, sound(30_011))
    patched(path, 40, struct.pack("<I", 4 * 30_011 + 400))
    with pytest.raises(UserError, match=r"pipe\.wav: truncated"):
        audio_info(path)


def unknown_flac(path: Path) -> Path:
    """A FLAC whose header doesn't tell its length: 36 bits of zeros."""
    numbers = int.from_bytes(path.read_bytes()[18:26], "big") >> 36 << 36
    return patched(path, 18, numbers.to_bytes(8, "big"))


def test_flac_and_caf_of_unknown_length_are_read_to_their_ends(tmp_path: Path) -> None:
    for frames in (30_011, 4096, 1, 600_000):
        flac = unknown_flac(write(tmp_path / "pipe.flac", EXACT["free.flac"], frames))
        assert_reads(flac, frames, 44100, 2, sound(frames))
        caf = write(tmp_path / "pipe.caf", EXACT["core.caf"], frames)
        place = caf.read_bytes().index(b"data") + 4
        assert_reads(patched(caf, place, struct.pack(">q", -1)), frames, 44100, 2, sound(frames))


@needs_ffmpeg
@pytest.mark.parametrize("container", ["wav", "flac", "caf", "aiff", "w64", "au", "mp3", "ogg", "opus"])
def test_what_ffmpeg_writes_to_a_pipe_is_read_whole(container: str, tmp_path: Path) -> None:
    source = write(tmp_path / "source.wav", EXACT["16.wav"], 96_013, 48000)
    with (tmp_path / f"pipe.{container}").open("wb") as pipe:
        command = ["ffmpeg", "-v", "error", "-i", str(source), "-f", container, "-"]
        subprocess.run(command, check=True, stdout=pipe)
    path = Path(pipe.name)
    frames = audio_info(path).frames
    assert frames == 96_013 or container == "mp3" and frames == decoded_by_ffmpeg(path, 2)
    assert_reads(path, frames, 48000, 2)


@needs_ffmpeg
@pytest.mark.parametrize("name", BY_FFMPEG)
def test_what_only_ffmpeg_reads(name: str, tmp_path: Path) -> None:
    """From folders and shards, as long as what ffmpeg decodes; cut short, it is refused by name."""
    source = write(tmp_path / "source.wav", EXACT["16.wav"], 96_013)
    path = by_ffmpeg(source, tmp_path / name, *BY_FFMPEG[name])
    frames = decoded_by_ffmpeg(path, 2)
    assert frames == 96_013 or name in ("aac.m4a", "windows.wma")
    assert_reads(path, frames, 44100, 2)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(UserError, match=name):
        audio_info(path)


def test_without_ffmpeg_other_kinds_say_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "a.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(500))
    with pytest.raises(UserError, match=r"a\.m4a: can't be read as audio .*install ffmpeg"):
        audio_info(tmp_path / "a.m4a")


@pytest.mark.parametrize("rate", [0, 1, 999, 800_000, 2**31 - 1])
def test_absurd_rates_are_refused_by_name(rate: int, tmp_path: Path) -> None:
    path = patched(write(tmp_path / "lie.wav", EXACT["16.wav"], 1000), 24, struct.pack("<I", rate))
    for read in (audio_info, lambda p: list(audio_blocks(p))):
        with pytest.raises(UserError, match=r"lie\.wav"):
            read(path)


def test_a_length_that_is_a_lie_is_a_truncation(tmp_path: Path) -> None:
    """A FLAC that claims 2^36 - 1 samples asks for no memory."""
    path = write(tmp_path / "lie.flac", EXACT["free.flac"], 5000)
    patched(path, 18, (int.from_bytes(path.read_bytes()[18:26], "big") | (1 << 36) - 1).to_bytes(8, "big"))
    with pytest.raises(UserError, match=r"lie\.flac: (truncated|damaged)"), AudioFile(path) as file:
        file.read(0, file.frames)


H = 0.5**0.5
LEFT, RIGHT, CENTRE, LOW = (1, 0), (0, 1), (H, H), (0, 0)
LS, RS, REAR = (H, 0), (0, H), (0.5, 0.5)


@pytest.mark.parametrize(
    ("mask", "shares"),
    [
        (0x7, (LEFT, RIGHT, CENTRE)),
        (0x33, (LEFT, RIGHT, LS, RS)),
        (0x107, (LEFT, RIGHT, CENTRE, REAR)),
        (0x3F, (LEFT, RIGHT, CENTRE, LOW, LS, RS)),
        (0x60F, (LEFT, RIGHT, CENTRE, LOW, LS, RS)),
        (0x70F, (LEFT, RIGHT, CENTRE, LOW, REAR, LS, RS)),
        (0x63F, (LEFT, RIGHT, CENTRE, LOW, LS, RS, LS, RS)),
        (0x5003, None),  # loudspeakers above the listener have no weights
    ],
)
def test_channels_are_mixed_by_their_places(mask: int, shares: tuple | None, tmp_path: Path) -> None:
    channels = mask.bit_count()
    path = write(tmp_path / "a.wav", ("WAVEX", "FLOAT"), 1000, 48000, channels)
    patched(path, 40, struct.pack("<I", mask))
    if shares is None:
        with pytest.raises(UserError, match=r"a\.wav: has 4 channels whose places"):
            audio_info(path)
        return
    (mixed,) = audio_blocks(path, stereo=True)
    assert np.abs(mixed - np.array(shares).T @ sound(1000, channels).T).max() < 1e-6


def test_five_channels_and_one_are_mixed_alike_in_every_container(tmp_path: Path) -> None:
    """An Ogg file has them in another order: left, centre, right, surrounds, LFE."""
    shares = np.array((LEFT, RIGHT, CENTRE, LOW, LS, RS)).T
    for name, kind in (EXACT | {"vorbis.ogg": LOSSY["vorbis.ogg"]}).items():
        given = wanted = 0.1 * np.sin(np.outer(np.arange(20_000), 0.05 + 0.02 * np.arange(6)))
        if kind[0] == "OGG":
            given = given[:, [0, 2, 1, 4, 5, 3]]
        best = {"compression_level": 0.0} if kind[0] == "OGG" else {}
        soundfile.write(tmp_path / name, given, 48000, format=kind[0], subtype=kind[1], **best)
        mixed = np.concatenate(list(audio_blocks(tmp_path / name, stereo=True)), 1)
        error = mixed - shares @ wanted.T
        assert np.square(error).mean() < 0.01 * np.square(mixed).mean(), name
    write(tmp_path / "many.wav", EXACT["16.wav"], 1000, 44100, 12)
    with pytest.raises(UserError, match=r"many\.wav: has 12 channels"):
        audio_info(tmp_path / "many.wav")


MP3_MODES = {"constant.mp3": "CONSTANT", "variable.mp3": "VARIABLE"}
About = tuple[int, int, int]
"""Frames, rate and channels of a file."""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, About]]:
    """A folder of captioned files of every kind, and what is in each by its name."""
    folder, found = tmp_path_factory.mktemp("music"), dict[str, About]()

    def add(name: str, kind: tuple[str, str], about: About, **more: object) -> Path:
        found[name] = about
        return write(folder / name, kind, *about, **more)

    for number, (name, kind) in enumerate(EXACT.items()):
        add(name, kind, (30_001 + 1001 * number, RATES[number % len(RATES)], (1, 2, 6)[number % 3]))
    add("single.wav", EXACT["16.wav"], (1, 8000, 2))
    add("vorbis.ogg", LOSSY["vorbis.ogg"], (30_001, 22050, 1))
    add("opus.opus", LOSSY["opus.opus"], (60_007, 24000, 2))
    for number, (name, mode) in enumerate(MP3_MODES.items()):
        about, more = (60_000 + number, (48000, 16000)[number], 2 - number), {"bitrate_mode": mode}
        add(name, LOSSY["mpeg.mp3"], about, compression_level=0.4, **more)
        plain = add(f"plain-{name}", LOSSY["mpeg.mp3"], about, compression_level=0.4, **more)
        without_mp3_header(plain)
        found[plain.name] = (audio_info(plain).frames, *about[1:])
    unknown_flac(add("piped.flac", EXACT["free.flac"], (50_001, 44100, 2)))
    patched(add("piped-wave.wav", EXACT["16.wav"], (50_002, 44100, 2)), 40, struct.pack("<I", 0xFFFFFFFF))
    core = add("piped-core.caf", EXACT["core.caf"], (50_003, 44100, 2))
    patched(core, core.read_bytes().index(b"data") + 4, struct.pack(">q", -1))
    for name, options in BY_FFMPEG.items() if shutil.which("ffmpeg") else ():
        by_ffmpeg(folder / "piped.flac", folder / name, *options)
        found[name] = (decoded_by_ffmpeg(folder / name, 2), 44100, 2)
    rows = [{"file_name": name, "text": f"a sound called {name}"} for name in found]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder, found


@pytest.fixture
def spectral(tmp_path: Path) -> Path:
    """A bundle of configs/complex_stft/tiny.yaml with random weights."""
    import torch

    from stable_audio_lite.bundle import save_bundle
    from stable_audio_lite.systems import load_system

    config = load_system("complex_stft/tiny")
    torch.manual_seed(0)
    save_bundle(tmp_path / "spectral", config, {config.part: config.network().state_dict()})
    return tmp_path / "spectral"


@pytest.fixture
def evaluate(
    declared_commands: dict[str, str], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., int]:
    """The command with a tiny CLAP; it writes result.json."""
    from stable_audio_lite.clap.checkpoints import save_transformers
    from stable_audio_lite.clap.model import Clap
    from stable_audio_lite.clap.tokenizer import train_tokenizer
    from stable_audio_lite.systems import load_model_config

    clap = tmp_path_factory.mktemp("clap") / "clap"
    save_transformers(Clap(load_model_config("stable_audio/tiny").clap, train_tokenizer(["a sound"], 280)), clap)
    fixed = ["--clap", str(clap), "--metrics", "clap_score", "--device", "cpu", "--weights", str(tmp_path)]
    fixed += ["--cache", str(tmp_path / "cache"), "-o", str(tmp_path / "result.json")]
    return lambda *args: main(["evaluate", *map(str, args), *fixed])


@pytest.mark.long
def test_every_kind_is_encoded_whole(library: tuple[Path, dict[str, About]], tiny_bundle: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    folder, found = library
    files = [str(folder / name) for name in found]
    assert main(["encode", *files, "-o", str(tmp_path / "out"), "--model", str(tiny_bundle)]) == 0
    for name, (frames, rate, _) in found.items():
        with safe_open((tmp_path / "out" / name).with_suffix(".safetensors"), "pt") as file:
            assert abs(int(file.metadata()["samples"]) - frames * 44100 / rate) <= 1, name


@pytest.mark.long
def test_every_kind_is_counted_whole(library: tuple[Path, dict[str, About]], tiny_bundle: Path, capsys) -> None:
    folder, found = library
    assert main(["validate-dataset", str(folder), "--model", str(tiny_bundle), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    seconds = sum(frames / rate for frames, rate, _ in found.values())
    assert report["files"] == len(found) and report["hours"] == pytest.approx(seconds / 3600, abs=1e-9)


@pytest.mark.long
def test_every_kind_is_pre_encoded_whole(
    library: tuple[Path, dict[str, About]], tiny_bundle: Path, tmp_path: Path
) -> None:
    from stable_audio_lite.data.latents import read_shard
    from training import pre_encode

    folder, found = library
    config = pre_encode.PreEncodeConfig(vae=str(tiny_bundle), data=str(folder), output=str(tmp_path))
    pre_encode.run(config)
    encoded = {entry.about.name: entry.about.seconds for entry in read_shard(tmp_path / "000000.tar")}
    whole = {name: frames / rate for name, (frames, rate, _) in found.items()}
    # Without a header that tells it, an MP3 encoder's delay counts as sound; it is silent, and silence is left out.
    delayed = {name: whole.pop(name) - encoded.pop(name) for name in list(whole) if name.startswith("plain-")}
    assert encoded == pytest.approx(whole, abs=1 / 44100)
    assert len(delayed) == 2 and all(0.02 < seconds < 0.06 for seconds in delayed.values())


@pytest.mark.long
def test_every_kind_is_evaluated_whole(
    library: tuple[Path, dict[str, About]], evaluate: Callable[..., int], tmp_path: Path
) -> None:
    from evaluation.result import load_result

    folder, found = library
    assert evaluate(folder, folder) == 0
    result = load_result(tmp_path / "result.json")
    for records in (result.generated, result.reference):
        told = {r.name: (r.seconds, r.sample_rate, r.channels) for r in records}
        assert told == {name: (frames / rate, rate, channels) for name, (frames, rate, channels) in found.items()}
    assert not result.left_out and result.metric("clap_score").n == len(found)


@pytest.mark.long
def test_every_kind_is_restored_whole(
    library: tuple[Path, dict[str, About]], spectral: Path, tmp_path: Path, capsys
) -> None:
    """What is no gap stays as the reader gives it, channels included."""
    folder, found = library
    for name, (frames, rate, channels) in found.items():
        out = tmp_path / f"{name}.wav"
        task = ["inpaint", "--gap", "0.02-0.05"] if frames > 1 else ["denoise", "--noise-db", "-90"]
        command = ["restore", str(folder / name), "-o", str(out), "--model", str(spectral), "--steps", "2"]
        assert main([*command, "--task", *task]) == 0, capsys.readouterr().err
        info = audio_info(out)
        assert (info.frames, info.sample_rate, info.channels) == (frames, rate, channels), name
        before, after = (np.concatenate(list(audio_blocks(path)), 1) for path in (folder / name, out))
        kept = slice(round(0.06 * rate), None)
        assert np.abs(before - after)[:, kept].max(initial=0) <= max(np.abs(before).max() - 1, 0) + 2e-7, name


@pytest.mark.parametrize(("lie", "reason"), [(False, "holds no samples"), (True, "has a rate of 1 Hz")])
def test_every_command_refuses_what_it_can_not_read(
    lie: bool,
    reason: str,
    tiny_bundle: Path,
    spectral: Path,
    evaluate: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A file of no samples and one that lies about its rate, by name, and nothing is left of it."""
    from training import pre_encode

    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "metadata.jsonl").write_text('{"file_name": "bad.wav", "text": "a sound"}')
    bad = write(tmp_path / "bad" / "bad.wav", EXACT["16.wav"], 1000 * lie)
    patched(bad, 24, struct.pack("<I", 1 if lie else 44100))
    before, model = sorted(tmp_path.rglob("*")), ["--model", str(tiny_bundle)]

    def told() -> str:
        captured = capsys.readouterr()
        return captured.out + captured.err

    assert main(["encode", str(bad), "-o", str(tmp_path / "out"), *model]) == 2
    assert f"bad.wav: {reason}" in told()
    assert main(["validate-dataset", str(bad.parent), *model]) == 1
    assert f"bad.wav: {reason}" in told()
    command = ["restore", str(bad), "-o", str(tmp_path / "out.wav"), "--model", str(spectral)]
    assert main([*command, "--task", "inpaint", "--gap", "0-0.1"]) == 2
    assert f"bad.wav: {reason}" in told()
    assert evaluate(bad.parent) == 2
    assert f"bad.wav: {reason}" in told()
    assert sorted(tmp_path.rglob("*")) == before
    config = pre_encode.PreEncodeConfig(vae=str(tiny_bundle), data=str(bad.parent), output=str(tmp_path / "latents"))
    with pytest.raises(UserError, match=rf"bad\.wav: {reason}"):
        pre_encode.run(config)
    assert not list((tmp_path / "latents").glob("*.tar"))
