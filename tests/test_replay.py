"""Forwards that are replayed as CUDA graphs give what they give launched one by one."""

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stable_audio_lite.diffusion import replay
from stable_audio_lite.diffusion.denoiser import NetworkDenoiser
from stable_audio_lite.diffusion.process import CosineProcess
from stable_audio_lite.nn.attention import Condition
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


def system(name: str) -> tuple[nn.Module, Any, tuple[int, ...]]:
    """A network of random weights, its context for a batch of two, and the shape of its data."""
    config: Any = load_system(CONFIGS / f"{name}.yaml")
    torch.manual_seed(0)
    network: Any = config.network().cuda().eval().requires_grad_(False)
    for parameter in network.parameters():  # layers that start at zero would hide the rest
        parameter.add_(0.05 * torch.randn_like(parameter))
    if isinstance(config, ComplexSTFTConfig):
        return network, None, (2, config.spectrogram.bins, 32)
    tokens = torch.randn(2, *network.null.shape, device="cuda")
    mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device="cuda")
    mask[0, 1:] = False
    context = network.context(Condition(tokens, mask), None, torch.zeros(2, device="cuda"))
    if isinstance(config, StableAudioConfig):
        return network, context, config.latent_shape
    return network, context, (2, config.spectrogram.bins, config.spectrogram.frames)


def test_where_nothing_is_replayed_results_can_be_modified_and_learned_from() -> None:
    network = Counted()
    x, t = torch.randn(3, 2), torch.ones(3)
    result = replay.forward(network, x, t, (None,))
    assert torch.equal(result, x + 1) and network.calls == 1
    (result.add_(1).requires_grad_() * 2).sum().backward()
    assert torch.equal(result.grad, torch.full((3, 2), 2.0))


@on_a_gpu
@pytest.mark.parametrize("name", SYSTEMS)
def test_replayed_steps_of_each_system_are_the_launched_ones(name: str) -> None:
    network, context, shape = system(name)
    for _ in range(5):
        x, t = torch.randn(2, *shape, device="cuda"), torch.rand(2, device="cuda")
        with torch.no_grad():
            wanted = network(x, t, context)
        torch.testing.assert_close(replay.forward(network, x, t, context), wanted, rtol=0, atol=0)


@on_a_gpu
def test_a_network_that_prepares_its_own_context_is_replayed_too() -> None:
    network, _, shape = system("spectrogram_transformer/tiny")
    for _ in range(3):
        x, t = torch.randn(2, *shape, device="cuda"), torch.rand(2, device="cuda")
        with torch.no_grad():
            wanted = network(x, t)
        torch.testing.assert_close(replay.forward(network, x, t, None), wanted)


@pytest.fixture(params=["imitated", pytest.param("cuda", marks=on_a_gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A GPU; or a processor, where what is recorded runs again at each replay, not counted."""
    if request.param == "cuda":
        return "cuda"

    def imitated(network: Counted, inputs: Any) -> replay.Recorded:
        own = replay._copied(inputs)
        output = network(*own)

        def again() -> None:
            calls = network.calls
            output.copy_(network(*own))
            network.calls = calls

        return replay.Recorded(SimpleNamespace(replay=again), own, output)  # type: ignore[arg-type]

    recorders = defaultdict(replay.Recorder)
    monkeypatch.setattr(replay.Recorded, "of", imitated)
    monkeypatch.setattr(replay, "forward", lambda network, *inputs: recorders[network](network, *inputs))
    return "cpu"


def test_results_stay_and_inputs_of_other_shapes_and_contexts_have_their_own(device: str) -> None:
    network, t = Counted().to(device), torch.arange(3.0, device=device)
    results, wanted = [], []
    for number in range(24):
        x = torch.randn(3, 2 + number % 2, device=device)
        context = (torch.full((), float(number), device=device), None if number % 3 else x)
        results.append(replay.forward(network, x, t, context))
        wanted.append(x + t[:, None] + number + (0 if number % 3 else x))
    assert network.calls == 8  # of each of four shapes the first two
    for result, value in zip(results, wanted, strict=True):
        torch.testing.assert_close(result, value)
    (results[-1].requires_grad_() * 2).sum().backward()  # they can be learned from


def test_weights_that_are_trained_or_replaced_count(device: str) -> None:
    network, x, t = Counted().to(device), torch.ones(3, 2, device=device), torch.zeros(3, device=device)
    for gain in (1.0, 2.0, 3.0, 4.0):
        with torch.no_grad():
            network.gain.fill_(gain)
        assert torch.equal(replay.forward(network, x, t, ()), gain * x)
    assert network.calls == 2
    kept, network.gain = network.gain, nn.Parameter(torch.full((), 7.0, device=device))
    assert torch.equal(replay.forward(network, x, t, ()), 7 * x)
    assert network.calls == 3 and kept is not network.gain


def test_only_the_latest_shapes_are_kept(device: str) -> None:
    network = Counted().to(device)
    for size in (*range(1, 9), 8, 8, 1):
        replay.forward(network, torch.ones(1, size, device=device), torch.zeros(1, device=device), ())
    assert network.calls == 10  # the last of size 1 is as the first


@on_a_gpu
def test_where_memory_is_too_short_to_record_forwards_go_on_launched() -> None:
    class Hungry(Counted):
        def forward(self, x: Tensor, t: Tensor, context: tuple[Tensor | None, ...]) -> Tensor:
            if torch.cuda.is_current_stream_capturing():
                self.attempts = getattr(self, "attempts", 0) + 1
                torch.empty(2**50, device="cuda")
            return super().forward(x, t, context)

    network, x, t = Hungry().cuda(), torch.ones(3, 2, device="cuda"), torch.zeros(3, device="cuda")
    for _ in range(4):
        assert torch.equal(replay.forward(network, x, t, ()), x)
    assert network.calls == 4 and network.attempts == 1


@on_a_gpu
def test_nothing_is_recorded_under_autocast() -> None:
    network, x, t = Counted().cuda(), torch.ones(3, 2, device="cuda"), torch.zeros(3, device="cuda")
    for _ in range(4):
        with torch.autocast("cuda", torch.bfloat16):
            replay.forward(network, x, t, ())
    assert network.calls == 4


@on_a_gpu
def test_gradients_flow_where_they_are_asked_for() -> None:
    network, context, shape = system("stable_audio/tiny")
    denoiser = NetworkDenoiser(network, CosineProcess("v"), context)
    for _ in range(3):
        x = torch.randn(2, *shape, device="cuda", requires_grad=True)
        denoiser(x, torch.ones(2, device="cuda")).sum().backward()
        assert x.grad is not None and bool(x.grad.abs().sum() > 0)
