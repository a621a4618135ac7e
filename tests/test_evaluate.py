"""The evaluation command: the same figures however it is run, odd files, calibration, cache, what is missing."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from test_embedders import openl3_file

from evaluation import run as command
from evaluation import store
from evaluation.embedders.clap import ClapEmbedder
from evaluation.embedders.passt import PaSST, PaSSTEmbedder
from evaluation.embedders.streams import TargetLevel
from evaluation.evaluate import evaluate
from evaluation.metrics import description, levels
from evaluation.metrics.frechet import Gaussian, frechet_distance
from evaluation.metrics.scores import divergence, divergence_of_others
from evaluation.result import Result, load_result, result_table
from evaluation.run import add_arguments, options_of
from stable_audio_lite.audio.io import write_audio
from stable_audio_lite.bundle import SHIPPED, save_bundle
from stable_audio_lite.clap.checkpoints import load_clap, save_transformers, split_clap
from stable_audio_lite.clap.model import Clap
from stable_audio_lite.clap.tokenizer import train_tokenizer
from stable_audio_lite.errors import UserError
from stable_audio_lite.files import save_tensors
from stable_audio_lite.systems import load_model_config

pytestmark = pytest.mark.filterwarnings("ignore:Input image size", "ignore:stft with")

ROOT = Path(__file__).parents[1]
TINY = ROOT / "configs" / "stable_audio" / "tiny.yaml"
METRICS = "fd_openl3,fd_clap,kl_passt,clap_score"
RATE = 44100


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small random weights under the names and in the formats of the published ones, and a CLAP's folder."""
    pytest.importorskip("hear21passt")
    folder = tmp_path_factory.mktemp("weights")
    openl3_file(folder / "torchopenl3_mel256_music_512.pth.tar")
    torch.manual_seed(0)
    passt = PaSST(width=64, depth=1, classes=527)
    with torch.no_grad():
        for parameter in passt.net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    torch.save(passt.net.state_dict(), folder / "passt-s-f128-p16-s10-ap.476-swa.pt")
    save_transformers(Clap(load_model_config(TINY).clap, train_tokenizer(["a tone", "noise"], 280)), folder / "clap")
    return folder


def tone(number: int, seconds: float, rate: int = RATE) -> np.ndarray:
    rng, time = np.random.default_rng(number), np.arange(round(seconds * rate)) / rate
    left = 0.3 * np.sin(2 * np.pi * 110 * (number + 1) * time) + 0.02 * rng.standard_normal(len(time))
    return np.stack((left, 0.5 * left))


