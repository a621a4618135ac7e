"""CLAP: its tokenizer, spectrograms, text features, embeddings and losses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_clap import PROMPTS, SIZES, small_clap, tones

from stable_audio_lite.clap.checkpoints import Checkpoint
from stable_audio_lite.clap.config import ClapConfig, config_from_transformers, transformers_config
from stable_audio_lite.clap.mel import SAMPLE_RATE, log_mel, mel_views, repeat_pad
from stable_audio_lite.clap.model import Clap, retrieval
from stable_audio_lite.clap.text_encoder import TextEncoder
from stable_audio_lite.clap.tokenizer import tokenize, train_tokenizer
from stable_audio_lite.config import from_dict, to_dict
from stable_audio_lite.errors import UserError

CAPTIONS = ["a low hum", "a high whistle"]


@pytest.fixture
def clap() -> Clap:
    return small_clap()


@pytest.fixture
def encoder(clap: Clap) -> TextEncoder:
    return Checkpoint.of(clap, "small").text_encoder()


def test_features_are_the_next_to_last_layers(clap, encoder):
    condition = encoder.encode(PROMPTS)
    ids, mask = tokenize(clap.tokenizer, PROMPTS, 32)
    states = clap.model.text_model(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
    assert condition.tokens.shape == (3, encoder.max_tokens, encoder.width) == (3, 32, 32)
    assert condition.mask.sum() == mask.sum() and not condition.mask[:, mask.shape[1] :].any()
    torch.testing.assert_close(condition.tokens[condition.mask], states[-2][mask], rtol=0, atol=1e-5)
    assert not torch.allclose(states[-1][mask], states[-2][mask], atol=1e-2)


def test_padding_is_masked_and_other_prompts_do_not_matter(clap, encoder):
    together, alone = encoder.encode(PROMPTS), encoder.encode(PROMPTS[1:2])
    assert alone.mask.sum() == len(clap.tokenizer.encode("drums").ids)
    assert torch.equal(together.mask[1], alone.mask[0])
    torch.testing.assert_close(together.tokens[1], alone.tokens[0], rtol=0, atol=1e-6)
    assert not together.tokens[~together.mask].any()


def test_empty_and_overlong_prompts(encoder):
    condition = encoder.encode(["", "piano and drums " * 40])
    assert condition.mask.sum(1).tolist() == [2, 32]
    with pytest.raises(ValueError, match="list"):
        encoder.encode("drums")


def test_encoder_stays_frozen(encoder):
    encoder.train()
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())


@pytest.mark.parametrize("text", ["zyzzyva", "🎹🎸", "ピアノ", "ÄÖÜ piano", "\x00\x7f", "a" * 200])
def test_no_word_is_unknown(clap, text):
    tokenizer = clap.tokenizer
    tokenizer.no_truncation()
    ids = tokenizer.encode(text).ids
    assert (ids[0], ids[-1]) == (0, 2) and len(ids) > 2
    assert not {1, 3} & set(ids)
    assert tokenizer.decode(ids).strip() == text.lower()


def test_special_tokens_are_where_roberta_has_them(clap):
    assert [clap.tokenizer.token_to_id(t) for t in ("<s>", "<pad>", "</s>", "<unk>")] == [0, 1, 2, 3]
    with pytest.raises(UserError, match="vocab_size"):
        train_tokenizer(PROMPTS, 200)


@pytest.mark.parametrize("fusion", [False, True])
@pytest.mark.parametrize("seconds", [1.7, 6.0, 10.0])
def test_mels_equal_the_published_feature_extractor(fusion, seconds):
    from transformers import ClapFeatureExtractor

    extractor = ClapFeatureExtractor(truncation="fusion" if fusion else "rand_trunc")
    waveform = torch.randn(int(seconds * SAMPLE_RATE), generator=torch.Generator().manual_seed(0)) * 0.1
    theirs = extractor(waveform.numpy(), sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features[0, 0]
    ours = log_mel(replace(SIZES, audio_fusion=fusion), repeat_pad(waveform))
    assert ours.shape == theirs.shape == (1001, 64)
    torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=2e-2)


def test_paper_size_is_laions():
    from transformers import ClapConfig as HubConfig

    ours = transformers_config(ClapConfig())
    theirs = HubConfig(audio_config={"enable_fusion": True, "fusion_type": "aff_2d"})
    for tower in ("text_config", "audio_config"):
        mine, other = getattr(ours, tower).to_dict(), getattr(theirs, tower).to_dict()
        assert {k: list(v) if isinstance(v, tuple) else v for k, v in mine.items()} == {
            k: list(v) if isinstance(v, tuple) else v for k, v in other.items()
        }
    assert config_from_transformers(theirs.to_dict()) == ClapConfig()


def test_config_goes_through_yaml_and_names_mistakes():
    assert from_dict(ClapConfig, to_dict(SIZES), "file") == SIZES
    for key, value in {
        "text_layers": 1,
        "text_heads": 3,
        "text_feed_forward": -1,
        "audio_patch": 0,
        "text_positions": 33,
        "audio_window": 64,
        "audio_heads": [3, 2],
    }.items():
        with pytest.raises(UserError, match=f"file: .*{key}|file: .*image_size"):
            from_dict(ClapConfig, to_dict(SIZES) | {key: value}, "file")


@pytest.mark.parametrize("seconds", [0.5, 10.0, 23.0])
@pytest.mark.parametrize("fusion", [False, True])
def test_sounds_of_any_length_and_rate(clap, seconds, fusion):
    clap = Clap(replace(SIZES, audio_fusion=fusion), clap.tokenizer).eval()
    stereo = tones(seconds)[:, None].expand(-1, 2, -1)
    embedding = clap.embed_audio(stereo)
    torch.testing.assert_close(embedding.norm(dim=-1), torch.ones(2))
    low_rate = clap.embed_audio(stereo[..., ::2], SAMPLE_RATE // 2)
    assert torch.nn.functional.cosine_similarity(embedding, low_rate).min() > 0.98
    with pytest.raises(ValueError, match="no samples"):
        clap.embed_audio(torch.zeros(1, 0))


def test_loss_is_symmetric_and_its_limits_are_right(clap):
    text = torch.eye(4, 16)
    audio = text.roll(1, 0)
    scale = clap.logit_scales[0].exp().item()
    matched = -torch.log_softmax(torch.tensor([scale, 0.0, 0.0, 0.0]), 0)[0]
    torch.testing.assert_close(clap.loss(text, text), matched)
    mixed = torch.nn.functional.normalize(torch.randn(4, 16), dim=-1)
    torch.testing.assert_close(clap.loss(text, mixed), clap.loss(mixed, text))
    assert clap.loss(text, audio) > 1
    with torch.no_grad():
        clap.logit_scales[0].fill_(50.0)  # e^50, which the cap turns into 100
    assert clap.loss(text, audio) < 101


def test_loss_falls_on_two_pairs(clap):
    clap.train()
    ids, mask = tokenize(clap.tokenizer, CAPTIONS, 16)
    mels = torch.stack([mel_views(SIZES, log_mel(SIZES, repeat_pad(s))) for s in tones()])
    optimizer = torch.optim.AdamW(clap.parameters(), lr=1e-3)
    losses = []
    for _ in range(60):
        loss = clap.loss(*clap(ids, mask, mels, torch.zeros(2, dtype=torch.bool))[:2])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    clap.eval()
    assert (clap.embed_audio(tones()) @ clap.embed_text(CAPTIONS).T).argmax(1).tolist() == [0, 1]


def test_retrieval_counts():
    vectors = torch.eye(20)
    assert set(retrieval(vectors, vectors).values()) == {100.0}
    shifted = retrieval(vectors, 0.5 * vectors + vectors.roll(1, 0))
    assert shifted["text_to_audio/R@1"] == 0 and shifted["audio_to_text/R@10"] == 100


def test_ranks_do_not_favour_a_clap_that_says_nothing():
    """Where all embeddings agree, every match is last among equals."""
    same = torch.ones(20, 4)
    assert set(retrieval(same, same).values()) == {0.0}
