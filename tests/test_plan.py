"""Plans: what autograd keeps, sizes that a real run then has, and nothing written."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from training_runs import load, trainer_of

from stable_audio_lite import cli
from training.plan import FlopCounter, SavedTensorMemory, plan
from training.profile import profile
from training.train_diffusion import DiffusionTask


def test_what_autograd_keeps_is_counted_once_and_given_back() -> None:
    """x * x saves x alone (twice), exp its result, and a weight is no activation."""
    x, weight = torch.randn(1000, requires_grad=True), torch.randn(1000, requires_grad=True)
    with (saved := SavedTensorMemory({weight.untyped_storage().data_ptr()})).hooks:
        y = (x * x).exp() * weight
        assert saved.now == 2 * 4000
        y.sum().backward()
    del y
    assert saved.now == 0 and saved.most == 2 * 4000


def test_operations_are_torchs_own_count() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    layers = torch.nn.Sequential(torch.nn.Conv1d(3, 8, 5), torch.nn.GELU(), torch.nn.Linear(28, 4))
    counts = []
    for counter in (FlopCounter(), FlopCounterMode(display=False)):
        with counter:
            layers(torch.randn(2, 3, 32)).sum().backward()
        counts.append(counter.total if isinstance(counter, FlopCounter) else counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("name", ["vae", "clap", "diffusion"])
def test_sizes_are_those_of_the_run(name: str, data: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    trainer, config_class, settings = trainer_of(name, data, bundles)
    chosen = settings(tmp_path / "run", 1)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(chosen))
    found = plan(tmp_path / "c.yaml", steps=1)
    assert not (tmp_path / "run").exists()
    assert found.trainer == f"train_{name}" and found.steps == 1 and found.done == 0
    assert found.items == 6 and found.step_items == chosen["batch_size"]
    assert found.flops > 1e6
    assert found.gradients == 4 * sum(found.trained.values())
    assert 0 < found.per_item <= found.activations / found.batch_size + 1 and found.largest_batch > 100
    trainer.run(load(config_class, chosen, tmp_path))
    (checkpoint,) = (tmp_path / "run/checkpoints").glob("step_00000001")
    on_disk = sum(file.stat().st_size for file in checkpoint.iterdir())
    # Each file has a header; and in its only step a discriminator that starts later has had no update.
    assert found.checkpoint == pytest.approx(on_disk, rel=0.25)
    assert plan(tmp_path / "c.yaml", steps=1).done == 1


def test_memory_is_that_of_the_longest_windows(
    data: Path, bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of a few lengths: activations are of the fullest, and an item's from two batches of that length."""
    path = tmp_path / "c.yaml"
    chosen = trainer_of("diffusion", data, bundles)[2](tmp_path / "run", 1)
    path.write_text(yaml.safe_dump(chosen))
    whole, drawn = plan(path, steps=1), DiffusionTask.batch

    def shorter(task: DiffusionTask, number: int, rank: int, world: int) -> dict[str, Any]:
        batch, longest = drawn(task, number, rank, world), 3 if task.batch_size == chosen["batch_size"] else 5
        return batch if number == longest else {k: v[..., :4] if k in ("x0", "eps") else v for k, v in batch.items()}

    monkeypatch.setattr(DiffusionTask, "batch", shorter)
    found = plan(path, steps=1)
    assert found.activations == pytest.approx(whole.activations, rel=0.02)
    assert found.per_item == pytest.approx(whole.per_item, rel=0.02)


def test_fsdp_divides_what_is_trained(bundles: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """The weight, its gradient, two moments and an average: 20 bytes, half of them in each of two processes."""
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(trainer_of("diffusion", data, bundles)[2](tmp_path / "run", 1)))
    found = plan(path, steps=1, processes=2)
    own = found.sharded - found.activations - found.frozen_weights
    assert own == pytest.approx(20 / 2 * sum(found.trained.values()), rel=0.01)
    assert found.frozen_weights == pytest.approx(4 * sum(found.frozen.values()), rel=0.01)


@pytest.mark.usefixtures("declared_commands")
def test_the_command_prints_and_refuses(
    data: Path, bundles: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = trainer_of("diffusion", data, bundles)[2](tmp_path / "run", 1000)
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(settings))
    assert cli.main(["plan", str(path), "--steps", "1", "--processes", "2"]) == 0
    out = capsys.readouterr().out
    assert "text_encoder" in out and "with FSDP" in out and "2 x 4 x 1 a step" in out and "1,000 of 1,000 steps" in out
    path.write_text(yaml.safe_dump(settings | {"learning": 1}))
    assert cli.main(["plan", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "c.yaml" in error and "learning" in error
    assert cli.main(["plan", "stable_audio/pre_encode"]) == 2
    assert "pre_encode: has no key 'run', so it trains nothing" in capsys.readouterr().err


def test_a_profile_names_what_takes_the_time() -> None:
    matrix = torch.randn(600, 600)
    found = profile(lambda: [matrix @ matrix for _ in range(10)], torch.device("cpu"), "no")
    assert found.shares[0][0] == "aten::mm" and found.shares[0][1] > 0.5
    assert sum(share for _, share in found.shares) == pytest.approx(1)
    assert [share for _, share in found.shares] == sorted((share for _, share in found.shares), reverse=True)
    begun = time.perf_counter()
    _ = torch.randn(2048, 2048) @ torch.randn(2048, 2048)
    seconds = time.perf_counter() - begun
    assert found.matrix_rate > 0.5 * 2 * 2048**3 / seconds
    assert "aten::mm" in found.as_text() and "all others" in found.as_text()
