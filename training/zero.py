"""Gradients and optimizer state shared out by DeepSpeed (ZeRO-2; Rajbhandari et al. 2020, arXiv 1910.02054).

Every process keeps the whole weights, in float32, and a slice of the rest.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stable_audio_lite.errors import UserError
from training.muon import Muon
from training.task import RunConfig

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Zero:
    """AdamW of which each process does a part; to a checkpoint it is the AdamW that it was made of.

    Attributes:
        engine: the module as it has to be called.
        param_groups: the one of all trained parameters.

    Raises:
        UserError: DeepSpeed is not installed, or the run asks for what it can't do here.
    """

    def __init__(self, module: nn.Module, optimizer: Optimizer, run: RunConfig, batch_size: int):
        if isinstance(optimizer, Muon):
            raise UserError("muon_lr: needs whole matrices, DEEPSPEED has parts of them; take FSDP, or leave it out")
        if run.precision == "fp16":
            raise UserError("precision: fp16 is not for DEEPSPEED; choose bf16 or no")
        try:
            import deepspeed
        except ImportError as error:
            raise UserError("distributed_type: DEEPSPEED needs a package; pip install -e '.[deepspeed]'") from error
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        config = {
            "train_micro_batch_size_per_gpu": batch_size,
            "gradient_clipping": run.max_grad_norm,
            "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True,
            "torch_autocast": {"enabled": run.precision == "bf16", "dtype": "bfloat16"},
        }
        self.accumulate, self.given = run.accumulate, 0
        self.optimizer = optimizer  # soon of one flat parameter, this process's slice of all
        self.param_groups = [group | {"params": list(group["params"])} for group in optimizer.param_groups]
        self.engine, self.slices, _, _ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)

    def backward(self, loss: Tensor, finite: bool) -> None:
        """Add the gradient of a batch's `loss`; one that is not `finite` spoils the update, and `step` drops it."""
        self.given += 1
        self.engine.set_gradient_accumulation_boundary(self.given == self.accumulate)
        self.engine.backward(loss if finite else loss * math.nan)

    def norm(self) -> Tensor:
        """Norm of the whole gradient, before clipping."""
        norm = torch.as_tensor(self.slices.scaled_global_norm())
        return torch.where(norm < 0, math.nan, norm)  # DeepSpeed has -1 for what is not finite

    def step(self) -> None:
        """Clip the gradient and update the weights; a gradient that is not finite is dropped instead."""
        self.optimizer.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        self.engine.step()
        self.given = 0

    def zero_grad(self) -> None:
        """Drop what `step` was not called for because it is not finite."""
        if self.given:
            self.step()

    def state_dict(self) -> dict[str, Any]:
        """That of the whole AdamW, for which all processes have to ask."""
        from deepspeed.utils import safe_get_full_optimizer_state

        state = {}
        for own in self.optimizer.state.values():
            for i, parameter in enumerate(self.param_groups[0]["params"]):
                moments = {name: safe_get_full_optimizer_state(parameter, name) for name in _MOMENTS}
                state[i] = {"step": float(own["step"])} | moments
        return {"state": state, "param_groups": self.param_groups}

    def load_state_dict(self, whole: dict[str, Any]) -> None:
        """Take this process's slices of what `state_dict` gave, and of the weights, which are loaded before."""
        from deepspeed.utils import safe_set_full_optimizer_state

        self.slices.refresh_fp32_params()
        self.optimizer.state.clear()
        if state := whole["state"]:
            (own,) = self.optimizer.param_groups[0]["params"]
            moments = {name: torch.zeros_like(own) for name in _MOMENTS}
            self.optimizer.state[own] = {"step": torch.tensor(float(state[0]["step"]))} | moments
            # DeepSpeed finds a parameter's share of the moments once it is told where they are.
            self.slices._hp_optimizer_states_linked = False
            self.slices._lazy_init_hp_params_optimizer_state()
        for i, entry in state.items():
            parameter = self.param_groups[0]["params"][i]
            for name in _MOMENTS:
                safe_set_full_optimizer_state(parameter, entry[name].to(parameter.device), name)
