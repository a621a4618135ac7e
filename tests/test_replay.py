"""Forwards that are replayed as CUDA graphs give what they give launched one by one."""

import copy
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stable_audio_lite.diffusion import replay
from stable_audio_lite.diffusion.denoiser import NetworkDenoiser
from stable_audio_lite.diffusion.process import CosineProcess
from stable_audio_lite.diffusion.replay import Recorder
from stable_audio_lite.nn.attention import Condition
from stable_audio_lite.pipeline import StableAudio
from stable_audio_lite.systems import ComplexSTFTConfig, StableAudioConfig, load_system

CONFIGS = Path(__file__).parents[1] / "configs"
SYSTEMS = ("stable_audio/tiny", "complex_stft/tiny", "spectrogram_transformer/tiny")
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Counted(nn.Module):
    """A network that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor, context: tuple[Tensor | None, ...]) -> Tensor:
        self.calls += 1
        total = x * self.gain + t[:, None]
        for value in context:
            total = total if value is None else total + value
        return total


def system(name: str) -> tuple[nn.Module, list[Any], tuple[int, ...]]:
    """A network of random weights, two contexts of a batch of two, and the shape of its data."""
    config: Any = load_system(CONFIGS / f"{name}.yaml")
    torch.manual_seed(0)
    network: Any = config.network().cuda().eval().requires_grad_(False)
    for parameter in network.parameters():  # layers that start at zero would hide the rest
        parameter.add_(0.05 * torch.randn_like(parameter))
    if isinstance(config, ComplexSTFTConfig):
        return network, [None, None], (2, config.spectrogram.bins, 32)
    mask = torch.ones(2, len(network.null), dtype=torch.bool, device="cuda")
    mask[0, 1:] = False
    tokens = torch.randn(2, *mask.shape, network.null.shape[1], device="cuda")
    contexts = [network.context(Condition(those, mask), None, torch.zeros(2, device="cuda")) for those in tokens]
    if isinstance(config, StableAudioConfig):
        return network, contexts, config.latent_shape
    return network, contexts, (2, config.spectrogram.bins, config.spectrogram.frames)


def test_where_nothing_is_replayed_results_can_be_modified_and_learned_from() -> None:
    network = Counted()
    x, t = torch.randn(3, 2), torch.ones(3)
    result = Recorder(network)(x, t, (None,))
    assert torch.equal(result, x + 1) and network.calls == 1
    (result.add_(1).requires_grad_() * 2).sum().backward()
    assert torch.equal(result.grad, torch.full((3, 2), 2.0))


@on_a_gpu
@pytest.mark.parametrize("name", SYSTEMS)
def test_replayed_steps_of_each_system_are_the_launched_ones(name: str) -> None:
    network, contexts, shape = system(name)
    recorder = Recorder(network)
    for number in range(6):
        x, t, context = torch.randn(2, *shape, device="cuda"), torch.rand(2, device="cuda"), contexts[number % 2]
        with torch.no_grad(), torch.backends.cudnn.flags(deterministic=True):
            wanted = network(x, t, context)
        torch.testing.assert_close(recorder(x, t, context), wanted, rtol=0, atol=0)
    assert [type(recorded) for recorded in recorder._recorded.values()] == [replay.Recorded]


@pytest.fixture(params=["imitated", pytest.param("cuda", marks=on_a_gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A GPU; or a processor that counts as one, where what is recorded runs again at each replay, not counted."""
    if request.param == "cuda":
        return "cuda"

    def imitated(network: nn.Module, inputs: Any, pool: Any) -> replay.Recorded:
        own = replay._copied(inputs)
        output = network(*own)

        def again() -> None:
            counted = next(module for module in network.modules() if isinstance(module, Counted))
            calls = counted.calls
            output.copy_(network(*own))
            counted.calls = calls

        return replay.Recorded(SimpleNamespace(replay=again, pool=lambda: None), own, output.detach())  # type: ignore[arg-type]

    monkeypatch.setattr(replay, "_launches_one_by_one", lambda network, x: False)
    monkeypatch.setattr(replay.Recorded, "of", imitated)
    return "cpu"


@torch.no_grad()
def test_results_stay_and_inputs_of_other_shapes_and_contexts_have_their_own(device: str) -> None:
    network, t = Counted().to(device), torch.arange(3.0, device=device)
    recorder = Recorder(network)
    results, wanted = [], []
    for number in range(24):
        x = torch.randn(3, 2 + number % 2, device=device)
        context = (torch.full((), float(number), device=device), None if number % 3 else x)
        results.append(recorder(x, t, context))
        wanted.append(x + t[:, None] + number + (0 if number % 3 else x))
    assert network.calls == 8  # of each of four shapes the first two
    for result, value in zip(results, wanted, strict=True):
        torch.testing.assert_close(result, value)
    with torch.enable_grad():
        (results[-1].requires_grad_() * 2).sum().backward()  # they can be learned from


@torch.no_grad()
def test_a_network_that_is_changed_is_recorded_anew(device: str) -> None:
    """Other values of weights count at once; other weights, layers or modes with the next sound."""
    network = nn.Sequential(nn.Identity(), Counted()).to(device)
    network.forward = lambda *inputs: network[1](*inputs)  # type: ignore[method-assign]
    recorder, counted = Recorder(network), network[1]
    x, t = torch.ones(3, 2, device=device), torch.zeros(3, device=device)

    def three(gain: float) -> int:
        before = network[1].calls
        recorder.refresh()
        for _ in range(3):
            assert torch.equal(recorder(x, t, ()), gain * x)
        return network[1].calls - before

    assert three(1.0) == 2 and three(1.0) == 0
    counted.gain.fill_(2.0)
    assert three(2.0) == 0
    kept, counted.gain = counted.gain, nn.Parameter(torch.full((), 7.0, device=device))
    assert three(7.0) == 2 and kept is not counted.gain
    network.eval()
    assert three(7.0) == 2
    network[1] = Counted().to(device)
    assert three(1.0) == 2
    seen = []
    hook = network[1].register_forward_hook(lambda *about: seen.append(about))
    assert three(1.0) == 3 and len(seen) == 3
    hook.remove()
    assert three(1.0) == 0


