"""Weights shared out over the processes (FSDP; Zhao et al. 2023, arXiv 2304.11277), for networks that fill a GPU.

Of every parameter a process keeps one slice, and so of its gradient, its average and its optimizer's state. A part of
the network is whole only while it computes, in float32, so that a step computes what it does without sharding.
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
"""Classes of the parts that are made whole one at a time, and their methods besides `forward` that use weights."""

_SUPPORTED = {"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "false", "FSDP_ACTIVATION_CHECKPOINTING": "false"}


def sharding(parts: Parts) -> bool:
    """Read from the environment if the configuration given to `accelerate launch` asks for FSDP.

    Accelerate itself is then not told. What it would do needs GPUs, takes network and optimizer at once, and takes
    updates and checkpoints out of the loop's hands.

    Raises:
        UserError: the configuration asks for what is not supported, or the trainer has no `parts` to shard.
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
    """Leave each process its slices of `modules`, in place, which have to be the same in all; without `parts`, nothing.

    Returns a function that all processes have to call: it gives the main one the modules, whole (copied to the CPU if
    they are sharded), and the others {}.
    """
    main = accelerator.is_main_process
    if not parts:
        return lambda: modules if main else {}
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    empty = {name: copy.deepcopy(module).to("meta") for name, module in modules.items()}
    mesh = torch.distributed.init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    # Whether weights are made whole once more for the backward pass, or stay whole from the forward pass on.
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
    """Tensors on the CPU, sharded ones whole, for which all processes have to ask; {} where they don't `keep` them."""
    kept = {}
    for name, tensor in tensors.items():
        value = full(tensor)
        if keep:
            kept[name] = value.cpu()
    return kept


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, whose import takes a while."""
    return hasattr(tensor, "device_mesh")


def full(tensor: Any) -> Tensor:
    """The whole of a sharded tensor, for which all processes have to ask; any other as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local(tensor: Any) -> Tensor:
    """This process's slice of a sharded tensor, without copying; any other as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def sharded_like(tensor: Tensor, other: Any) -> Tensor:
    """A whole tensor, the same in all processes, sharded as `other` is."""
    if not is_sharded(other):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)
