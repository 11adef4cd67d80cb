"""Embedding files: exact sizes, every known layout, and diffusers as the independent reader."""

import pytest
import torch
from safetensors.torch import save_file

from finetune.errors import Problem
from finetune.formats import embedding
from finetune.formats.header import expected_safetensors_bytes

VECTORS = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("vectors, width, size", [(1, 768, 3_152), (4, 768, 12_368), (8, 768, 24_656), (1, 1024, 4_176), (8, 1024, 32_848)])
def test_safetensors_sizes_of_published_widths(vectors, width, size):
    assert expected_safetensors_bytes({"emb_params": (vectors, width)}, "F32") == size
    assert expected_safetensors_bytes({"emb_params": (vectors, width)}, "F32", {"format": "pt"}) == size + 32


@pytest.mark.parametrize("vectors, width, size", [(1, 768, 3_572), (4, 768, 12_788), (8, 1024, 33_268)])
def test_webui_file_sizes(tmp_path, vectors, width, size):
    embedding.write_webui(tmp_path / "mystyle.pt", torch.randn(vectors, width), "mystyle")
    content = torch.load(tmp_path / "mystyle.pt", weights_only=True)
    torch.save(content, tmp_path / "torch.pt", _use_new_zipfile_serialization=False)
    # torch names a storage by its address, whose decimal digits vary by one or two, twice; ours is called "0".
    digits = len(str(content["string_to_param"]["*"].untyped_storage()._cdata))
    theirs = (tmp_path / "torch.pt").stat().st_size
    assert abs(theirs - size) <= 4
    assert (tmp_path / "mystyle.pt").stat().st_size == theirs - 2 * (digits - 1)


def test_round_trips_are_bit_equal(tmp_path):
    embedding.write_safetensors(tmp_path / "toy.safetensors", VECTORS, {"finetune.trigger": "toy"})
    embedding.write_webui(tmp_path / "toy.pt", VECTORS, "toy", 500, "sd15", "cc6cb27103")
    embedding.write_diffusers(tmp_path / "learned_embeds.safetensors", VECTORS, "<toy>", {})
    plain = embedding.read(tmp_path / "toy.safetensors")
    webui = embedding.read(tmp_path / "toy.pt")
    token = embedding.read(tmp_path / "learned_embeds.safetensors")
    assert all(torch.equal(found.vectors, VECTORS) for found in (plain, webui, token))
    assert (plain.token, webui.token, token.token) == (None, "toy", "<toy>")
    assert plain.metadata["finetune.trigger"] == "toy"
    assert webui.metadata == {"name": "toy", "step": "500", "sd_checkpoint": "cc6cb27103", "sd_checkpoint_name": "sd15"}


def test_the_webui_dict_is_what_its_reader_looks_for(tmp_path):
    embedding.write_webui(tmp_path / "toy.pt", VECTORS.half(), "toy", 500, "sd15", "cc6cb27103")
    content = torch.load(tmp_path / "toy.pt", weights_only=True)
    assert content["string_to_token"] == {"*": 265} and list(content["string_to_param"]) == ["*"]
    assert type(content["string_to_param"]) is dict and content["string_to_param"]["*"].dtype == torch.float32
    assert (content["name"], content["step"], content["sd_checkpoint"], content["sd_checkpoint_name"]) == ("toy", 500, "cc6cb27103", "sd15")


@pytest.mark.parametrize("key", ["emb_params", "emp_params"])
def test_anonymous_keys_state_no_token(tmp_path, key):
    save_file({key: VECTORS.half()}, tmp_path / "x.safetensors")
    found = embedding.read(tmp_path / "x.safetensors")
    assert found.token is None and found.vectors.dtype == torch.float32 and torch.equal(found.vectors, VECTORS.half().float())


def test_one_trainers_second_tensor_is_passed_over(tmp_path):
    save_file({"emp_params": VECTORS, "emp_params_out": VECTORS + 1}, tmp_path / "x.safetensors")
    assert torch.equal(embedding.read(tmp_path / "x.safetensors").vectors, VECTORS)


def test_a_lone_vector_becomes_one_row(tmp_path):
    torch.save({"<toy>": VECTORS[0].clone()}, tmp_path / "learned_embeds.bin")
    found = embedding.read(tmp_path / "learned_embeds.bin")
    assert found.token == "<toy>" and torch.equal(found.vectors, VECTORS[:1])


@pytest.mark.parametrize("before_torch_1_12", [False, True])
def test_parameter_dicts_of_older_trainers_load(tmp_path, before_torch_1_12):
    table = torch.nn.ParameterDict({"*": torch.nn.Parameter(VECTORS)})
    if before_torch_1_12:
        del table.__dict__["_keys"]
    torch.save({"string_to_token": {"*": torch.tensor(265)}, "string_to_param": table, "name": "old"}, tmp_path / "old.pt")
    found = embedding.read(tmp_path / "old.pt")
    assert found.token == "old" and torch.equal(found.vectors, VECTORS)


def test_sdxl_pairs_keep_both_tables(tmp_path):
    save_file({"clip_l": VECTORS, "clip_g": torch.ones(3, 20)}, tmp_path / "x.safetensors")
    found = embedding.read(tmp_path / "x.safetensors")
    assert torch.equal(found.vectors, VECTORS) and torch.equal(found.second, torch.ones(3, 20))


@pytest.mark.parametrize("content", [{"a": VECTORS, "b": VECTORS}, {}, {"string_to_param": {"a": VECTORS, "b": VECTORS}}, [VECTORS], {"x": VECTORS[None]}])
def test_other_contents_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(Problem, match="not a Textual Inversion embedding|have shape"):
        embedding.read(tmp_path / "x.pt")


def test_names_that_cannot_be_triggers_are_refused(tmp_path):
    with pytest.raises(Problem, match="'my toy' cannot be a file name"):
        embedding.write_safetensors(tmp_path / "my toy.safetensors", VECTORS, {})
    with pytest.raises(Problem, match="named 'toy' but its file 'dog.pt'"):
        embedding.write_webui(tmp_path / "dog.pt", VECTORS, "toy")
    with pytest.raises(Problem, match="not one word"):
        embedding.write_diffusers(tmp_path / "x.safetensors", VECTORS, "my toy", {})


def test_diffusers_reads_all_three(tmp_path):
    from diffusers.loaders.textual_inversion import load_textual_inversion_state_dicts

    embedding.write_safetensors(tmp_path / "toy.safetensors", VECTORS, {})
    embedding.write_webui(tmp_path / "toy.pt", VECTORS, "toy")
    embedding.write_diffusers(tmp_path / "learned_embeds.safetensors", VECTORS, "<toy>", {})
    plain, token = load_textual_inversion_state_dicts(
        [str(tmp_path / "toy.safetensors"), str(tmp_path / "learned_embeds.safetensors")], local_files_only=True
    )
    assert torch.equal(plain["emb_params"], VECTORS) and torch.equal(token["<toy>"], VECTORS)
    (webui,) = load_textual_inversion_state_dicts([str(tmp_path / "toy.pt")], use_safetensors=False, local_files_only=True)
    assert webui["name"] == "toy" and torch.equal(webui["string_to_param"]["*"], VECTORS)
