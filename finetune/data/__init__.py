"""From a folder of pictures to weighted rows of latents: intake, captions, class images, caches."""

from finetune.data.class_images import class_image_folder, class_images, own_class_images
from finetune.data.intake import Intake, describe_intake, intake, scan
from finetune.data.latents import Latents, cache_folder, to_tensor
from finetune.data.picture import Picture, fit
from finetune.data.prompts import OBJECT_TEMPLATES, STYLE_TEMPLATES, caption_candidates, fill, unnamed
from finetune.data.rows import Row, Rows
from finetune.data.source import MicroBatch, Source, source

__all__ = [
    "OBJECT_TEMPLATES", "STYLE_TEMPLATES", "Intake", "Latents", "MicroBatch", "Picture", "Row", "Rows", "Source",
    "cache_folder", "caption_candidates", "class_image_folder", "class_images", "describe_intake", "fill", "fit", "intake",
    "own_class_images", "scan", "source", "to_tensor", "unnamed",
]
