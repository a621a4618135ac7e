"""Forwards of a network on CUDA as graphs, whose kernels are launched as one.

A small network's kernels take less time than the processor needs to launch them one by one, and so do those of the
paper's U-Net. The same kernels run on the same numbers, so results are the same to the bit.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_KEPT = 4  # recorded forwards of a network
_recording = threading.Lock()  # CUDA records one graph at a time


class Recorder:
    """Runs forwards of one network without gradients; on CUDA they are recorded, and replayed from then on.

    The second forward of inputs of the same shapes, by the same thread, is recorded. Those of the latest shapes are
    kept, which share memory for their activations. Contexts are None, or tensors and None in tuples.
    """

    usable = True  # False once recording has failed for another reason than memory, which torch doesn't recover from

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        # A number is that of the thread by which it is to be recorded the next time; None: it can't be.
        self._recorded: OrderedDict[tuple[object, ...], Recorded | int | None] = OrderedDict()
        self._state, self._hooked = _state(network), False
        self._lock = threading.Lock()  # a recorded forward has one place for its inputs

    def __reduce__(self) -> tuple[object, ...]:
        return Recorder, (self.network,)

    def refresh(self) -> None:
        """Forget what is recorded if weights, layers or modes have been replaced; call it for each sound.

        Nothing is recorded of networks with hooks, which replays would leave out.
        """
        state = _state(self.network)
        with self._lock:
            self._hooked = any(m._forward_hooks or m._forward_pre_hooks for m in self.network.modules())
            if state != self._state:
                self._state = state
                self._recorded.clear()

    def __call__(self, x: Tensor, t: Tensor, context: Any) -> Tensor:
        """Return `network(x, t, context)` as a tensor of its own."""
        if self._hooked or _launches_one_by_one(self.network, x):
            return launched(self.network, x, t, context)
        inputs, thread = (x, t, context), threading.get_ident()
        key = tuple(None if value is None else (value.shape, value.dtype) for value in _leaves(inputs))
        with self._lock:
            recorded = self._recorded.get(key, 0)
            if recorded == thread:
                recorded = self._record(inputs)
            elif isinstance(recorded, int):
                recorded = thread  # whose libraries are ready after the forward that follows
            self._recorded[key] = recorded
            self._recorded.move_to_end(key)
            return recorded.replay(inputs) if isinstance(recorded, Recorded) else launched(self.network, *inputs)

    def _record(self, inputs: Any) -> Recorded | None:
        kept = {key: recorded for key, recorded in self._recorded.items() if isinstance(recorded, Recorded)}
        if len(kept) >= _KEPT:
            oldest = next(iter(kept))
            del kept[oldest], self._recorded[oldest]
        pools = [recorded.graph.pool() for recorded in kept.values()]
        return Recorded.of(self.network, inputs, pools[-1] if pools else None)


class Recorded:
    """One recorded forward: its graph, and where it reads and writes."""

    def __init__(self, graph: torch.cuda.CUDAGraph, inputs: Any, output: Tensor) -> None:
        self.graph, self.inputs, self.output = graph, inputs, output

    @classmethod
    def of(cls, network: nn.Module, inputs: Any, pool: Any) -> Recorded | None:
        """Record the forward of `inputs`, whose kernels have run before; None where memory is too short, say."""
        device = inputs[0].device
        with (
            _recording,
            torch.inference_mode(False),
            torch.no_grad(),
            torch.cuda.device(device),
            torch.cuda.stream(torch.cuda.current_stream(device)),
        ):
            try:
                own, graph = _copied(inputs), torch.cuda.CUDAGraph()
                # Other threads may go on with the device meanwhile, except for its random numbers.
                with torch.cuda.graph(graph, pool, _stream(device.index), capture_error_mode="thread_local"):
                    output = network(*own)
            except torch.OutOfMemoryError:
                return None
            except RuntimeError:
                Recorder.usable = False
                return None
        return cls(graph, own, output)

    def replay(self, inputs: Any) -> Tensor:
        """The forward of `inputs`, of the shapes that were recorded."""
        for place, value in zip(_leaves(self.inputs), _leaves(inputs), strict=True):
            if place is not None and value is not None:
                place.copy_(value)
        self.graph.replay()
        return self.output.clone()


def launched(network: Any, x: Tensor, t: Tensor, context: Any) -> Tensor:
    """Return `network(x, t, context)`, without gradients, as a tensor of its own."""
    with torch.inference_mode():  # a millisecond less than `no_grad`, which is much for a small network
        prediction = network(x, t, context)
    return prediction.clone()  # which, unlike that, can be modified and learned from


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    """The stream of a device on which forwards are recorded: libraries keep memory for each."""
    return torch.cuda.Stream(device)


def _launches_one_by_one(network: nn.Module, x: Tensor) -> bool:
    """Tell where forwards are not recorded.

    Neither are those of compiled networks, under autocast, which copies weights, or on streams of one's own, on which
    they would overtake one another.
    """
    if not x.is_cuda or not Recorder.usable or torch.is_autocast_enabled("cuda"):
        return True
    compiled = network._compiled_call_impl is not None or hasattr(network, "_orig_mod")
    return compiled or torch.cuda.current_stream(x.device) != torch.cuda.default_stream(x.device)


def _state(network: nn.Module) -> tuple[object, ...]:
    """All of a network that a recorded forward depends on besides the values of weights."""
    layers = ((id(m), m.training) for m in network.modules())
    tensors = ((v.data_ptr(), v.dtype, v.shape) for v in itertools.chain(network.parameters(), network.buffers()))
    return (*layers, *tensors)


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
