"""The pages for people who take their files elsewhere: the Python in them runs, the commands in them parse, the links lead somewhere."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import save_file

from finetune.cli import app
from finetune.formats import embedding, ldm, lora
from finetune.formats.header import expected_safetensors_bytes
from finetune.formats.inspect import inspect
from finetune.formats.lora import LoraModule
from finetune.formats.readers import PROGRAMS

DOCS = Path(__file__).parents[1] / "docs"
USING = sorted((DOCS / "using").glob("*.md"))
PAGES = [*USING, *(DOCS / f"{name}.md" for name in ("exporting", "generating", "lora-tools", "prompts", "formats"))]
PLACEHOLDER = re.compile(r"[A-Z_]{3,}|\.\.\.|…")


@pytest.fixture(scope="module")
def desk(tmp_path_factory, tiny_model, tiny_xl_model):
    """A folder with the files that docs/using/diffusers.md speaks of, on tiny bases."""
    folder = tmp_path_factory.mktemp("desk")
    shutil.copytree(tiny_model, folder / "base")
    shutil.copytree(tiny_model, folder / "dreambooth-artifact")
    shutil.copytree(tiny_xl_model, folder / "base-xl")
    torch.manual_seed(0)
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q"
    modules = {name: LoraModule(torch.randn(2, 64), torch.randn(64, 2), 2.0)}
    lora.write_kohya(folder / "sks-dog.safetensors", modules, {})
    lora.write_peft(folder / "artifact/pytorch_lora_weights.safetensors", modules, {})
    vectors = torch.randn(1, 48)
    embedding.write_safetensors(folder / "my-dog.safetensors", vectors, {})
    embedding.write_webui(folder / "my-dog.pt", vectors, "my-dog", 1, None)
    embedding.write_diffusers(folder / "learned_embeds.safetensors", vectors, "<my-dog>", {})
    ldm.write(folder / "dog.safetensors", ldm.of_folder(tiny_model), {}, "F32")
    return folder


def test_the_python_for_diffusers_runs(desk, monkeypatch):
    monkeypatch.chdir(desk)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "using/diffusers.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 8
    space: dict = {}
    for block in blocks:
        if "learned_embeds_2" in block:  # there the word has SDXL's widths
            for number in ("", "_2"):
                width = json.loads((desk / f"base-xl/text_encoder{number}/config.json").read_text())["hidden_size"]
                save_file({"<my-dog>": torch.ones(1, width)}, desk / f"learned_embeds{number}.safetensors")
        space.pop("picture", None)
        exec(compile(block.replace("num_inference_steps=25", "num_inference_steps=2"), "docs/using/diffusers.md", "exec"), space)
        if "images[0]" in block:
            assert space["picture"].size == (32, 32)
    assert "<my-dog>" in space["xl"].tokenizer_2.get_vocab()


def test_diffusers_needs_a_folder_to_read_a_single_file(desk):
    from diffusers import StableDiffusionPipeline

    with pytest.raises(Exception) as caught:
        StableDiffusionPipeline.from_single_file(str(desk / "dog.safetensors"), local_files_only=True)
    assert type(caught.value).__name__ in ("LocalEntryNotFoundError", "OSError", "OfflineModeIsEnabled")


def commands(page):
    """Every `finetune ...` of a page: in blocks, continued lines joined, and in running text."""
    text = page.read_text(encoding="utf-8")
    found = []
    for block in re.findall(r"```\w*\n(.*?)```", text, re.DOTALL):
        lines = block.replace("\\\n", " ").split("\n")
        found += [line.strip().removeprefix("$ ").partition("  #")[0] for line in lines if line.strip().removeprefix("$ ").startswith("finetune ")]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    found += [" ".join(code.split()) for code in re.findall(r"`(finetune [^`]+)`", prose)]
    return found


def parse(words):
    """Hand the words to the command line's own parser, and run nothing.

    Raises:
        Exception: of the parser or a Problem: a verb or flag that does not exist, a value of the wrong kind.
    """
    command = verb(words[0])
    if len(words) > 1 and "--help" not in words:
        command.make_context(f"finetune {words[0]}", list(words[1:]))


def verb(name):
    group = app.build()
    return group.get_command(typer.Context(group), name)


def check(line):
    """Parse a command; of one with placeholders, look its flags up."""
    words = shlex.split(line)[1:]
    if not words or PLACEHOLDER.search(words[0]):
        return
    if any(PLACEHOLDER.search(word) for word in words):
        known = {flag for parameter in verb(words[0]).params for flag in (*parameter.opts, *parameter.secondary_opts)}
        unknown = [word for word in words if word.startswith("--") and word.partition("=")[0] not in known]
        assert not unknown, f"{line}: {unknown}"
    else:
        parse(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_every_command_of_a_page_parses(page):
    for line in commands(page):
        try:
            check(line)
        except Exception as error:
            pytest.fail(f"{page.name}: {line}: {error}")


def test_the_check_of_commands_can_fail():
    for line in ("finetune generate --no-such-flag", "finetune convert FILE --too kohya", "finetune nonsense", "finetune export x --to nowhere --output y"):
        with pytest.raises((Exception, AssertionError), match="such|too|nonsense|nowhere"):
            check(line)


def test_the_pages_hold_commands_and_lead_somewhere():
    assert sum(len(commands(page)) for page in PAGES) > 60
    for page in [*PAGES, DOCS / "README.md"]:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
        for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", text):
            other = (page.parent / target if target else page).read_text(encoding="utf-8")
            anchors = {re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).strip().replace(" ", "-") for line in other.split("\n") if line.startswith("#")}
            assert anchor in anchors, f"{page.name} links to {target}#{anchor}"


def test_each_program_has_its_page_and_inspect_speaks_of_each():
    assert {page.stem for page in USING} == {"README", *(program.lower() for program in PROGRAMS if program != "finetune")}


def test_what_inspect_advises_parses(tmp_path):
    """Every remedy is a command that exists; the page says what `inspect` says of Forge and of safetensors hypernetworks."""
    save_file({"unet:0:up": torch.ones(8, 2), "unet:0:down": torch.ones(2, 8)}, tmp_path / "numbered.safetensors")
    save_file({"unet.x.to_k.lora_A.weight": torch.ones(2, 8), "unet.x.to_k.lora_B.weight": torch.ones(8, 2)}, tmp_path / "pytorch_lora_weights.safetensors")
    save_file({"lora_unet_mid_block_attentions_0_proj_in.diff": torch.ones(8, 8)}, tmp_path / "a difference.safetensors")
    torch.save({"string_to_param": {"*": torch.ones(1, 768)}, "name": "toy"}, tmp_path / "other.pt")
    remedies = [command for file in sorted(tmp_path.iterdir()) for _, command in inspect(file).remedies]
    assert len(remedies) == 5
    for command in remedies:
        parse([word for word in shlex.split(command)[1:]])


def test_sizes_in_the_table_follow_from_the_shapes():
    """LoRA: parameters per rank; embeddings: their header; hypernetworks: two networks a width, for key and for value."""
    def hypernetwork(*widths):
        return sum(2 * 4 * ((2 * width) * width + 2 * width + width * (2 * width) + width) for width in widths)

    def embedding_file(**shapes):
        return expected_safetensors_bytes(shapes, "F32")

    text = (DOCS / "formats.md").read_text(encoding="utf-8").partition("## Sizes")[2].partition("##")[0]
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.split("\n") if line.startswith("| ")]
    table = {row[0]: [int(cell.replace(",", "")) for cell in row[1:] if cell] for row in rows[1:]}
    per_rank = (99_456, 107_648, 785_920)  # of every to_q, to_k, to_v, to_out of cross-attention in SD 1.5, SD 2.1, SDXL
    assert table["LoRA of cross-attention, weights alone, rank 4"] == [2 * 4 * count for count in per_rank]
    assert table["embedding, one vector, fp32, `emb_params`"] == [
        embedding_file(emb_params=(1, 768)), embedding_file(emb_params=(1, 1024)), embedding_file(clip_g=(1, 1280), clip_l=(1, 768))]
    assert table["hypernetwork 1,2,1 on the text alone, numbers alone, fp32"] == [hypernetwork(768), hypernetwork(1024)]
    assert table["hypernetwork 1,2,1 on every width, numbers alone, fp32"] == [
        hypernetwork(768, 320, 640, 1280), hypernetwork(1024, 320, 640, 1280), hypernetwork(2048, 640, 1280)]
