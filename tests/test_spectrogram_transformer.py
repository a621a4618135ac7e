"""The spectrogram transformer: size, who attends to whom, conditioning, dtypes, and that it learns."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from stable_audio_lite.models.spectrogram_transformer import SpectrogramTransformer, SpectrogramTransformerConfig
from stable_audio_lite.nn.attention import Condition

TINY = SpectrogramTransformerConfig(width=16, blocks=2, heads=2, patch=4, feed_forward=2)
TEXT = dataclasses.replace(TINY, text=True)
SHAPE = (2, 16, 24)


def build(config: SpectrogramTransformerConfig) -> SpectrogramTransformer:
    context = {"context_width": 12, "context_tokens": 5} if config.text else {}
    torch.manual_seed(0)
    return SpectrogramTransformer(config, bins=SHAPE[1], frames=SHAPE[2], **context)


def trained(config: SpectrogramTransformerConfig) -> SpectrogramTransformer:
    """With no layer at zero any more, which would hide what is tested here."""
    model = build(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(params=[TINY, TEXT], ids=["plain", "text"])
def network(request: pytest.FixtureRequest) -> SpectrogramTransformer:
    return trained(request.param)


@pytest.fixture
def texted() -> SpectrogramTransformer:
    return trained(TEXT)


def inputs(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, Condition]:
    torch.manual_seed(1)
    mask = torch.ones(batch, 5, dtype=torch.bool)
    mask[0, 2:] = False
    return torch.randn(batch, *SHAPE), torch.rand(batch) * 1000, Condition(torch.randn(batch, 5, 12), mask)


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_authors_size_has_exactly_the_published_parameters():
    with torch.device("meta"):
        model = SpectrogramTransformer(SpectrogramTransformerConfig())
    assert model.positions.shape == (103 * 64, 256) and model.positions.numel() == 1_687_552
    parts = (model.patch_in, model.time, model.blocks, model.patch_out)
    assert [parameters(part) for part in parts] == [8_448, 525_568, 3_159_040, 8_194]
    assert parameters(model) == 5_388_802
    assert not list(model.buffers())


def test_tokens_of_an_item_mix_and_items_never_do(network):
    x, t, _ = inputs()
    reference = network(x, t)
    x[1, :, :4, :4] += 1  # one patch of one item
    changed = (network(x, t) - reference).abs()
    assert changed[0].max() == 0 and changed[2].max() == 0
    other_patches = F.max_pool2d(changed[1], 4)[:, 1:, 1:]
    assert other_patches.min() > 1e-4


def test_attention_is_softmax_over_the_tokens_of_each_head(network):
    attention = network.blocks[0].attention
    x = torch.randn(2, 7, 16)
    queries, keys, values = attention.to_qkv(x).chunk(3, dim=-1)
    heads = []
    for part in (slice(0, 8), slice(8, 16)):
        weights = (queries[..., part] @ keys[..., part].mT / 8**0.5).softmax(-1)
        heads.append(weights @ values[..., part])
    torch.testing.assert_close(attention(x), attention.to_out(torch.cat(heads, dim=-1)), atol=1e-5, rtol=1e-4)


def test_blocks_are_pre_norm_with_a_leaky_feed_forward(network):
    block, x = network.blocks[0], torch.randn(2, 7, 16)
    after = x + block.attention(block.norm_attention(x))
    first, _, last = block.feed_forward
    after = after + last(F.leaky_relu(first(block.norm_feed_forward(after)), 0.01))
    torch.testing.assert_close(block(x, None, None), after)


def test_a_patch_becomes_a_token_at_its_place():
    """With nothing between embedding and de-embedding, a patch changes only itself, and places are told apart."""
    model = build(TINY)  # residual branches start at zero
    x, t, _ = inputs()
    reference = model(x, t)
    x[:, :, 4:8, 8:12] += 1
    changed = (model(x, t) - reference).abs().amax(1) > 1e-6
    assert changed[:, 4:8, 8:12].all() and changed.sum() == 3 * 16
    same = torch.ones(1, *SHAPE)
    assert model(same, t[:1])[0, 0, ::4, ::4].unique().numel() == 4 * 6


def test_step_and_spectrogram_matter(network):
    x, t, _ = inputs()
    reference = network(x, t)
    assert (network(x, t + 0.5) - reference).abs().amax((1, 2, 3)).min() > 1e-4  # fractions, too
    assert (network(-x, t) - reference).abs().amax((1, 2, 3)).min() > 1e-2


def test_every_parameter_learns(network):
    x, t, cond = inputs()
    context = None
    if network.config.text:
        tokens = torch.cat((cond.tokens[:2], network.null[None]))
        context = network.context(Condition(tokens, cond.mask))
    network(x, t, context).square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []


def test_new_text_changes_nothing_yet():
    plain, texted = build(TINY), build(TEXT)
    missing, unexpected = texted.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and all(name == "null" or "cross_attention" in name for name in missing)
    x, t, cond = inputs()
    assert torch.equal(texted(x, t, texted.context(cond)), plain(x, t))
    assert torch.equal(texted(x, t), plain(x, t))


def test_without_a_context_it_is_the_null(texted):
    x, t, _ = inputs()
    assert torch.equal(texted(x, t), texted(x, t, texted.context(texted.null_condition(3))))


def test_masked_tokens_do_not_matter_and_others_do(texted):
    x, t, cond = inputs()
    reference = texted(x, t, texted.context(cond))
    tokens = cond.tokens.clone()
    tokens[0, 2:] = 100.0
    assert torch.equal(texted(x, t, texted.context(Condition(tokens, cond.mask))), reference)
    tokens[1, 2:] = 100.0
    changed = (texted(x, t, texted.context(Condition(tokens, cond.mask))) - reference).abs().amax((1, 2, 3))
    assert changed[1] > 1e-3 and changed[0] == 0 and changed[2] == 0


def test_an_item_comes_out_the_same_alone_and_in_a_batch(texted):
    x, t, cond = inputs()
    together = texted(x, t, texted.context(cond))
    for i in range(3):
        alone = Condition(cond.tokens[i : i + 1], cond.mask[i : i + 1])
        one = texted(x[i : i + 1], t[i : i + 1], texted.context(alone))
        torch.testing.assert_close(one[0], together[i], atol=1e-5, rtol=1e-4)


def test_bfloat16_weights_run_and_stay_close(network):
    x, t, _ = inputs()
    reference = network(x, t)
    network.to(torch.bfloat16)
    out = network(x, t)
    assert out.dtype == torch.float32
    assert (out - reference).std() < 0.05 * reference.std()
    assert network(x.bfloat16(), t).dtype == torch.bfloat16


def test_runs_under_autocast(network):
    x, t, _ = inputs()
    reference = network(x, t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = network(x, t)
    assert out.dtype == torch.float32
    assert (out - reference).std() < 0.05 * reference.std()
    out.square().mean().backward()


def test_compiles_without_graph_breaks(texted):
    x, t, cond = inputs()
    context = texted.context(cond)
    compiled = torch.compile(texted, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, t, context), texted(x, t, context))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 15}, "width must be even"),
        ({"heads": 3}, "divisible by heads = 3"),
        ({"patch": 0}, "patch must be at least 1"),
        ({"patch": 5}, "bins must be a multiple of patch = 5, got 16"),
        ({"patch": 16}, "frames must be a multiple of patch = 16, got 24"),
        ({"time_base": 1.0}, "time_base must be above 1"),
    ],
)
def test_a_bad_config_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        build(dataclasses.replace(TINY, **change))


def test_context_goes_with_text():
    with pytest.raises(ValueError, match="text = true"):
        SpectrogramTransformer(TEXT, bins=16, frames=24, context_width=12)
    with pytest.raises(ValueError, match="text = false"):
        SpectrogramTransformer(TINY, bins=16, frames=24, context_width=12, context_tokens=5)


@pytest.mark.parametrize("shape", [(3, 2, 16, 20), (3, 2, 12, 24), (3, 1, 16, 24), (2, 16, 24)])
def test_another_size_is_refused(network, shape):
    with pytest.raises(ValueError, match=r"\(B, 2, 16, 24\), got"):
        network(torch.zeros(shape), torch.zeros(3))


def test_bad_contexts_are_refused(texted):
    x, t, cond = inputs()
    with pytest.raises(ValueError, match="12"):
        texted.context(Condition(cond.tokens[..., :7], cond.mask))
    plain = build(TINY)
    for call in (
        lambda: plain(x, t, texted.context(cond)),
        lambda: plain.context(cond),
        lambda: plain.null_condition(3),
    ):
        with pytest.raises(ValueError, match="without text"):
            call()
