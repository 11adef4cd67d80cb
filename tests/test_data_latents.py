"""Cached posteriors give the latents that encoding every time would give."""

import numpy as np
import pytest
import torch
from PIL import Image

from finetune import draws
from finetune.data import Latents, Row, caption_candidates, fit, intake, source, to_tensor
from finetune.settings import TrainSettings


@pytest.fixture(scope="module")
def vae():
    from diffusers import AutoencoderKL
    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, sample_size=32, scaling_factor=0.3,
                         down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2).eval()


@pytest.fixture
def folder(tmp_path):
    for i in range(3):
        noise = np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i}.png")
    return tmp_path


class Counting(torch.nn.Module):
    """A VAE that counts how often it encodes."""

    def __init__(self, vae):
        super().__init__()
        self.vae, self.config, self.dtype, self.calls = vae, vae.config, vae.dtype, 0

    def encode(self, pixels):
        self.calls += len(pixels)
        return self.vae.encode(pixels)


def row(picture, index, flip=False, kind="instance", place=(0.5, 0.5)):
    return Row(picture, flip, place, "", 1.0, kind, index)


def by_hand(vae, picture, row, seed, resolution=32, crop="center", scale=0.3):
    """One row's latents, encoded anew, flipped with torch rather than Pillow."""
    pixels = to_tensor(fit(picture.load(), resolution, crop, row.place))
    pixels = pixels.flip(-1) if row.flip else pixels
    with torch.no_grad():
        posterior = vae.encode(pixels[None]).latent_dist
    noise = draws.normal(tuple(posterior.mean[0].shape), seed, "vae", row.kind, row.index)
    return (posterior.mean[0] + posterior.std[0] * noise) * scale


def test_to_tensor_covers_minus_one_to_one():
    image = Image.new("RGB", (2, 1))
    image.putdata([(0, 51, 255), (255, 204, 0)])
    wanted = torch.tensor([[[-1.0, 1.0]], [[-0.6, 0.6]], [[1.0, -1.0]]])
    torch.testing.assert_close(to_tensor(image), wanted)


def test_cached_sampling_is_bit_identical_to_encoding_each_time(vae, folder):
    settings = TrainSettings(instance_dir=folder, resolution=32, seed=5)
    pictures = intake(settings).pictures
    counting = Counting(vae)
    latents = Latents(counting, pictures, settings)
    for step in range(4):
        rows = [row((step + i) % 3, 3 * step + i, flip=i == 1, kind="class" if i == 2 else "instance") for i in range(3)]
        found = latents.sample(rows, 5)
        for i, one in enumerate(rows):
            assert torch.equal(found[i], by_hand(vae, pictures[one.picture], one, 5))
    assert counting.calls == 6  # three pictures, each plain and flipped, each once


def test_flip_has_its_own_posterior(vae, folder):
    settings = TrainSettings(instance_dir=folder, resolution=32)
    counting = Counting(vae)
    latents = Latents(counting, intake(settings).pictures, settings)
    plain, flipped = latents.moments(row(0, 0)), latents.moments(row(0, 0, flip=True))
    assert counting.calls == 2
    assert not torch.equal(plain[0], flipped[0])
    assert not torch.allclose(plain[0].flip(-1), flipped[0], atol=1e-4)  # mirroring latents is not mirroring pictures


def test_random_crops_are_encoded_each_time(vae, folder):
    settings = TrainSettings(instance_dir=folder, resolution=32, crop="random")
    pictures = intake(settings).pictures
    counting = Counting(vae)
    latents = Latents(counting, pictures, settings)
    rows = [row(0, n, flip=n % 2 == 1, place=(n / 4, 0.0)) for n in range(4)]
    found = latents.sample(rows, 0)
    assert counting.calls == 4
    for i, one in enumerate(rows):
        assert torch.equal(found[i], by_hand(vae, pictures[0], one, 0, crop="random"))


def test_shift_factor_is_subtracted_before_scaling(vae, folder):
    settings = TrainSettings(instance_dir=folder, resolution=32)
    pictures = intake(settings).pictures
    shifted = Latents(vae, pictures, settings)
    shifted.shift = 0.5
    plain = Latents(vae, pictures, settings).sample([row(0, 0)], 0)
    torch.testing.assert_close(shifted.sample([row(0, 0)], 0), plain - 0.5 * 0.3)


def built(vae, folder, **settings):
    settings = TrainSettings(**{"instance_dir": folder, "resolution": 32, "seed": 1, **settings})
    found = intake(settings)
    classes = found.pictures[:2] if settings.prior == "images" else []
    return source(settings, found, classes, vae, caption_candidates(found.pictures, ["a photo of a {}"], "owl"), "a photo of a bird")


def test_a_batch_is_its_rows(vae, folder):
    made = built(vae, folder, batch_size=2, prior="images", prior_weight=0.5)
    batch = made.batch(1)
    rows = made.rows.rows(1)
    assert batch.instances == 2 and batch.weights.tolist() == [1.0, 1.0, 0.5, 0.5]
    assert batch.captions == ["a photo of an owl"] * 2 + ["a photo of a bird"] * 2
    assert batch.keys == [("instance", 2), ("instance", 3), ("class", 2), ("class", 3)]
    assert batch.names == [f"{one.picture}.png" for one in rows]
    for i, one in enumerate(rows):
        assert torch.equal(batch.latents[i], by_hand(vae, made.pictures[one.kind][one.picture], one, 1))


def test_latents_do_not_depend_on_processes_or_class_rows(vae, folder):
    one = built(vae, folder, batch_size=4, flip=True, crop="random")
    two = built(vae, folder, batch_size=2, flip=True, crop="random")
    joined = built(vae, folder, batch_size=4, flip=True, crop="random", prior="images")
    for step in range(2):
        split = torch.cat([two.batch(step, rank=rank, world=2).latents for rank in range(2)])
        assert torch.equal(one.batch(step).latents, split)
        assert torch.equal(joined.batch(step).latents[:4], split)


def test_validation_is_fixed_plain_and_complete(vae, folder):
    made = built(vae, folder, batch_size=3, flip=True, crop="random", caption_dropout=1.0, prior="images")
    first, again = made.validation(), made.validation()
    assert [key for batch in first for key in batch.keys] == [("validation", i) for i in range(16)]
    assert [len(batch.captions) for batch in first] == [3] * 5 + [1]
    assert {caption for batch in first for caption in batch.captions} == {"a photo of an owl"}
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(first, again, strict=True))
    for batch in first:
        assert batch.instances == len(batch.captions) and set(batch.weights.tolist()) == {1.0}
    pixels = to_tensor(fit(made.pictures["instance"][1].load(), 32, "center"))
    with torch.no_grad():
        assert torch.equal(first[0].latents[1], vae.encode(pixels[None]).latent_dist.mean[0] * 0.3)