@pytest.fixture(scope="module")
def music(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`real` with metadata.jsonl, and `made`, whose files store the prompts of the recordings."""
    folder = tmp_path_factory.mktemp("music")
    rows = []
    for number in range(6):
        write_audio(folder / "real" / f"{number}.wav", tone(number, 1 + 0.2 * number), RATE)
        rows.append({"file_name": f"{number}.wav", "text": f"a tone of {110 * (number + 1)} hertz"})
    (folder / "real" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number in range(6):
        settings = {"prompt": rows[number]["text"], "seconds": 1.5, "seconds_total": 4.0, "seconds_start": 0.0}
        write_audio(folder / "made" / f"x{number}.flac", tone(number + 7, 1.5)[::-1], RATE, settings)
    return folder


@pytest.fixture
def run(weights: Path, tmp_path: Path) -> Callable[..., Result]:
    """`evaluate` with the weights and a cache of its own, or the one given."""

    def evaluated(*arguments: object) -> Result:
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        fixed = ["--weights", weights, "--clap", weights / "clap", "--device", "cpu", "--cache", tmp_path / "cache"]
        given = [*fixed, "-o", tmp_path / "result.json", "--metrics", METRICS, *arguments]
        result = evaluate(options_of(parser.parse_args([str(a) for a in given])))
        assert result is not None
        return result

    return evaluated


def values(result: Result) -> dict[str, float]:
    """Every number of the metrics, calibration and intervals included."""
    found = {}
    for figure in (result.metric(name) for name in METRICS.split(",")):
        assert figure is not None, result.missing
        found |= {f"{figure.name} {k}": getattr(figure, k) for k in ("value", "low", "high", "n")}
        found |= {f"{figure.name} {k}": v for k, v in figure.baselines.items()}
    return found


def test_the_same_sounds_have_no_distance(run, music: Path) -> None:
    result = run(music / "real", music / "real")
    for name in ("fd_openl3", "fd_clap", "kl_passt"):
        assert result.metric(name).value == pytest.approx(0, abs=1e-6) and result.metric(name).n >= 6
        assert result.metric(name).baselines["noise"] > 1e-3


def test_figures_depend_on_neither_batch_nor_workers(run, music: Path, tmp_path: Path) -> None:
    one = values(run(music / "made", music / "real", "--workers", 1, "--batch", 1))
    other = values(run(music / "made", music / "real", "--workers", 3, "--batch", 5, "--cache", tmp_path / "other"))
    assert other == pytest.approx(one, rel=1e-6, abs=1e-6)
    assert one["fd_openl3 value"] > 1e-3 and one["kl_passt value"] > 1e-3


@pytest.mark.long
def test_two_processes_find_what_one_does(run, music: Path, weights: Path, tmp_path: Path) -> None:
    """Over gloo, each with a half of the files."""
    one = run(music / "made", music / "real", "--metrics", "fd_clap,clap_score")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch += ["-m", "evaluation.run"]
    options = ["--clap", weights / "clap", "--cache", tmp_path / "shared", "-o", tmp_path / "both.json"]
    command = [*launch, music / "made", music / "real", "--metrics", "fd_clap,clap_score", *options]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [str(part) for part in command], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    both = load_result(tmp_path / "both.json")
    for figure in one.metrics[:2]:
        assert both.metric(figure.name).value == pytest.approx(figure.value, rel=1e-6, abs=1e-6)
        assert both.metric(figure.name).baselines == pytest.approx(figure.baselines, rel=1e-6, abs=1e-6)
    assert done.stdout.count("\nfd_clap ") == 1 and both.settings == one.settings


def test_figures_are_what_their_definitions_say(run, music: Path, weights: Path) -> None:
    """Computed apart from the evaluation; KL with torch's own, of mean logits."""
    result = run(music / "made", music / "real")
    clap = ClapEmbedder(load_clap(weights / "clap"), TargetLevel())
    made, real = (sorted(p for p in (music / name).iterdir() if p.suffix != ".jsonl") for name in ("made", "real"))
    sounds, recordings = (torch.cat([clap.embed(p)["embedding"] for p in paths]) for paths in (made, real))
    distance = frechet_distance(Gaussian.of(sounds), Gaussian.of(recordings))
    assert result.metric("fd_clap").value == pytest.approx(distance, rel=1e-6)
    texts = clap.embed_text([f"a tone of {110 * (n + 1)} hertz" for n in range(6)])
    cosines = F.cosine_similarity(sounds[:, None], texts[None], dim=2)
    assert result.metric("clap_score").value == pytest.approx(float(cosines.diag().mean()), abs=1e-6)
    others = (cosines.sum() - cosines.diag().sum()) / 30
    assert result.metric("clap_score").baselines["shuffled captions"] == pytest.approx(float(others), abs=1e-6)

    from evaluation.embedders.passt import load_passt

    passt = PaSSTEmbedder(load_passt(weights / "passt-s-f128-p16-s10-ap.476-swa.pt"), TargetLevel(), 4)
    chances = [[passt.embed(p)["logits"].mean(0).softmax(0) for p in paths] for paths in (made, real)]
    pairs = zip(*chances, strict=True)
    divergences = [float(F.kl_div((r + 1e-6).log(), g, reduction="sum")) for g, r in pairs]
    assert result.metric("kl_passt").value == pytest.approx(np.mean(divergences), rel=1e-5)
    shuffled = [
        float(F.kl_div((r + 1e-6).log(), g, reduction="sum"))
        for i, g in enumerate(chances[0])
        for j, r in enumerate(chances[1])
        if i != j
    ]
    assert result.metric("kl_passt").baselines["shuffled captions"] == pytest.approx(np.mean(shuffled), rel=1e-5)


def test_each_figure_stands_beside_real_noise_shuffled_and_vae(run, music: Path, tiny_bundle: Path) -> None:
    result = run(music / "made", music / "real", "--vae", tiny_bundle)
    assert set(result.metric("fd_openl3").baselines) == {"real halves", "generated halves", "noise", "vae"}
    assert set(result.metric("kl_passt").baselines) == {"real halves", "noise", "shuffled captions", "vae"}
    assert set(result.metric("clap_score").baselines) == {"real", "noise", "shuffled captions", "vae"}
    for figure in (result.metric(name) for name in METRICS.split(",")):
        assert figure.low <= figure.value <= figure.high and figure.low < figure.high
        rows = [row for row in result.tables["calibration"] if row["metric"] == figure.name]
        assert {row["baseline"]: row["value"] for row in rows} == figure.baselines
    assert result.metric("fd_openl3").baselines["real halves"] < result.metric("fd_openl3").baselines["noise"]
    assert result.metric("fd_openl3").unit == "windows" and result.metric("clap_score").n == 6


def test_shuffled_recordings_are_never_a_sounds_own() -> None:
    """Also where the prompts come in rounds, so that half the list further the same one stands again."""
    chances = torch.randn(2, 7, generator=torch.Generator().manual_seed(0)).double().log_softmax(1)
    made, real = torch.cat((chances, chances)), torch.cat((chances, chances))
    found = divergence_of_others(made, real, ["a", "b", "a", "b"])
    torch.testing.assert_close(found, divergence(made, real[[1, 0, 1, 0]]))


def test_few_sounds_are_still_beside_recordings_and_noise(run, music: Path, tmp_path: Path) -> None:
    """Two generated sounds give no halves, and one no interval; recordings without captions don't hide noise."""
    for number in range(2):
        write_audio(tmp_path / "two" / f"a{number}.wav", tone(number + 3, 1.0), RATE, {"prompt": f"tone {number}"})
        write_audio(tmp_path / "bare" / f"b{number}.wav", tone(number, 1.0), RATE)
    few = run(tmp_path / "two", music / "real", "--metrics", "fd_clap")
    assert set(few.metric("fd_clap").baselines) == {"real halves", "noise"}
    assert [row["n"] for row in few.tables["calibration"]] == [3, 3]
    bare = run(tmp_path / "two", tmp_path / "bare", "--metrics", "clap_score")
    assert set(bare.metric("clap_score").baselines) == {"noise", "shuffled captions"}
    (tmp_path / "one.txt").write_text("two/a0.wav")
    lone = run(tmp_path / "one.txt", music / "real", "--metrics", "clap_score").metric("clap_score")
    assert np.isfinite(lone.value) and not lone.has_interval
    (tmp_path / "one.txt").write_text(str(music / "made" / "x1.flac"))
    lone = run(tmp_path / "one.txt", music / "real", "--metrics", "kl_passt").metric("kl_passt")
    assert lone.value > 0 and lone.n == 1 and not lone.has_interval


def test_paths_lead_to_the_files_from_anywhere(run, music: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "made").mkdir()
    write_audio(tmp_path / "made" / "a.wav", tone(1, 1.0), RATE, {"prompt": "a tone"})
    (tmp_path / "made" / "b.wav").write_bytes(b"no audio")
    monkeypatch.chdir(tmp_path)
    result = run("made", music / "real", "--training", "made", "--metrics", "clap_score", "--name", "x")
    assert result.generated[0].path == str(tmp_path / "made" / "a.wav") == result.generated[0].nearest[0].path
    assert list(result.left_out) == [str(tmp_path / "made" / "b.wav")]
    assert result.origin["generated"] == str(tmp_path / "made") and result.origin["device"] == "cpu"
    monkeypatch.chdir(tmp_path / "made")
    assert run(".", "--metrics", "clap_score").model == "made"


def test_odd_files_have_a_treatment_and_broken_ones_a_reason(run, music: Path, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    odd = {"mono": (1, RATE, 1.2), "low": (2, 8000, 1.2), "high": (2, 192000, 1.2), "short": (2, RATE, 0.3)}
    for name, (channels, rate, seconds) in odd.items():
        write_audio(folder / f"{name}.wav", tone(1, seconds, rate)[:channels], rate)
    write_audio(folder / "silent.wav", np.zeros((2, RATE)), RATE)
    write_audio(folder / "four.wav", np.concatenate((tone(1, 1.1), tone(2, 1.1))), RATE)
    write_audio(folder / "instant.wav", np.full((2, 1), 0.1), 192000)
    (folder / "broken.wav").write_bytes((folder / "mono.wav").read_bytes()[:3000])
    (folder / "text.flac").write_text("no audio")
    soundfile.write(folder / "nan.wav", np.full((100, 2), np.nan), RATE, subtype="FLOAT")
    soundfile.write(folder / "empty.wav", np.zeros((0, 2)), RATE)
    result = run(folder, music / "real")
    treated = {Path(sound.path).stem: " ".join(sound.treatment) for sound in result.generated}
    words = {
        "mono": "mono",
        "low": "nothing above 4000 Hz",
        "high": "192000 Hz: resampled",
        "short": "0.30 s: filled up",
    }
    words |= {"silent": "silent", "four": "4 channels: mixed by ITU-R BS.775", "instant": "0.00 s"}
    assert treated.keys() == words.keys() and all(words[name] in treated[name] for name in words)
    reasons = {Path(path).name: reason for path, reason in result.left_out.items()}
    assert reasons.keys() == {"broken.wav", "text.flac", "nan.wav", "empty.wav"}
    assert "truncated" in reasons["broken.wav"] and "NaN" in reasons["nan.wav"]
    for name in ("fd_openl3", "fd_clap"):
        assert np.isfinite(result.metric(name).value), name
    assert all(reason in result_table(result) for reason in reasons.values())


def test_prompts_and_lengths_come_from_files_and_lists(run, music: Path, tmp_path: Path) -> None:
    result = run(music / "made", music / "real", "--metrics", "clap_score")
    first = result.generated[0]
    assert (first.prompt, first.requested) == ("a tone of 110 hertz", 1.5)
    assert (first.seconds, first.sample_rate, first.channels) == (1.5, RATE, 2)
    for number in range(2):
        write_audio(tmp_path / "plain" / f"{number}.wav", tone(number, 1.0), RATE)
    plain = run(tmp_path / "plain", music / "real", "--metrics", "clap_score")
    assert [sound.prompt for sound in plain.generated] == ["a tone of 110 hertz", "a tone of 220 hertz"]  # by name
    row = {"file_name": str(tmp_path / "plain" / "1.wav"), "text": "own words", "seconds_total": 0.5}
    (tmp_path / "list.jsonl").write_text(json.dumps(row))
    listed = run(tmp_path / "list.jsonl", music / "real", "--metrics", "clap_score")
    assert [(s.prompt, s.requested) for s in listed.generated] == [("own words", 0.5)]
    (tmp_path / "list.txt").write_text(f"plain/0.wav\n{tmp_path}/plain/1.wav\n")
    assert len(run(tmp_path / "list.txt", music / "real", "--metrics", "clap_score").generated) == 2


def test_what_is_missing_is_told_and_the_rest_goes_on(run, music: Path, tmp_path: Path, tiny_bundle: Path) -> None:
    result = run(music / "made", music / "real", "--weights", tmp_path, "--metrics", METRICS)
    assert (
        result.missing.keys() == {"fd_openl3", "kl_passt"} and result.metric("fd_clap") and result.metric("clap_score")
    )
    assert "torchopenl3_mel256_music_512.pth.tar" in result.missing["fd_openl3"] and str(tmp_path) in result_table(
        result
    )
    alone = run(music / "made", "--metrics", "fd_clap,clap_score,kl_passt", "--vae", tiny_bundle)
    assert alone.missing.keys() == {"fd_clap", "kl_passt", "vae"} and alone.metric("clap_score")
    write_audio(tmp_path / "one" / "z.wav", tone(1, 1.0), RATE)
    single = run(tmp_path / "one", music / "real")
    assert single.missing.keys() == {"fd_openl3", "fd_clap", "kl_passt", "clap_score"}


def test_the_cache_is_used_and_a_damaged_file_of_it_made_again(run, music: Path, tmp_path: Path, monkeypatch) -> None:
    done = []
    write = store.Store.write
    monkeypatch.setattr(store.Store, "write", lambda self, *a: (done.append(a[1].name), write(self, *a)))
    first = values(run(music / "made", music / "real"))
    assert done.count("clap") == 6 + 6 + 6 and done.count("description") == 6 + 6
    files = sorted((tmp_path / "cache" / "clap").rglob("*.safetensors"))
    files[0].write_bytes(files[0].read_bytes()[:50])
    files[1].unlink()
    done.clear()
    assert values(run(music / "made", music / "real")) == first and done == ["clap", "clap"]
    done.clear()
    run(music / "made", music / "real", "--level", "peak:-3", "--metrics", "fd_clap")
    assert done == ["clap"] * 18


def test_what_another_version_made_is_not_used(run, music: Path, monkeypatch) -> None:
    """Of a package whose version the result names, or of the code that listens."""
    run(music / "made", "--metrics", "clap_score")
    done = []
    write = store.Store.write
    monkeypatch.setattr(store.Store, "write", lambda self, *a: (done.append(a[1].name), write(self, *a)))
    for module in (description, levels):
        with monkeypatch.context() as other:
            other.setattr(module, "__file__", __file__)
            changed = run(music / "made", "--metrics", "clap_score").settings["description"]
        assert done == ["description"] * 6 and changed != description.Describer().settings
        done.clear()
    monkeypatch.setattr(store, "versions", lambda: {"torch": "9"})
    run(music / "made", "--metrics", "clap_score")
    assert sorted(done) == ["clap"] * 12 + ["description"] * 6


def test_processes_wait_for_those_with_more_to_do(monkeypatch, tmp_path: Path) -> None:
    """Not for the ten minutes that torch gives them, after which all would end."""
    given = {}

    def state(**settings: object) -> None:
        given.update(settings)
        raise UserError("enough")

    monkeypatch.setattr("evaluation.evaluate.PartialState", state)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with pytest.raises(UserError, match="enough"):
        evaluate(options_of(parser.parse_args(["made", "-o", str(tmp_path / "r.json")])))
    assert given["timeout"].days >= 1


def test_an_evaluation_goes_on_where_it_was_stopped(run, music: Path, monkeypatch) -> None:
    embed, left = ClapEmbedder.embed, [5]

    def stopping(self: ClapEmbedder, source: object) -> dict[str, torch.Tensor]:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return embed(self, source)

    monkeypatch.setattr(ClapEmbedder, "embed", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(music / "made", music / "real", "--metrics", "fd_clap", "--workers", 1)
    left[0] = 13  # of 18
    assert run(music / "made", music / "real", "--metrics", "fd_clap", "--workers", 1).metric("fd_clap")


def test_statistics_stand_for_recordings_of_the_same_settings(run, music: Path, tmp_path: Path) -> None:
    own = run(music / "made", music / "real", "--save-statistics", tmp_path / "kept")
    for name in ("openl3", "clap"):
        again = run(music / "made", tmp_path / "kept" / f"{name}.npz", "--metrics", "fd_openl3,fd_clap")
        assert again.metric(f"fd_{name}").value == pytest.approx(own.metric(f"fd_{name}").value, rel=1e-6)
        (other,) = again.missing
        assert other != f"fd_{name}" and "other settings: " in again.missing[other]
    (tmp_path / "one.txt").write_text(str(music / "real" / "1.wav"))
    few = run(music / "made", tmp_path / "one.txt", "--metrics", "clap_score", "--save-statistics", tmp_path / "few")
    assert "at least 2" in few.missing["statistics"] and not (tmp_path / "few").exists()
    louder = run(music / "made", tmp_path / "kept" / "clap.npz", "--level", "peak:-3", "--metrics", "fd_clap")
    assert "level" in louder.missing["fd_clap"]
    published = {"mu_ref": np.zeros(7), "sigma_ref": np.eye(7)}
    np.savez(tmp_path / "published.npz", **published)
    assert "7 dimensions" in run(music / "made", tmp_path / "published.npz", "--metrics", "fd_clap").missing["fd_clap"]
    np.savez(tmp_path / "published.npz", mu_ref=np.zeros(16), sigma_ref=np.eye(16))
    assert run(music / "made", tmp_path / "published.npz", "--metrics", "fd_clap").metric("fd_clap").value > 0


def test_a_place_for_statistics_is_tried_before_the_work(run, music: Path, monkeypatch) -> None:
    monkeypatch.setattr("evaluation.evaluate.read_items", pytest.fail)
    with pytest.raises(UserError, match="/proc/kept"):
        run(music / "made", music / "real", "--metrics", "fd_clap", "--save-statistics", "/proc/kept")


def test_distances_are_extrapolated_to_infinitely_many_sounds(run, music: Path) -> None:
    result = run(music / "real", music / "made", "--metrics", "fd_clap,fd_inf_clap")
    plain, infinite = result.metric("fd_clap"), result.metric("fd_inf_clap")
    assert infinite.value < plain.value and infinite.low < infinite.value < infinite.high


def test_nearest_training_sounds_are_listed_beside_those_of_held_out_recordings(
    run, music: Path, tmp_path: Path, monkeypatch
) -> None:
    """A copy is found, whatever its name and level; recordings that were learned from are no yardstick."""
    for number in range(4):
        write_audio(tmp_path / "learned" / f"{number}.wav", tone(number, 1 + 0.2 * number), RATE)
    write_audio(tmp_path / "learned" / "other.wav", tone(20, 1.0), RATE)
    write_audio(tmp_path / "made" / "copy.wav", 0.5 * tone(3, 1.6), RATE)
    write_audio(tmp_path / "made" / "own.wav", tone(9, 1.6), RATE)
    done = []
    write = store.Store.write
    monkeypatch.setattr(store.Store, "write", lambda self, *a: (done.append(a[1].name), write(self, *a)))
    arguments = (tmp_path / "made", music / "real", "--training", tmp_path / "learned", "--metrics", "fd_openl3")
    result = run(*arguments)
    # Training sounds that are recordings too are heard with them, once; all others by CLAP alone.
    assert done.count("clap") == 2 + 6 + 1 and done.count("openl3") == 2 + 6 + 6
    copy, own = sorted(result.generated, key=lambda sound: sound.path)
    path, cosine = copy.nearest[0].path, copy.nearest[0].cosine
    assert path == str(tmp_path / "learned" / "3.wav") and cosine > 0.999 and own.nearest[0].cosine < cosine
    assert [len(sound.nearest) for sound in result.generated] == [3, 3]
    real = {Path(sound.path).stem: sound.nearest for sound in result.reference}
    assert [name for name, near in sorted(real.items()) if near] == ["4", "5"]
    usual = (real["4"][0].cosine + real["5"][0].cosine) / 2
    assert result.metric("nearest_training").baselines["real"] == pytest.approx(usual)
    assert f"copy.wav, of {path}" in result_table(result)
    assert result.settings["training"]["sounds"] == 5 and result.settings["similarity"] == "clap"
    done.clear()
    assert run(*arguments).generated == result.generated and done == []
    all_learned = run(tmp_path / "made", tmp_path / "learned", "--training", tmp_path / "learned")
    assert "all of them are in --training" in all_learned.missing["nearest_training of recordings"]
    assert all_learned.metric("nearest_training").baselines == {}


def test_training_sounds_without_an_embedder_are_not_searched(music: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(SHIPPED, "starter", tmp_path / "nothing")
    arguments = ["--metrics", "fd_openl3", "--weights", tmp_path, "--training", music / "real"]
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    given = [music / "made", music / "real", *arguments, "--cache", tmp_path, "-o", tmp_path / "r.json"]
    result = evaluate(options_of(parser.parse_args([str(a) for a in (*given, "--device", "cpu")])))
    assert "nothing: these weights are missing" in result.missing["nearest_training"] and not any(
        s.nearest for s in result.generated
    )


def test_diversity_stands_beside_that_of_recordings(run, music: Path, tmp_path: Path) -> None:
    for number in range(6):
        write_audio(tmp_path / "alike" / f"{number}.wav", tone(1, 1.5) * (1 + 0.01 * number), RATE)
    alike = run(tmp_path / "alike", music / "real", "--metrics", "fd_clap").metric("diversity")
    varied = run(music / "made", music / "real", "--metrics", "fd_clap").metric("diversity")
    assert alike.value == pytest.approx(1, abs=1e-3) and varied.value > alike.value + 1e-3
    assert alike.n == varied.n == 6
    assert alike.baselines == varied.baselines and alike.baselines["real"] > 1
    assert run(music / "made", "--metrics", "clap_score").metric("diversity").baselines == {}


def test_settings_tell_whatever_changes_figures(run, music: Path) -> None:
    one = run(music / "made", music / "real", "--metrics", "fd_clap").settings
    assert {"weights", "sample_rate", "channels", "window", "level"} <= one["clap"].keys()
    assert one["level"] == "peak -1" and one["resampler"] == "soxr HQ" and "torch" in one["versions"]
    other = run(music / "made", music / "made", "--metrics", "fd_clap", "--level", "peak:-3").settings
    assert one["prompts"] == other["prompts"] and one["prompts"]["sounds"] == 6
    assert run(music / "real", music / "made", "--metrics", "fd_clap").settings["prompts"] == one["prompts"]
    assert one["reference"] != other["reference"] and one["clap"]["weights"] == other["clap"]["weights"]


@pytest.mark.usefixtures("declared_commands")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "real"], "nowhere"),
        (["made", "nowhere"], "nowhere"),
        (["made", "nowhere.npz"], "nowhere.npz"),
        (["made", "real", "--metrics", "fd_magic"], "fd_magic"),
        (["made", "real", "--batch", "0"], "--batch"),
        (["made", "real", "--level", "loud"], "--level"),
        (["made", "real", "-o", "result.txt"], "result.txt"),
        (["made", "real", "--clap", "nowhere.pt"], "nowhere.pt"),
        (["made", "real", "--openl3", "nowhere.pt"], "nowhere.pt"),
        (["made", "real", "--vae", "nowhere"], "nowhere"),
        (["made", "real", "--device", "toaster"], "toaster"),
        (["made", "real", "-o", "/proc/a.json"], "/proc/a.json"),
        (["made", "real", "-o", "real/metadata.json"], "metadata.json: is there already"),
        (["made", "real", "--cache", "/proc/cache"], "/proc/cache"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(music: Path, weights: Path, monkeypatch, capsys, arguments: list, message: str) -> None:
    monkeypatch.chdir(music)
    (music / "real" / "metadata.json").write_text("mine")
    before = sorted(music.rglob("*"))
    common = ["--metrics", "fd_openl3,fd_clap", "--weights", str(weights), "--device", "cpu"]
    given = common if "--clap" in arguments else [*common, "--clap", str(weights / "clap")]
    cache = [] if "--cache" in arguments else ["--cache", str(weights / "cache")]
    monkeypatch.setattr(sys, "argv", ["run", *given, *cache, *arguments])
    assert command.main() == 2
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").split("\n") if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0]
    assert sorted(music.rglob("*")) == before


def test_the_command_stores_and_prints(weights: Path, music: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    options = ["--metrics", "clap_score", "--clap", weights / "clap", "--cache", tmp_path, "-o", tmp_path / "a.json"]
    arguments = ["run", music / "made", music / "real", *options, "--name", "mine", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [str(part) for part in arguments])
    assert command.main() == 0
    assert load_result(tmp_path / "a.json").model == "mine"
    out = capsys.readouterr().out
    assert "clap_score" in out and "shuffled captions" in out and str(tmp_path / "a.json") in out


def test_without_downloads_it_measures_what_the_starters_clap_can(
    music: Path, weights: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """Nothing measured, or not what was asked for, is a failure; few sounds are warned of."""
    config, clap = load_model_config(TINY), load_clap(weights / "clap")
    save_bundle(tmp_path / "starter", config, split_clap(clap), tokenizer_json=clap.tokenizer.to_str())
    monkeypatch.setitem(SHIPPED, "starter", tmp_path / "starter")
    fixed = ["--weights", tmp_path, "--cache", tmp_path / "cache", "--device", "cpu", "-o", tmp_path / "a.json"]

    def status(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", [str(part) for part in ("run", *arguments, *fixed, "--overwrite")])
        return command.main()

    assert status(music / "made", music / "real") == 0
    result, out = load_result(tmp_path / "a.json"), capsys.readouterr().out
    assert result.metric("fd_clap") and result.metric("clap_score")
    assert "warning: 6 generated sounds and 6 recordings are few" in out
    assert status(music / "made", music / "real", "--metrics", "fd_clap,kl_passt") == 2
    assert "error: not measured: kl_passt;" in capsys.readouterr().err and load_result(tmp_path / "a.json")
    assert status(music / "made", "--metrics", "fd_clap") == 2
    (tmp_path / "one").mkdir()
    write_audio(tmp_path / "one" / "z.wav", tone(1, 1.0), RATE)
    (tmp_path / "a.json").unlink()
    assert status(tmp_path / "one") == 2
    assert "error: not measured: anything;" in capsys.readouterr().err and not (tmp_path / "a.json").exists()


def test_a_recording_that_fails_while_it_is_embedded_is_left_out(run, music: Path, monkeypatch) -> None:
    embed = ClapEmbedder.embed

    def failing(self: ClapEmbedder, source: Path) -> dict[str, torch.Tensor]:
        if Path(source).name == "3.wav":
            raise UserError(f"{source}: gone")
        return embed(self, source)

    monkeypatch.setattr(ClapEmbedder, "embed", failing)
    result = run(music / "made", music / "real", "--metrics", "fd_clap")
    assert len(result.reference) == 5 and "gone" in next(iter(result.left_out.values()))
    assert result.metric("fd_clap").n == 6


def test_weights_have_one_hash_whatever_file_they_lie_in(run, music: Path, weights: Path, tmp_path: Path) -> None:
    state = torch.load(weights / "torchopenl3_mel256_music_512.pth.tar", weights_only=True)
    save_tensors(tmp_path / "openl3.safetensors", state, {})
    one = run(music / "made", music / "real", "--metrics", "fd_openl3")
    other = run(music / "made", music / "real", "--metrics", "fd_openl3", "--openl3", tmp_path / "openl3.safetensors")
    assert one.settings == other.settings and one.metrics[0] == other.metrics[0]
