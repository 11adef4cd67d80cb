"""Which pictures a run uses, which not and why: looked at once, before any weights are loaded."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from finetune import runs
from finetune.data.captions import caption_of, is_caption_file, read_captions, unused
from finetune.data.picture import Picture, Unreadable, decode
from finetune.errors import Problem
from finetune.settings import TrainSettings

_UNREADABLE_KINDS = {
    **dict.fromkeys((".heic", ".heif", ".hif", ".avif", ".jxl", ".jp2"), "Pillow here cannot read {}; save it as JPEG or PNG"),
    **dict.fromkeys((".svg", ".ai", ".pdf"), "{} files are drawings, not pixels; export it as PNG"),
}
LEADS_OUT = "a link that leads out of the folder; copy the file into it"
# Camera raw files must not be tried: many are TIFF inside, and Pillow would take their thumbnail for the picture.
_RAW = {".3fr", ".arw", ".cr2", ".cr3", ".dng", ".erf", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".srw"}


@dataclass
class Intake:
    """What was found.

    Args:
        pictures: usable ones in order of name (folder) or row (dataset).
        skipped: (file, reason) of everything that was left out.
        notes: further lines for the user, caption coverage among them.
    """

    pictures: list[Picture] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def intake(settings: TrainSettings) -> Intake:
    """Find and check the instance pictures of a run, from --instance-dir or --dataset.

    Raises:
        Problem: not exactly one source given, source missing, or no usable picture in it.
    """
    if settings.instance_dir is None and settings.dataset is None:
        raise Problem("There are no pictures to learn from.", "Neither --instance-dir nor --dataset is given.",
                      "Name a folder with three to ten pictures of the subject: --instance-dir FOLDER.")
    if settings.instance_dir is not None and settings.dataset is not None:
        raise Problem(f"Both --instance-dir {settings.instance_dir} and --dataset {settings.dataset} are given.",
                      "A run learns from one source.", "Leave one of them out.")
    if settings.dataset is not None:
        from finetune.data.dataset import read_dataset  # `datasets` takes seconds to import

        found, source = read_dataset(settings), f"--dataset {settings.dataset}"
    else:
        found = scan(settings.instance_dir, settings.max_pixels, captions=settings.captions == "auto")
        source = f"--instance-dir {settings.instance_dir}"
    if not found.pictures:
        listed = [f"{file}: {reason}" for file, reason in found.skipped]
        more = f"; and {len(listed) - 3} more" if len(listed) > 3 else ""
        raise Problem(f"{source} has no readable picture.", ("; ".join(listed[:3]) + more if listed else "It is empty") + ".",
                      "Give it JPEG, PNG or WebP pictures.")
    _note_enlarged(found.pictures, settings.resolution)
    found.notes.append(_coverage(found.pictures, settings.captions))
    return found


def scan(folder: Path, max_pixels: int, *, flag: str = "--instance-dir", captions: bool = True) -> Intake:
    """Look at every entry of a folder, not at its sub-folders. Hidden ones are passed over in silence.

    Args:
        max_pixels: larger pictures are left out, undecoded.
        flag: where the folder came from, for messages.
        captions: whether to read captions beside the pictures.

    Raises:
        Problem: there is no such folder, or it cannot be listed.
    """
    found = Intake()
    visible = [path for path in _entries(Path(folder), flag) if not path.name.startswith(".")]
    strangers = {path for path in visible if path.is_symlink() and leads_out(path)}  # what they show is not of this folder
    caption_files = [path for path in visible if is_caption_file(path) and path not in strangers and path.is_file()]
    texts, notes = read_captions(caption_files) if captions else ({}, [])
    if caption_files and not captions:
        notes.append(f"{len(caption_files)} caption file(s) beside the pictures are not read")
    first_with: dict[str, str] = {}
    for path in visible:
        if path in caption_files:
            continue
        try:
            if path in strangers:
                raise Unreadable(LEADS_OUT)
            picture = _read(path, max_pixels, first_with)
        except Unreadable as error:
            found.skipped.append((path.name, str(error)))
        else:
            picture.caption = caption_of(picture.file, texts)
            found.pictures.append(picture)
    known = [picture.file for picture in found.pictures] + [file for file, _ in found.skipped]
    notes += [f"a caption is given for {name}, but there is no such picture" for name in unused(texts, known)]
    found.notes += notes
    return found


def leads_out(path: Path) -> bool:
    """Whether a link leads out of the folder it lies in, to something that is there."""
    try:
        return path.exists() and not path.resolve().is_relative_to(path.parent.resolve())
    except (OSError, RuntimeError):  # to itself, for one
        return False


def _entries(folder: Path, flag: str) -> list[Path]:
    if not folder.exists():
        raise Problem(f"{flag} {folder} does not exist.", "", "Check the path; quote it when it has spaces.")
    if not folder.is_dir():
        raise Problem(f"{flag} {folder} is not a folder.", "", "Name the folder the pictures are in.")
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise Problem(f"{flag} {folder} cannot be listed.", f"{error.strerror}.", "Check its permissions.") from error


def _read(path: Path, max_pixels: int, first_with: dict[str, str]) -> Picture:
    """One entry of a folder as a checked picture; Unreadable with the reason otherwise. A copy of one before is not decoded again."""
    suffix = path.suffix.lower()
    if path.is_dir():
        raise Unreadable("a sub-folder; only the folder itself is read")
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
            raise Unreadable("not a file")
    except OSError:
        raise Unreadable("a link that leads nowhere") from None
    if suffix in _RAW:
        raise Unreadable("a camera raw file; export it as JPEG or PNG")
    try:
        digest = runs.sha256(path)
    except OSError as error:
        raise Unreadable(f"cannot be read ({error.strerror})") from None
    refuse_twin(digest, path.name, first_with)
    try:
        image, notes = decode(path, max_pixels)
    except Unreadable as error:
        hint = _UNREADABLE_KINDS.get(suffix)
        raise Unreadable(hint.format(suffix[1:].upper()) if hint and "format Pillow" in str(error) else str(error)) from None
    first_with[digest] = path.name
    return Picture(path.name, path, None, "; ".join(notes), digest, image.size, max_pixels=max_pixels)


def refuse_twin(digest: str, name: str, first_with: dict[str, str]) -> None:
    """Leave out a file whose bytes were kept before: it would count double in every epoch."""
    first = first_with.get(digest, name)
    if first != name:
        raise Unreadable(f"the same file as {first}, kept once")


def _note_enlarged(pictures: Iterable[Picture], resolution: int) -> None:
    for picture in pictures:
        if min(picture.size) < resolution:
            said = f"enlarged from {picture.size[0]} x {picture.size[1]}"
            picture.note = f"{picture.note}; {said}" if picture.note else said


def _coverage(pictures: Sequence[Picture], mode: str) -> str:
    captioned, total = sum(picture.caption is not None for picture in pictures), len(pictures)
    if mode == "template":
        return "captions: none are used (--captions template); every picture takes the prompt template"
    if captioned == total:
        return f"captions: all {total} pictures have their own"
    if not captioned:
        return f"captions: no picture has its own; all {total} take the prompt template"
    bare = [picture.file for picture in pictures if picture.caption is None]
    named = ", ".join(bare[:5]) + (", ..." if len(bare) > 5 else "")
    return f"captions: {captioned} of {total} pictures have their own; the prompt template serves the rest ({named})"


def describe_intake(intake: Intake) -> list[str]:
    """Lines to print before step one: how many pictures, treatments, what was left out and why, caption coverage."""
    count = len(intake.pictures)
    lines = [f"{count} picture{'s' * (count != 1)} to learn from"]
    lines += [f"  {picture.file}: {picture.note}" for picture in intake.pictures if picture.note]
    lines += [f"  left out {file}: {reason}" for file, reason in intake.skipped]
    return lines + [f"  {note}" for note in intake.notes]