@torch.no_grad()
def test_the_thread_that_records_has_run_the_forward_before(device: str) -> None:
    network = Counted().to(device)
    recorder, inputs = Recorder(network), (torch.ones(3, 2, device=device), torch.zeros(3, device=device), ())
    counts = []

    def once() -> None:
        with torch.no_grad():
            assert torch.equal(recorder(*inputs), inputs[0])
        counts.append(network.calls)

    for number in range(5):
        thread = threading.Thread(target=once)
        once() if number in (0, 2, 3) else (thread.start(), thread.join())
    assert counts == [1, 2, 3, 4, 4]  # the fourth is recorded, and serves all


@torch.no_grad()
def test_only_the_latest_are_kept(device: str) -> None:
    network = Counted().to(device)
    recorder = Recorder(network)
    for size in (*range(1, 9), *range(1, 9), *range(8, 4, -1), 1):
        recorder(torch.ones(1, size, device=device), torch.zeros(1, device=device), ())
    assert network.calls == 17  # twice each, and of the first once more
    assert sum(isinstance(recorded, replay.Recorded) for recorded in recorder._recorded.values()) == 4


def test_what_a_graph_would_get_wrong_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = Counted(), SimpleNamespace(is_cuda=True, device="cuda")
    streams = {"current": 0}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams["current"])
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: 0)
    launches = lambda: replay._launches_one_by_one(network, x)  # type: ignore[arg-type]  # noqa: E731
    assert not launches()
    streams["current"] = 1
    assert launches()
    streams["current"] = 0
    with monkeypatch.context() as changed:
        changed.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
        assert launches()
    with monkeypatch.context() as changed:
        changed.setattr(Recorder, "usable", False)
        assert launches()
    x.is_cuda = False
    assert launches()
    x.is_cuda = True
    network.compile(backend="eager")
    assert launches()


@on_a_gpu
@torch.no_grad()
def test_where_memory_is_too_short_to_record_forwards_go_on_launched() -> None:
    class Hungry(Counted):
        attempts = 0

        def forward(self, x: Tensor, t: Tensor, context: tuple[Tensor | None, ...]) -> Tensor:
            if torch.cuda.is_current_stream_capturing():
                self.attempts += 1
                torch.empty(2**50, device="cuda")
            return super().forward(x, t, context)

    network, x, t = Hungry().cuda(), torch.ones(3, 2, device="cuda"), torch.zeros(3, device="cuda")
    recorder = Recorder(network)
    for _ in range(4):
        assert torch.equal(recorder(x, t, ()), x)
    assert network.calls == 4 and network.attempts == 1


@on_a_gpu
@torch.no_grad()
def test_nothing_is_recorded_under_autocast_or_of_a_compiled_network() -> None:
    network, x, t = Counted().cuda(), torch.ones(3, 2, device="cuda"), torch.zeros(3, device="cuda")
    recorder = Recorder(network)
    for _ in range(4):
        with torch.autocast("cuda", torch.bfloat16):
            recorder(x, t, ())
    assert network.calls == 4
    network.compile(backend="eager")
    for _ in range(4):
        recorder(x, t, ())
    assert not recorder._recorded


@on_a_gpu
def test_gradients_flow_where_they_are_asked_for() -> None:
    network, contexts, shape = system("stable_audio/tiny")
    denoiser = NetworkDenoiser(network, CosineProcess("v"), contexts[0], recorder=Recorder(network))
    for _ in range(3):
        x = torch.randn(2, *shape, device="cuda", requires_grad=True)
        denoiser(x, torch.ones(2, device="cuda")).sum().backward()
        assert x.grad is not None and bool(x.grad.abs().sum() > 0)


def test_generation_goes_through_the_models_recorder(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of another model with the same network too; and it is asked whether that network is still the same."""
    model, calls = StableAudio.from_pretrained(tiny_bundle, "cpu", "float32"), []
    call, refresh = Recorder.__call__, Recorder.refresh
    monkeypatch.setattr(Recorder, "__call__", lambda self, *inputs: calls.append(self) or call(self, *inputs))
    monkeypatch.setattr(Recorder, "refresh", lambda self: calls.append("refresh") or refresh(self))
    model.generate("warm slow piano", seconds=0.1, steps=3, seed=0)
    model.with_defaults(cfg=2.0).generate(seconds=0.1, steps=2, seed=0)
    assert calls == ["refresh", *[model._recorder] * 3, "refresh", *[model._recorder] * 2]
    calls.clear()
    model.to(torch.device("cpu"), torch.float32)
    assert calls == ["refresh"]
    first, other = model._recorder, copy.deepcopy(model)
    assert other._recorder.network is other.network is not model.network
    with torch.no_grad():
        for parameter in other.network.parameters():
            parameter.zero_()
    before, model.network = model.generate("warm slow piano", seconds=0.1, steps=1, seed=0).audio, other.network
    after = model.generate("warm slow piano", seconds=0.1, steps=1, seed=0).audio
    assert model._recorder is not first and not torch.equal(before, after)
