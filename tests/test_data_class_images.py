"""Class images are kept under what they depend on, each with its own seed, and rendered only once."""

import numpy as np
import pytest
from PIL import Image

from finetune import draws
from finetune.data import class_image_folder, class_images, own_class_images
from finetune.errors import Problem


class Renderer:
    """Pictures whose colour is their seed; can stop after so many."""

    def __init__(self, stop_after=10**9):
        self.seeds, self.stop_after = [], stop_after

    def __call__(self, prompts, seeds):
        assert len(prompts) == len(seeds) and set(prompts) == {"a photo of a dog"}
        if len(self.seeds) >= self.stop_after:
            raise KeyboardInterrupt
        self.seeds += seeds
        return [Image.new("RGB", (4, 4), colour(seed)) for seed in seeds]


def colour(seed):
    return seed % 256, seed // 256 % 256, seed // 65536 % 256


def ask(cache, count=20, render=None, seed=0, base="base", **sampler):
    return class_images(cache, "a photo of a dog", count, seed, base, {"steps": 30, "guidance": 7.5, **sampler}, render or Renderer())


def test_each_picture_has_its_own_seed(tmp_path):
    found = ask(tmp_path, 20)
    assert len(found) == 20 and len({picture.sha256 for picture in found}) == 20
    for i, picture in enumerate(found):
        assert tuple(np.asarray(picture.load())[0, 0]) == colour(draws.key(0, "class-image", i))
        assert picture.size == (4, 4)


def test_an_interrupted_rendering_goes_on(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        ask(tmp_path, 20, Renderer(stop_after=8))
    rest, progress = Renderer(), []
    found = class_images(tmp_path, "a photo of a dog", 20, 0, "base", {"steps": 30, "guidance": 7.5}, rest,
                         lambda done, count: progress.append((done, count)))
    assert rest.seeds == [draws.key(0, "class-image", i) for i in range(8, 20)]
    assert progress == [(16, 20), (20, 20)]
    assert [picture.sha256 for picture in found] == [picture.sha256 for picture in ask(tmp_path / "fresh", 20)]


def test_a_full_cache_renders_nothing_and_more_renders_the_rest(tmp_path):
    ask(tmp_path, 5)
    again, more = Renderer(), Renderer()
    ask(tmp_path, 5, again)
    ask(tmp_path, 7, more)
    assert again.seeds == [] and more.seeds == [draws.key(0, "class-image", i) for i in (5, 6)]


def test_a_damaged_or_lost_picture_is_rendered_again(tmp_path):
    found = ask(tmp_path, 4)
    content = found[2].path.read_bytes()
    found[1].path.unlink()
    found[2].path.write_bytes(content[: len(content) // 2])
    render = Renderer()
    again = ask(tmp_path, 4, render)
    assert render.seeds == [draws.key(0, "class-image", i) for i in (1, 2)]
    assert again == found


def test_the_folder_follows_everything_the_pictures_depend_on(tmp_path):
    usual = {"prompt": "a dog", "seed": 0, "base_hash": "x", "sampler": {"steps": 30, "guidance": 7.5}}
    variants = [usual, {**usual, "prompt": "a cat"}, {**usual, "seed": 1}, {**usual, "base_hash": "y"},
                {**usual, "sampler": {"steps": 31, "guidance": 7.5}}, {**usual, "sampler": {"steps": 30, "guidance": 7.5, "size": 64}}]
    assert len({class_image_folder(tmp_path, **variant) for variant in variants}) == len(variants)
    reordered = {**usual, "sampler": {"guidance": 7.5, "steps": 30}}
    assert class_image_folder(tmp_path, **usual) == class_image_folder(tmp_path, **reordered)


def test_own_class_pictures(tmp_path):
    Image.new("RGB", (5, 4), (1, 2, 3)).save(tmp_path / "b.png")
    Image.new("RGB", (50, 40)).save(tmp_path / "large.png")
    (tmp_path / "a.txt").write_text("not a picture")
    assert [(picture.file, picture.size) for picture in own_class_images(tmp_path, 100)] == [("b.png", (5, 4))]
    with pytest.raises(Problem, match="--class-dir .* no readable picture.*large.png: 2000 pixels"):
        (tmp_path / "b.png").unlink()
        own_class_images(tmp_path, 100)
    with pytest.raises(Problem, match="--class-dir .* does not exist"):
        own_class_images(tmp_path / "nowhere", 100)
