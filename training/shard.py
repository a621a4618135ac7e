"""Weights sharded over the processes (FSDP; Zhao et al. 2023, arXiv 2304.11277), for networks that fill a GPU.

A process keeps one slice of every parameter, of its gradient, of its average and of its optimizer's state. A part of
the network is gathered only while it computes, in float32, so that a step has the same result as without sharding.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from stable_audio_lite.errors import UserError

Parts = Mapping[type[nn.Module], tuple[str, ...]]
"""Classes of the parts that are gathered one at a time, and their methods besides `forward` that use weights."""

_SUPPORTED = {"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "false", "FSDP_ACTIVATION_CHECKPOINTING": "false"}


def sharding(parts: Parts) -> bool:
    """Read from the environment if the configuration given to `accelerate launch` asks for FSDP.

    Accelerate itself is not told: its own sharding needs GPUs, takes network and optimizer at once, and takes updates
    and checkpoints out of the loop's hands.

    Raises:
        UserError: the configuration asks for something unsupported, or the trainer has no `parts` to shard.
    """
    if os.environ.pop("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise UserError("distributed_type: DEEPSPEED is not supported; see configs/accelerate/fsdp.yaml")
    if os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    for key, value in _SUPPORTED.items():
        if (given := os.environ.get(key, value).lower()) != value:
            raise UserError(f"{key.lower()}: must be {value}, got {given}; see configs/accelerate/fsdp.yaml")
    if not parts:
        raise UserError("distributed_type: FSDP is for the U-Net of train_diffusion; launch this with --multi_gpu")
    return True


def shard(modules: dict[str, nn.Module], parts: Parts, accelerator: Accelerator) -> Callable[[], dict[str, nn.Module]]:
    """Shard `modules`, which have to be the same in all processes, in place; without `parts`, do nothing.

    Returns a function that all processes have to call: it returns the whole modules in the main one (copied to the CPU
    if they are sharded), and {} in the others.
    """
    main = accelerator.is_main_process
    if not parts:
        return lambda: modules if main else {}
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    empty = {name: copy.deepcopy(module).to("meta") for name, module in modules.items()}
    mesh = torch.distributed.init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    # Gather weights again for the backward pass, or keep them from the forward pass on.
    again = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false"
    for module in modules.values():
        for part in reversed(list(module.modules())):  # the innermost first
            for methods in [methods for cls, methods in parts.items() if isinstance(part, cls)]:
                fully_shard(part, mesh=mesh, reshard_after_forward=again)
                for method in methods:
                    register_fsdp_forward_method(part, method)
        fully_shard(module, mesh=mesh)

    def gather() -> dict[str, nn.Module]:
        states = {name: whole(module.state_dict(), keep=main) for name, module in modules.items()}
        copies = copy.deepcopy(empty) if main else {}
        for name, module in copies.items():
            module.load_state_dict(states[name], assign=True)
        return copies

    return gather


def whole(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Gather tensors on the CPU, or return {} where `keep` is false; all processes have to call this."""
    kept = {}
    for name, tensor in tensors.items():
        value = full(tensor)
        if keep:
            kept[name] = value.cpu()
    return kept


def is_sharded(tensor: Tensor) -> bool:
    """Recognise a DTensor without importing its class, which takes a while."""
    return hasattr(tensor, "device_mesh")


def full(tensor: Any) -> Tensor:
    """Gather a sharded tensor, for which all processes have to call this; any other tensor stays as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local(tensor: Any) -> Tensor:
    """This process's slice of a sharded tensor, without copying; any other tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def sharded_like(tensor: Tensor, other: Any) -> Tensor:
    """Shard a whole tensor, the same in all processes, as `other` is sharded."""
    if not is_sharded(other):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)
