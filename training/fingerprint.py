"""The knowledge of a run about itself: what it was trained with, which may not change when it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stable_audio_lite.config import differences, read_yaml, to_dict
from stable_audio_lite.errors import UserError
from stable_audio_lite.weights import state_hash
from training.task import RunConfig, TrainingTask


def fingerprint(run: RunConfig, task: TrainingTask) -> dict[str, Any]:
    """Describe what weights, averages and optimizer state depend on, by the keys of the configuration."""
    facts: dict[str, Any] = {"run": {"ema_decay": "above 0" if run.ema_decay else "0"}} | task.fingerprint()
    for name, optimizer in task.optimizers.items():
        key = "optimizer" if name in task.averaged else f"{name}_optimizer"
        facts[key] = {"muon_lr": None if optimizer.muon_lr is None else "given"}
    frozen = {
        f"{name}.{key}": parameter
        for name, module in task.modules.items()
        for key, parameter in module.named_parameters()
        if not parameter.requires_grad
    }
    if frozen:
        facts["initial"] = f"frozen weights {state_hash(frozen)[:12]}"
    return json.loads(json.dumps(facts))


def check_fingerprint(checkpoint: Path, was: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to go on from `checkpoint`, made by a run with fingerprint `was`, with another one.

    Raises:
        UserError: names what differs, as it was and as it is.
    """
    if found := differences(was, now):
        raise UserError(
            f"{checkpoint}: was trained with something else: {'; '.join(found)}. The checkpoint is whole: set this "
            "back to go on, or train anew in another run.output"
        )


def changed_settings(output: Path, config: Any) -> list[str]:
    """Words for each setting of the run in `output` that differs from when it was last started, if that is known."""
    try:
        return differences(read_yaml(output / "config.yaml"), to_dict(config))
    except UserError:
        return []
