"""`--push-to-hub`: the artifact and a model card on the hub, only when asked. `finetune export RUN --card FILE` shows the card alone.

The card says what it is, how it was trained, how it scored, whose licence the base has, and how each program loads it. Nothing
in it names a path of this machine; the pictures it was trained on are never uploaded, only pictures the model drew.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from finetune import runs
from finetune.errors import Problem

SAMPLES = 6
TAGS = {"lora": ["lora", "diffusers-lora"], "dreambooth": ["dreambooth"], "textual-inversion": ["textual_inversion"], "hypernetwork": ["hypernetwork"]}
# The licences of the published bases. A fine-tuned base may have another: then the card says "other", and the user has to look.
LICENCES = {"toybox": "apache-2.0", "sd1": "creativeml-openrail-m", "sd2": "openrail++", "sdxl": "openrail++"}
# Settings that say nothing of the result, or say where files lay.
PRIVATE = ("instance_dir", "class_dir", "dataset", "output", "resume", "overwrite", "model", "device", "judge", "clip", "encoder", "push_to_hub",
           "log_every", "keep_checkpoints", "checkpoint_every", "preview_every", "preview_prompt", "max_pixels", "image_column", "caption_column",
           "dataset_split", "method", "export_every", "export", "class_noun")
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Artifact:
    """What the card is about: the artifact folder, its artifact.json, and the run's files where they are at hand."""

    folder: Path
    told: dict[str, Any]
    manifest: dict[str, Any]
    settings: dict[str, Any]
    run: Path

    @property
    def family(self) -> str:
        return self.manifest.get("model", {}).get("family", "other")

    @property
    def base(self) -> str:
        """The base's name without the folder it lay in; a hub id stays whole."""
        name = str(self.told.get("metadata", {}).get("finetune.base", "unknown"))
        return name if REPOSITORY.fullmatch(name) and not Path(name).exists() else Path(name).name

    @property
    def files(self) -> list[dict[str, Any]]:
        return self.told["files"]

    def file(self, suffix: str, without: Iterable[str] = ()) -> str:
        """Name of the first file with that ending at the top of the folder, or an empty text."""
        names = [entry["file"] for entry in self.files if entry["file"].endswith(suffix) and "/" not in entry["file"]]
        return next((name for name in names if name not in without), "")


def read(path: Path) -> Artifact:
    """The artifact at a path: a run or its artifact folder.

    Raises:
        Problem: neither.
    """
    folder = path / "artifact" if (path / "artifact" / "artifact.json").is_file() else path
    if not (folder / "artifact.json").is_file():
        raise Problem(f"{path} is no run or artifact of finetune.", "A model card says how something was trained, which only a run knows.",
                      "Name a run's folder, or the artifact folder in it.")
    run = folder.parent
    known = (run / "manifest.json").is_file()
    return Artifact(folder, runs.read_json(folder / "artifact.json"), runs.read_json(run / "manifest.json") if known else {},
                    runs.read_json(run / "settings.json") if known and (run / "settings.json").is_file() else {}, run)


