"""The small dual encoder: unit features, read at the end-of-text token, the same after a trip to disk."""

import pytest
import torch
from transformers import CLIPTextConfig, ResNetConfig

from finetune.model.dual_encoder import DualEncoder


@pytest.fixture
def model():
    torch.manual_seed(0)
    vision = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    text = CLIPTextConfig(
        vocab_size=50, hidden_size=20, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40,
        max_position_embeddings=12, bos_token_id=48, eos_token_id=49, pad_token_id=49,
    )
    return DualEncoder(vision, text, projection_dim=6, image_size=32).eval()


def test_features_survive_the_disk(model, tmp_path):
    pictures, ids = model.normalise(torch.rand(3, 3, 32, 32)), torch.tensor([[48, 3, 7, 49, 49], [48, 9, 49, 49, 49]])
    model.save_folder(tmp_path / "exact")
    model.save_folder(tmp_path / "half", torch.float16)
    exact, half = (DualEncoder.from_folder(tmp_path / name) for name in ("exact", "half"))
    assert torch.equal(exact.image_features(pictures), model.image_features(pictures))
    assert torch.equal(exact.text_features(ids), model.text_features(ids))
    assert torch.allclose(half.image_features(pictures), model.image_features(pictures), atol=5e-3)
    assert next(half.parameters()).dtype == torch.float32
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("exact", "half")]
    assert sizes[1] < 0.62 * sizes[0]


def test_features_have_unit_length_and_the_projections_are_linear(model):
    pictures = model.normalise(torch.rand(2, 3, 32, 32))
    pooled = model.vision(pixel_values=pictures).last_hidden_state.mean(dim=(2, 3))
    by_hand = pooled @ model.visual_projection.weight.T
    by_hand = by_hand / by_hand.norm(dim=1, keepdim=True)
    assert torch.allclose(model.image_features(pictures), by_hand, atol=1e-6)


def test_text_is_read_at_the_first_end_token_whatever_follows(model):
    short = model.text_features(torch.tensor([[48, 5, 6, 49]]))
    padded = model.text_features(torch.tensor([[48, 5, 6, 49, 49, 49, 49]]))
    states = model.text(input_ids=torch.tensor([[48, 5, 6, 49]])).last_hidden_state[:, 3]
    by_hand = torch.nn.functional.normalize(states @ model.text_projection.weight.T, dim=-1)
    assert torch.allclose(short, padded, atol=1e-6) and torch.allclose(short, by_hand, atol=1e-6)


def test_pictures_are_resized_and_normalised(model):
    flat = torch.full((1, 3, 64, 64), 0.75)
    assert torch.allclose(model.normalise(flat), torch.ones(1, 3, 32, 32), atol=1e-5)
