"""Colour profiles: what a picture's numbers mean, made what everything after the intake takes them for, sRGB.

Phones store Display P3 and cameras Adobe RGB, whose numbers taken for sRGB are paler pictures. The conversion is that of LittleCMS
(`PIL.ImageCms`): relative colorimetric with black point compensation, as browsers and darkrooms show pictures.
"""

from __future__ import annotations

import io

from PIL import Image, ImageCms

LARGEST = 8 * 2**20  # bytes of a profile; printers' have 3 MB at most
SPACES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # as a profile spells it -> Pillow's mode
MODES = {"RGB": "RGB", "RGBA": "RGB", "P": "RGB", "PA": "RGB", "L": "L", "LA": "L", "CMYK": "CMYK"}  # mode -> what its profile is about


def to_srgb(image: Image.Image) -> tuple[Image.Image, str]:
    """The picture with its embedded profile applied, and what was done ("" without one, or for one that is sRGB).

    Transparency is kept. A profile that is damaged, or of another kind than the pixels, is left out, which is said.
    """
    content = image.info.get("icc_profile")
    if not content or image.mode == "LAB":  # LAB is no device's colours
        return image, ""
    if image.mode not in MODES:
        return image, f"its colour profile is not applied to mode {image.mode}"
    try:
        if len(content) > LARGEST:
            raise ValueError("too large")
        profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
        name = plain(profile.profile.profile_description)
        if "srgb" in name.lower():
            return image, ""
        if SPACES.get(profile.profile.xcolor_space) != MODES[image.mode]:
            return image, f"its colour profile {name!r} is for other pixels, so not applied"
        return _converted(image, profile), f"colours from {name!r} to sRGB"
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, MemoryError):
        return image, "its colour profile is damaged, so not applied"


def plain(text: str | None) -> str:
    """A profile's name as one short line of ordinary signs: it comes out of a stranger's file."""
    return "".join(sign for sign in (text or "").encode(errors="replace").decode() if sign.isprintable())[:60].strip() or "without a name"


def _converted(image: Image.Image, profile: ImageCms.ImageCmsProfile) -> Image.Image:
    """RGB, or RGBA where the picture has transparency."""
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    colours = image.convert(MODES[image.mode])
    found = ImageCms.profileToProfile(colours, profile, ImageCms.createProfile("sRGB"), renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
                                      outputMode="RGB", flags=ImageCms.Flags.BLACKPOINTCOMPENSATION)
    if alpha is not None:
        found.putalpha(alpha)
    return found