def samples(artifact: Artifact) -> list[tuple[Path, str]]:
    """Up to six pictures the model drew, with their prompts: a comparison's, else the newest previews."""
    index = artifact.run / "images" / "images.json"
    listed = runs.read_json(index).get("pictures", {}) if index.is_file() else {}
    compared = [(index.parent / file, str(told.get("prompt", ""))) for file, told in sorted(listed.items()) if file.startswith("subject-")]
    compared = [(file, prompt) for file, prompt in compared if file.is_file()]
    if compared:
        return compared[:: max(1, -(-len(compared) // SAMPLES))][:SAMPLES]
    prompts = artifact.settings.get("preview_prompt") or [str(artifact.manifest.get("instance_prompt", ""))]
    previews = sorted((artifact.run / "previews").glob("*.png"), key=lambda file: (file.stem.rpartition("-")[0], file.stem), reverse=True)
    newest = [file for file in reversed(previews) if file.stem.startswith(previews[0].stem.rpartition("-")[0])]
    return [(file, prompts[min(int(file.stem.rpartition("-")[2]), len(prompts) - 1)]) for file in newest[:SAMPLES]]


def write_card(path: Path, target: Path) -> None:
    """Write the model card to a file, uploading nothing; its pictures go into `samples/` beside it."""
    artifact = read(path)
    runs.write_text(target, card(artifact, "OWNER/NAME"))
    _copy_samples(artifact, target.parent)


def _copy_samples(artifact: Artifact, folder: Path) -> None:
    for number, (picture, _) in enumerate(samples(artifact), 1):
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        _copy_pixels(picture, folder / "samples" / f"{number}.png")


def _copy_pixels(source: Path, target: Path) -> None:
    """The picture without its text chunks, which may name folders of this machine."""
    from PIL import Image

    with Image.open(source) as picture:
        plain = Image.frombytes("RGB", picture.size, picture.convert("RGB").tobytes())
    with runs.atomic_path(target) as temporary:
        plain.save(temporary)


def check_name(repository: str) -> None:
    """Raise a Problem for what is no OWNER/NAME: before training, where it costs nothing."""
    if REPOSITORY.fullmatch(repository) is None:
        raise Problem(f"--push-to-hub {repository!r} is no repository.", "The hub's names are OWNER/NAME.", "Use your user name and a name for the model.")


def push(path: Path, repository: str, console: Console) -> str:
    """Upload the artifact folder, its card and sample pictures; returns the page's address. A new repository is private.

    Raises:
        Problem: not a repository name, not logged in, or the hub refused.
    """
    check_name(repository)
    artifact = read(path)
    stated = str(artifact.told.get("metadata", {}).get("finetune.base", ""))
    if stated != artifact.base:
        console.print(f"Note: the files' metadata name the base as it was given here: {stated}", style="yellow", soft_wrap=True)
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = huggingface_hub.HfApi()
    with tempfile.TemporaryDirectory() as folder:
        staged = Path(folder)
        shutil.copytree(artifact.folder, staged, dirs_exist_ok=True)
        runs.write_text(staged / "README.md", card(artifact, repository))
        _copy_samples(artifact, staged)
        try:
            api.create_repo(repository, repo_type="model", private=True, exist_ok=True)
            api.upload_folder(repo_id=repository, repo_type="model", folder_path=str(staged), commit_message=f"{artifact.told['method']} by finetune")
        except (HfHubHTTPError, LocalTokenNotFoundError, OSError, ValueError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise Problem(f"The upload to {repository} failed: {runs.hide(first)}", "The artifact itself is whole on disk.",
                          f"Log in with `hf auth login`, then: finetune export {path} --push-to-hub {repository}") from None
    address = f"https://huggingface.co/{repository}"
    console.print(f"Uploaded to {address}. A new repository is private until you make it public.", soft_wrap=True)
    return address


def card(artifact: Artifact, repository: str) -> str:
    """The model card as Markdown with the hub's YAML head."""
    from finetune.cli.hub_card import render

    text = render(artifact, repository, LICENCES.get(artifact.family, "other"), TAGS.get(artifact.told["method"], []),
                  [prompt for _, prompt in samples(artifact)], _training(artifact), _scores(artifact))
    return runs.hide(text, assigned=False)


def _training(artifact: Artifact) -> list[tuple[str, str]]:
    """Label and value of the settings worth telling."""
    manifest, settings = artifact.manifest, artifact.settings
    found = [("pictures", str(len(manifest["pictures"])))] if "pictures" in manifest else []
    idle = tuple(prefix for prefix, key, off in (("class_", "prior", "none"), ("prior_w", "prior", "none"), ("stop_", "stop", "steps"))
                 if settings.get(key) == off)  # settings of what was switched off
    if "class_noun" in settings:
        found.append(("class noun", str(settings["class_noun"])))
    found += [(key.replace("_", " "), f"{value:g}" if isinstance(value, float) else str(value)) for key, value in settings.items()
              if key not in PRIVATE and not key.startswith(idle) and value not in (None, "", [], False)]
    if "seconds" in manifest:
        found.append(("time", f"{manifest['seconds']['training']:,.0f} s of training on {manifest.get('device', 'cpu')}"))
    found.append(("versions", artifact.told.get("metadata", {}).get("finetune.versions", "")))
    return found


def _scores(artifact: Artifact) -> list[tuple[str, str, str]]:
    """(metric, value, meaning): the comparison's scores of this run, else its loss on the fixed set."""
    place = artifact.run.parent / "scores.json"
    if place.is_file():
        scores = runs.read_json(place)
        row = next((row for row in scores.get("rows", []) if row.get("row") == artifact.run.name), None)
        if row:
            return [(column["title"], f"{row['scores'][column['key']]['mean']:.3f}", column.get("help", column.get("about", "")))
                    for column in scores.get("columns", []) if column["key"] in row["scores"]]
    losses = [line["validation_loss"] for line in runs.read_metrics(artifact.run) if "validation_loss" in line] if artifact.manifest else []
    if len(losses) > 1:
        return [("loss on the fixed set", f"{losses[0]:.4f} before, {losses[-1]:.4f} after", "mean squared error on held-back noises and timesteps")]
    return []
