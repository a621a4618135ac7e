"""Data sets: manifests, crops, and what validate-dataset finds."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import yaml

from stable_audio_lite import cli
from stable_audio_lite.audio.io import Stored, audio_info, read_audio, write_audio
from stable_audio_lite.config import load_config
from stable_audio_lite.data.crops import Crops
from stable_audio_lite.data.item import Item
from stable_audio_lite.data.latents import CachedLatent, LatentCache, LatentMetadata, read_cache
from stable_audio_lite.data.manifest import read_items
from stable_audio_lite.data.unreadable import Unreadable
from stable_audio_lite.data.validate import validate
from stable_audio_lite.errors import UserError
from training import pre_encode
from training.examples import LatentWindows, latent_statistics
from training.pre_encode import PreEncodeConfig

SAMPLES = 22050


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files of 1 to 3 s whose samples say where they are: a rising ramp, positive throughout."""
    folder = tmp_path_factory.mktemp("data")
    for index in range(3):
        ramp = np.linspace(0.1, 0.5, (index + 1) * 44100)
        write_audio(folder / f"{index}.wav", np.stack((ramp, ramp)), 44100)
    return folder


def write_manifest(folder: Path, text: str, name: str) -> Path:
    (folder / name).write_text(text)
    return folder


def test_csv_and_jsonl_say_the_same(tmp_path: Path) -> None:
    csv = write_manifest(tmp_path, 'file_name,text\na.wav,"slow, warm piano"\nsub/b.wav,\n', "metadata.csv")
    from_csv = [(i.path, i.captions) for i in read_items(csv)]
    rows = [{"file_name": "a.wav", "text": "slow, warm piano"}, {"file_name": "sub/b.wav"}]
    jsonl = write_manifest(tmp_path, "\n".join(map(json.dumps, rows)), "metadata.jsonl")
    assert [(i.path, i.captions) for i in read_items(jsonl)] == from_csv
    rows[0]["text"] = "one\u2028two"  # JSON may hold line separators as they are
    write_manifest(tmp_path, "\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "metadata.jsonl")
    assert read_items(jsonl)[0].captions == ("one\u2028two",)
    assert from_csv == [(tmp_path / "a.wav", ("slow, warm piano",)), (tmp_path / "sub/b.wav", ())]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("metadata.csv", "path,text\na.wav,b\n", "no column 'file_name'"),
        ("metadata.csv", "file_name,text\n,b\n", "line 2 is not an object with 'file_name'"),
        ("metadata.jsonl", '{"file_name": "a.wav"}\n{oops\n', "line 2 is not a JSON object"),
        ("metadata.jsonl", '["a.wav"]\n', "line 1 is not an object"),
        ("metadata.jsonl", '{"file_name": "a.wav", "captions": "b"}\n', "line 1: 'text' should be"),
        ("metadata.jsonl", "", "holds no audio"),
        ("metadata.csv", "file_name,text\na.wav,solo piano, slow, sad\n", "line 2 has 4 fields, .* 2 columns"),
        ("metadata.csv", "file_name,text\na.wav,b\na.wav\n", "line 3 has 1 fields"),
        ("metadata.csv", 'file_name,text\na.wav,"b\nc.wav,d\n', "line 3 is no CSV"),
        ("metadata.csv", 'file_name,text\na.wav,"a "loud" piano"\n', "line 2 is no CSV"),
        ("metadata.csv", "file_name,text,text\na.wav,b,c\n", "two columns 'text'"),
        ("metadata.csv", "file_name,text\na.wav,b\n./a.wav,c\n", "line 3 lists a.wav again, after .* line 2"),
        ("metadata.jsonl", 2 * '{"file_name": "a.wav"}\n', "line 2 lists a.wav again"),
        ("metadata.jsonl", '{"file_name": "a.wav", "text": "\\ud800"}\n', "line 1: a text is not valid Unicode"),
        ("metadata.jsonl", 100_000 * "[", "line 1 is not a JSON object"),
    ],
)
def test_bad_manifests_name_file_and_line(tmp_path: Path, name: str, text: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        read_items(write_manifest(tmp_path, text, name))
    assert len(str(caught.value)) < 500
    assert str(tmp_path) in str(caught.value)


def test_files_of_a_folder_are_read_or_said_to_be_left_out(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Hidden ones are no audio, folders behind links are followed once, and all that isn't read is counted."""
    real = tmp_path / "elsewhere"
    shutil.copytree(folder, real)
    (tmp_path / "set" / ".cache").mkdir(parents=True)
    (tmp_path / "set" / "linked").symlink_to(real)
    (real / "circle").symlink_to(tmp_path / "set")
    for name in ("a.aif", "b.opus", "c.caf", "d.M4A", "._a.wav", ".cache/e.wav", "cover.jpg", "notes.pdf", "READ"):
        (tmp_path / "set" / name).touch()
    names = [str(item.path.relative_to(tmp_path / "set")) for item in read_items(tmp_path / "set")]
    assert names == ["a.aif", "b.opus", "c.caf", "d.M4A", "linked/0.wav", "linked/1.wav", "linked/2.wav"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "5 files left out" in said
    assert all(words in said for words in ("2 hidden", "1 .jpg", "1 .pdf", "1 without suffix"))
    write_manifest(tmp_path / "set", '{"file_name": "a.aif"}', "metadata.jsonl")
    assert len(read_items(tmp_path / "set")) == 1
    assert "6 files left out, not listed in metadata.jsonl: 1 .caf, 1 .m4a, 1 .opus, 3 .wav" in capsys.readouterr().err


def test_a_folder_that_can_not_be_listed_is_said_to_be_left_out(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(folder, tmp_path / "disk")
    (folder / "lost+found").mkdir()
    scan = os.scandir

    def scandir(place: str) -> object:
        if str(place).endswith("lost+found"):
            raise PermissionError(13, "Permission denied", place)
        return scan(place)

    monkeypatch.setattr(os, "scandir", scandir)
    assert len(read_items(folder)) == 3
    assert "lost+found: can't be listed (Permission denied), so what is in it is left out" in capsys.readouterr().err


def test_what_is_no_data_set_is_refused(folder: Path) -> None:
    for name, words in ((str(folder / "0.wav"), "is a file; give its folder"), ("hf:", "names no data set; give hf:")):
        with pytest.raises(UserError, match=words):
            read_items(name)


def test_home_is_expanded_in_lists_and_configs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    listing = write_manifest(tmp_path, f"~/{folder.name}/0.wav\n", "list.txt") / "list.txt"
    assert read_items(listing)[0].path == folder / "0.wav"
    assert len(read_items(f"~/{folder.name}")) == 3
    (tmp_path / "base.yaml").write_text(f"vae: ~/vae\ndata: ~/{folder.name}\noutput: ~/out\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("base: ~/base.yaml\n")
    config = load_config(tmp_path / "run.yaml", PreEncodeConfig)
    assert (config.vae, config.output) == (f"{tmp_path}/vae", f"{tmp_path}/out")
    assert load_config(tmp_path / "run.yaml", PreEncodeConfig).data == f"{tmp_path}/{folder.name}"


def crops(folder: Path, **more: float) -> Crops:
    return Crops(read_items(folder), 44100, SAMPLES, seed=0, **more)


def test_crops_of_endings_hold_sound_then_silence(folder: Path) -> None:
    """Only as many as asked for; each begins with sound, ends in digital silence, and says where it begins."""

    def padded(endings: float) -> list[int]:
        drawn = [crops(folder, endings=endings).crop(n) for n in range(200)]
        assert all(bool(c.audio[:, :1000].all()) for c in drawn)
        assert all(0 <= c.seconds_start < c.seconds_total for c in drawn)
        return [int((c.audio == 0).all(0).sum()) for c in drawn]

    assert max(padded(0.0)) < 2
    assert 30 < sum(p > 2 for p in padded(0.25)) < 70
    assert 0.3 < sum(padded(1.0)) / (200 * SAMPLES) < 0.6


def test_gain_varies_only_where_asked_for(folder: Path) -> None:
    plain, varied = crops(folder), crops(folder, gain_db=6.0)
    ratios = [
        float(varied.crop(n).audio.abs().max() / plain.crop(n).audio.abs().max()) for n in range(60)
    ]  # crops differ where the draws do, by at most the ramp's 14 dB
    assert len({round(r, 3) for r in ratios}) > 30


def test_a_batch_does_not_depend_on_the_number_of_processes(folder: Path) -> None:
    whole = crops(folder).batch(3, 4)
    halves = [crops(folder).batch(3, 2, rank, 2) for rank in (0, 1)]
    assert np.array_equal(whole, np.concatenate(halves))


def latents_of(channels: int) -> SimpleNamespace:
    """A representation of latents with 10 frames a second, windows of 8, as they are."""
    shape = (channels, 8)
    return SimpleNamespace(
        hash="a hash", shape=shape, hop=100, sample_rate=1000, normalise=lambda z: z, silence=torch.zeros(shape)
    )


def write_cache(folder: Path, entries: list[tuple[str, torch.Tensor | None]]) -> LatentCache:
    """Items by name, their names also their captions, in shards of two; None: the item has no latent."""
    cache = LatentCache(folder, "a hash", len(entries), shard_items=2)
    for shard, numbers in enumerate(cache.shards):
        rows = [(n, *entries[n]) for n in numbers if entries[n][1] is not None]
        abouts = [
            LatentMetadata(name=name, captions=(name,), metadata={}, seconds_start=0.0, seconds=latent.shape[1] * 0.1)
            for _, name, latent in rows
        ]
        cache.write(shard, [CachedLatent(n, z, about) for (n, _, z), about in zip(rows, abouts, strict=True)])
    cache.finish()
    return cache


def test_shards_are_webdatasets_own_and_come_back(tmp_path: Path) -> None:
    """A tar of NUMBER.npy and NUMBER.json, the same bytes for the same latents; other shards or damage are refused."""
    latents = [torch.randn(4, 5 + i, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    caches = [write_cache(tmp_path / n, [(f"{i}.wav", z) for i, z in enumerate(latents)]) for n in ("a", "b")]
    with tarfile.open(caches[0].path(0)) as tar:
        assert tar.getnames() == ["00000000.npy", "00000000.json", "00000001.npy", "00000001.json"]
        row = json.load(tar.extractfile("00000000.json"))
    assert sorted(row) == ["audio", "captions", "name", "seconds", "seconds_start", "silences", "truth"]
    assert caches[0].path(1).read_bytes() == caches[1].path(1).read_bytes()
    index, entries = read_cache(tmp_path / "a", "a hash")
    assert (index.items, index.shards, index.frames) == (3, 2, 18) and [e.number for e in entries] == [0, 1, 2]
    assert all(torch.equal(e.latent, z.half()) for e, z in zip(entries, latents, strict=True))
    torch.testing.assert_close(torch.tensor(index.mean), torch.cat(latents, 1).mean(1), rtol=0, atol=1e-3)
    with pytest.raises(UserError, match="choose a new output"):
        LatentCache(tmp_path / "a", "a hash", 3, shard_items=3)
    with pytest.raises(UserError, match="another VAE"):
        LatentCache(tmp_path / "a", "another", 3, shard_items=2)
    caches[1].path(1).write_bytes(caches[1].path(1).read_bytes()[:1000])
    with pytest.raises(UserError, match="000001.tar: missing or damaged"):
        read_cache(tmp_path / "b", "a hash")


def test_random_windows_know_where_they_begin(tmp_path: Path) -> None:
    """Latents that count their frames: seconds_start is that of the first frame, in the file and not in the latent."""
    about = LatentMetadata(name="a", captions=("a",), metadata={"seconds": 99.0}, seconds_start=3.0, seconds=5.0)
    cache = LatentCache(tmp_path, "a hash", 1)
    cache.write(0, [CachedLatent(0, torch.arange(50.0).expand(2, -1), about)])
    cache.finish()
    windows = LatentWindows([tmp_path], latents_of(2))
    drawn = windows.windows([0] * 40, map(random.Random, range(40)))
    assert drawn["x0"].shape == (40, 2, 8) and drawn["seconds_total"].tolist() == [8.0] * 40
    torch.testing.assert_close(drawn["seconds_start"], 3.0 + 0.1 * drawn["x0"][:, 0, 0])
    assert len(set(drawn["seconds_start"].tolist())) > 15


def test_what_can_not_be_read_is_left_out_by_crops(folder: Path, tmp_path: Path) -> None:
    """Storage that fails and a file that is broken at its end: noted once each; no crop depends on what came before."""

    def fail() -> io.BytesIO:
        raise ConnectionError("no network")

    samples = read_audio(folder / "2.wav")
    samples[:, -len(samples[0]) // 2 :] = float("nan")
    soundfile.write(tmp_path / "half.wav", samples.T.numpy(), 44100, subtype="FLOAT")
    items = [*read_items(folder), Item(path=Stored("s3://far.wav", fail)), Item(path=tmp_path / "half.wav")]

    def drawn(first: int, folder: Path | None = None) -> list[torch.Tensor]:
        crops = Crops(items, 44100, SAMPLES, seed=0, unreadable=Unreadable(len(items), 0.5, folder))
        return [crops.crop(n).audio for n in range(first, 40)]

    whole = drawn(0, tmp_path)
    listed = [json.loads(line) for line in (tmp_path / "unreadable.jsonl").read_text().splitlines()]
    assert sorted(Path(row["file"]).name for row in listed) == ["far.wav", "half.wav"]
    assert "no network" in str(listed)
    for first in (10, 20, 30):
        assert all(torch.equal(a, b) for a, b in zip(whole[first:], drawn(first), strict=True))
    with pytest.raises(UserError, match=r"max_unreadable must lie in 0\.\.1"):
        Unreadable(5, 1.5)
    mine, others = (Unreadable(5, 0.2, tmp_path / "together") for _ in range(2))  # of two processes
    others.add("a.wav", UserError("no audio"))
    with pytest.raises(UserError, match="no network.*2 of 5 files.*max_unreadable allows 20.00%"):
        mine.add("s3://far.wav", UserError("no network"))


def test_mended_files_are_forgotten(folder: Path, tmp_path: Path) -> None:
    """A file that has changed since, or is there at last, no longer counts; one that is as broken as it was does."""
    broken = [tmp_path / name for name in ("a.wav", "b.wav", "c.wav")]
    for path in broken[:2]:
        path.write_bytes(b"no audio")
    unreadable = Unreadable(6, 0.5, tmp_path / "run")
    for path in broken:
        unreadable.add(path, UserError("broken"))
    assert len(Unreadable(6, 0.5, tmp_path / "run")) == 3
    for path in broken[1:]:
        shutil.copy(folder / "0.wav", path)
    again = Unreadable(6, 0.2, tmp_path / "run")
    assert list(again.reasons) == [str(broken[0])]
    listed = [json.loads(line) for line in (tmp_path / "run/unreadable.jsonl").read_text().splitlines()]
    assert [row["file"] for row in listed] == [str(broken[0])]


def test_latents_of_other_files_or_with_gaps(folder: Path, tmp_path: Path) -> None:
    """An item that has no latent is left out; a file of another name in an item's place is refused."""
    items = read_items(folder)
    latents = [None if index == 1 else torch.full((4, 300), float(index)) for index in range(3)]
    cache = write_cache(tmp_path, [(item.name, latent) for item, latent in zip(items, latents, strict=True)])
    windows = LatentWindows([tmp_path], latents_of(4))
    drawn = windows.windows(range(len(windows)), map(random.Random, range(len(windows))))
    assert set(drawn["x0"].amax((1, 2)).tolist()) == {0.0, 2.0}
    with pytest.raises(UserError, match="none of the 3 items"):
        write_cache(tmp_path / "empty", [("", None)] * 3)
    names = [item.name for item in items]
    assert [list(cache.held(shard, names) or ()) for shard in (0, 1)] == [[0], [2]] and cache.held(2, names) is None
    with pytest.raises(UserError, match=f"latent of {items[0].name}"):
        cache.held(0, ["other.wav", *names[1:]])


def test_latents_take_no_folder_of_other_files(folder: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    """Such as shards of sound, whose names they would take."""
    folder = shutil.copytree(folder, tmp_path / "shards")
    write_shard(folder, shard := folder / "000000.tar", {f"{number}.txt": "a sound" for number in range(3)})
    before = shard.read_bytes()
    with pytest.raises(UserError, match="holds other files, no latents"):
        write_cache(folder, [("0.wav", torch.zeros(4, 3))])
    settings = PreEncodeConfig(vae=str(tiny_bundle), data=str(shard), output=str(folder))
    with pytest.raises(UserError, match="holds other files, no latents"):
        pre_encode.run(settings)
    assert shard.read_bytes() == before and not list(folder.glob(".lock")) + list(folder.glob("cache.json"))


def test_windows_of_several_caches_follow_one_another(tmp_path: Path) -> None:
    """Normalised by the mean and deviation over all frames, so that those of what is given out are 0 and 1."""
    draws = torch.Generator().manual_seed(0)
    latents = [torch.randn(64, 8, generator=draws) * (1 + i) + i for i in range(5)]
    for name, part in (("a", latents[:3]), ("b", latents[3:])):
        write_cache(tmp_path / name, [(f"{name}{index}", latent) for index, latent in enumerate(part)])
    folders = [tmp_path / "a", tmp_path / "b"]
    mean, std = (value[:, None] for value in latent_statistics(folders, "a hash"))
    representation = latents_of(64)
    representation.normalise = lambda z: (z - mean) / std
    windows = LatentWindows(folders, representation)
    drawn = windows.windows(range(5), map(random.Random, range(5)))
    assert len(windows) == 5 and drawn["captions"] == ["a0", "a1", "a2", "b0", "b1"]
    given = drawn["x0"].transpose(0, 1).flatten(1)
    assert given.mean(1).abs().max() < 1e-2 and (given.std(1, correction=0) - 1).abs().max() < 1e-2


def test_what_follows_an_item_in_its_window_is_the_end_of_silence(tmp_path: Path) -> None:
    """Latents are normalised, and those of silence are already."""
    write_cache(tmp_path, [("a.wav", torch.arange(5.0).expand(2, -1)), ("b.wav", torch.arange(20.0).expand(2, -1))])
    representation = latents_of(2)
    representation.normalise, representation.silence = lambda z: (z - 1) / 2, -torch.arange(100.0, 108.0).expand(2, -1)
    x0 = LatentWindows([tmp_path], representation).windows([0, 1], map(random.Random, range(2)))["x0"]
    assert x0[0].tolist() == [[-0.5, 0.0, 0.5, 1.0, 1.5, -105.0, -106.0, -107.0]] * 2
    assert x0[1, 0].diff().tolist() == [0.5] * 7 and torch.equal(x0[1, 0], x0[1, 1])


def test_a_batch_has_windows_of_one_length_that_holds_its_items(tmp_path: Path) -> None:
    """The shortest that leaves silence after them, or one longer where they are few; an epoch has each item once."""
    sizes = [5, 12, 13, 24, 25, 60, 61, 20, 30, 6, 7, 50]
    latents = [(f"{size}.wav", torch.full((2, size), float(size))) for size in sizes]
    write_cache(tmp_path, latents)
    representation = latents_of(2)
    representation.shape, representation.silence = (2, 64), torch.zeros(2, 64)
    windows = LatentWindows([tmp_path], representation, (32, 20, 64))
    shortest = {size: next((n for n in (20, 32, 64) if size + 8 <= n), 64) for size in sizes}
    drawn: list[float] = []
    for number in range(20):
        whole = windows.batch(number, 0, 1, 4, seed=3)
        halves = [windows.batch(number, rank, 2, 2, seed=3) for rank in (0, 1)]
        assert torch.equal(whole["x0"], torch.cat([half["x0"] for half in halves]))
        items = whole["x0"].amax((1, 2)).tolist()
        wanted = [shortest[int(item)] for item in items]
        assert max(wanted) == whole["x0"].shape[2] and wanted.count(max(wanted)) >= 1
        drawn += items
        if number % 3 == 2:  # four of the shortest, three of the next, which go with the five others: three batches
            assert sorted(drawn) == sorted(map(float, sizes))
            drawn.clear()
    assert windows.draw(range(2), 0)["x0"].shape == (2, 2, 64)


def test_each_epoch_visits_every_file(folder: Path) -> None:
    all_crops = crops(folder)
    for epoch in range(5):
        lengths = sorted(round(all_crops.crop(3 * epoch + n).seconds_total) for n in range(3))
        assert lengths == [1, 2, 3]


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    """One good mono file of 2 s at 48 kHz, one of each fault, and a missing one."""
    noise = 0.1 * np.random.default_rng(0).standard_normal((2, 44100))
    clipped = np.clip(20 * noise, -0.9999, 0.9999)
    straddling = 0.5 * np.ones((1, (1 << 18) + 10))
    straddling[:, (1 << 18) - 1 : (1 << 18) + 2] = 0.9999
    write_audio(tmp_path / "good.wav", noise[:1].repeat(2, 1)[:, : 2 * 44100], 44100)
    write_audio(tmp_path / "silent.flac", 0 * noise, 48000)
    write_audio(tmp_path / "clipped.wav", clipped, 44100)
    write_audio(tmp_path / "straddling.wav", straddling, 44100)
    write_audio(tmp_path / "uncaptioned.wav", noise, 44100)
    (tmp_path / "broken.wav").write_bytes((tmp_path / "good.wav").read_bytes()[:9999])
    names = ["good.wav", "silent.flac", "clipped.wav", "straddling.wav", "broken.wav", "missing.wav"]
    rows = [{"file_name": n, "text": "a sound"} for n in names] + [{"file_name": "uncaptioned.wav", "text": " "}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_validation_counts_and_names_every_fault(faulty: Path) -> None:
    report = validate(faulty)
    found = {fault: sorted(p.name for p in paths) for fault, paths in report.faults.items()}
    assert found == {
        "broken": ["broken.wav", "missing.wav"],
        "silent": ["silent.flac"],
        "clipped": ["clipped.wav", "straddling.wav"],
        "without caption": ["uncaptioned.wav"],
    }
    assert report.files == 7
    assert dict(report.rates) == {44100: 4, 48000: 1}
    assert dict(report.channels) == {1: 2, 2: 3}
    lengths = [2.0, 44100 / 48000, 1.0, ((1 << 18) + 10) / 44100, 1.0]
    assert report.seconds == pytest.approx(sum(lengths))
    assert (report.shortest, report.longest) == pytest.approx((min(lengths), max(lengths)))


def test_validate_dataset_command(faulty: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Broken files give exit status 1, a data set that is not there one line and 2."""
    assert cli.main(["validate-dataset", str(faulty), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["files"] == 7
    assert cli.main(["validate-dataset", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "without caption  3" in out and "44100 Hz: 3" in out
    assert cli.main(["validate-dataset", str(folder / "nowhere")]) == 2


def test_validation_names_what_a_text_encoder_does_not_read(
    folder: Path, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "warm slow piano " * 20 + "fast techno drums"
    rows = [{"file_name": str(folder / f"{i}.wav"), "text": text} for i, text in enumerate(("warm", long, "slow"))]
    write_manifest(tmp_path, "\n".join(map(json.dumps, rows)), "metadata.jsonl")
    report = validate(tmp_path, model=str(tiny_bundle))
    assert [p.name for p in report.faults["caption cut"]] == ["1.wav"]
    assert len(report.unread) == 1 and long.endswith(report.unread[0]) and len(report.unread[0]) > 100
    assert cli.main(["validate-dataset", str(tmp_path), "--model", str(tiny_bundle)]) == 0
    out = capsys.readouterr().out
    assert "caption cut      1" in out and "fast techno drums" in out
    assert "caption cut" not in validate(tmp_path).faults
    shutil.copytree(tiny_bundle, tmp_path / "odd")
    config = yaml.safe_load((tmp_path / "odd" / "config.yaml").read_text())
    (tmp_path / "odd" / "config.yaml").write_text(yaml.safe_dump(config | {"clap": {"max_tokens": "many"}}))
    with pytest.raises(UserError, match=r"config\.yaml: key 'clap\.max_tokens' must be a whole number, got 'many'"):
        validate(tmp_path, model=str(tmp_path / "odd"))


def write_shard(folder: Path, tar_path: Path, texts: dict[str, str]) -> None:
    """A WebDataset shard of the folder's files, with a text file of their own names."""
    with tarfile.open(tar_path, "w") as tar:
        for path in sorted(folder.glob("*.wav")):
            tar.add(path, f"sub/{path.name}")
        for name, text in texts.items():
            member = tarfile.TarInfo(f"sub/{name}")
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))


def assert_reads_the_same(items: list[Item], folder: Path) -> None:
    """Whole and from the middle, as from the files themselves."""
    for index, item in enumerate(items):
        for start, seconds in ((0.0, None), (0.31, 0.2)):
            expected = read_audio(folder / f"{index}.wav", 44100, start, seconds)
            assert torch.equal(read_audio(item.path, 44100, start, seconds), expected)
        assert audio_info(item.path) == audio_info(folder / f"{index}.wav")


def test_shards_are_read_by_seeking(folder: Path, tmp_path: Path) -> None:
    """Texts come from .json or .txt of the same key; a shard's audio equals the files'."""
    texts = {"0.json": '{"text": "a", "captions": ["a", "b"]}', "1.txt": "c\n"}
    for number in ("00", "01"):
        write_shard(folder, tmp_path / f"part-{number}.tar", texts)
    for source in (tmp_path, tmp_path / "part-{00..01}.tar", f"file://{tmp_path}/part-{{00..01}}.tar"):
        items = read_items(source)
        assert [i.captions for i in items] == 2 * [("a", "b"), ("c",), ()]
        assert_reads_the_same(items[:3], folder)
    assert str(items[0].path).endswith("part-00.tar/sub/0.wav")
    crops = Crops(read_items(tmp_path), 44100, SAMPLES, seed=0)
    assert crops.batch(0, 4).shape == (4, 2, SAMPLES)


def test_a_key_is_the_name_without_its_last_suffix(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names with several dots, a byte order mark, texts without audio, hidden files; two files of a key are refused."""
    for name in ("song.v1", "song.v2"):
        shutil.copy(folder / "0.wav", tmp_path / f"{name}.wav")
    texts = {"song.v2.json": '\ufeff{"text": "two"}', "song.v1.txt": "\ufeffone", "song.txt": "lost"}
    write_shard(tmp_path, tmp_path / "a.tar", texts | {"._song.v1.wav": "no audio", "cover.jpg": ""})
    items = read_items(tmp_path / "a.tar")
    assert [(item.name, item.captions) for item in items] == [("song.v1.wav", ("one",)), ("song.v2.wav", ("two",))]
    said = capsys.readouterr().err
    assert "2 files left out, no audio by their names: 1 .jpg, 1 hidden" in said
    assert "1 files left out, no audio beside: 1 .txt" in said
    for other in ("song.v1.flac", "song.v1.wav"):
        write_shard(tmp_path, tmp_path / "b.tar", {other: ""})
        with pytest.raises(UserError, match=r"b\.tar: sub/song\.v1\.wav and .* have one key"):
            read_items(tmp_path / "b.tar")


def test_broken_shards_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.tar").write_text("no tar at all" * 100)
    for source, words in ((tmp_path, "text.tar: no shard"), (tmp_path / "none.tar", "none.tar: no shard")):
        with pytest.raises(UserError, match=words):
            read_items(source)


def test_hugging_face_data_sets_are_read(folder: Path, tmp_path: Path) -> None:
    """What `save_to_disk` wrote, with the audio's bytes inside; captions from its columns."""
    import datasets

    binary, text = datasets.Value("binary"), datasets.Value("string")
    features = datasets.Features({"sound": {"bytes": binary, "path": text}, "text": text})
    rows = {
        "sound": [{"bytes": (folder / f"{i}.wav").read_bytes(), "path": None} for i in range(3)],
        "text": ["a", "b", ""],
    }
    table = datasets.Dataset.from_dict(rows, features=features)
    table.cast_column("sound", datasets.Audio()).save_to_disk(tmp_path / "set")
    items = read_items(tmp_path / "set")
    assert [i.captions for i in items] == [("a",), ("b",), ()]
    assert_reads_the_same(items, folder)
    table = table.cast_column("sound", datasets.Audio())
    for splits in ({"test": table.select([0]), "train": table}, {"only": table}):
        datasets.DatasetDict(splits).save_to_disk(tmp_path / "splits")
        assert [i.captions for i in read_items(tmp_path / "splits")] == [("a",), ("b",), ()]
        shutil.rmtree(tmp_path / "splits")
    datasets.DatasetDict({"x": table, "y": table}).save_to_disk(tmp_path / "splits")
    with pytest.raises(UserError, match="has the splits x, y"):
        read_items(tmp_path / "splits")
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "silent")
    with pytest.raises(UserError, match="no column of audio"):
        read_items(tmp_path / "silent")
