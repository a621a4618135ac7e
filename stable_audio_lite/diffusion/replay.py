"""Forwards of a network on CUDA as graphs, whose kernels are launched as one.

A small network's kernels take less time than the processor needs to launch them one by one, and so do those of the
paper's U-Net. The same kernels run on the same numbers, so results are the same to the bit.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_KEPT = 4  # recorded forwards of a network, each of which holds memory for its activations
_recorders: WeakKeyDictionary[nn.Module, Recorder] = WeakKeyDictionary()


def forward(network: Callable[..., Tensor], x: Tensor, t: Tensor, context: Any) -> Tensor:
    """Return `network(x, t, context)` without gradients, as a tensor of its own.

    On a CUDA device the forward of a module is recorded the second time that inputs have the same shapes, and replayed
    from then on; not under autocast, which keeps copies of weights for a while. `context` is None, or tensors and None
    in tuples.
    """
    if not x.is_cuda or not isinstance(network, nn.Module) or torch.is_autocast_enabled("cuda"):
        with torch.inference_mode():  # a millisecond less than `no_grad`, which is much for a small network
            prediction = network(x, t, context)
        return prediction.clone()  # which, unlike that, can be modified and learned from
    return _recorders.setdefault(network, Recorder())(network, x, t, context)


class Recorder:
    """The recorded forwards of one network, those of the latest shapes."""

    def __init__(self) -> None:
        # True: is to be recorded the next time; False: can't be.
        self._recorded: OrderedDict[tuple[object, ...], Recorded | bool] = OrderedDict()
        self._lock = threading.Lock()  # a recorded forward has one place for its inputs

    def __call__(self, network: nn.Module, x: Tensor, t: Tensor, context: Any) -> Tensor:
        """Run or replay the forward; see `forward`."""
        inputs = (x, t, context)
        weights = next(network.parameters()).data_ptr()  # which others may have taken the place of
        key = (weights, *(None if value is None else (value.shape, value.dtype) for value in _leaves(inputs)))
        with self._lock:
            with torch.inference_mode():
                recorded = self._recorded.get(key)
                if recorded is True:
                    recorded = Recorded.of(network, inputs) or False
                prediction = recorded.replay(inputs) if isinstance(recorded, Recorded) else network(*inputs)
            self._recorded[key] = True if recorded is None else recorded
            self._recorded.move_to_end(key)
            while len(self._recorded) > _KEPT:
                self._recorded.popitem(last=False)
            return prediction.clone()


class Recorded:
    """One recorded forward: its graph, and where it reads and writes."""

    def __init__(self, graph: torch.cuda.CUDAGraph, inputs: Any, output: Tensor) -> None:
        self.graph, self.inputs, self.output = graph, inputs, output

    @classmethod
    def of(cls, network: nn.Module, inputs: Any) -> Recorded | None:
        """Record the forward of `inputs`, whose kernels have run before; None where memory is too short for that."""
        own = _copied(inputs)
        with torch.cuda.device(own[0].device):
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
            try:
                # Other threads may go on with the device meanwhile.
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    output = network(*own)
            except torch.OutOfMemoryError:
                return None
        return cls(graph, own, output)

    def replay(self, inputs: Any) -> Tensor:
        """The forward of `inputs`, of the shapes that were recorded; the next call overwrites it."""
        for place, value in zip(_leaves(self.inputs), _leaves(inputs), strict=True):
            if place is not None and value is not None:
                place.copy_(value)
        self.graph.replay()
        return self.output


def _leaves(inputs: Any) -> Iterator[Tensor | None]:
    """Yield what nested tuples hold."""
    if isinstance(inputs, tuple):
        for value in inputs:
            yield from _leaves(value)
    else:
        yield inputs


def _copied(inputs: Any) -> Any:
    """Copy nested tuples, which may be named, and the tensors in them."""
    if isinstance(inputs, tuple):
        values = [_copied(value) for value in inputs]
        return inputs._make(values) if hasattr(inputs, "_make") else tuple(values)  # type: ignore[attr-defined]
    return inputs if inputs is None else inputs.clone()
