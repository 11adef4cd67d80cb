"""The settings every command and every training method shares. A method adds its own in its own file."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from finetune.errors import Problem
from finetune.settings.fields import setting


class RunSettings(BaseModel):
    """What every command takes."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    model: str = setting("toybox", "base model: toybox (embedded), a diffusers folder, a hub id or a .safetensors checkpoint",
                         group="model")
    seed: int = setting(0, "every random draw is a function of this number, the draw's name and the step", group="model", ge=0)
    device: str = setting("auto", "auto, cpu, cuda or cuda:N", group="model")
    precision: Literal["fp32", "bf16", "fp16"] = setting(
        "fp32", "arithmetic of the frozen network; trainable tensors stay fp32", group="model")


class TrainSettings(RunSettings):
    """What all methods share. Defaults are for Stable Diffusion 1.5; the recipe of a base family replaces them."""

    METHOD: ClassVar[str] = ""

    instance_dir: Path | None = setting(None, "folder with the three to ten pictures of the subject", group="pictures")
    dataset: str | None = setting(None, "instead of a folder: a dataset name or folder the datasets library loads", group="pictures")
    dataset_split: str = setting("train", "split of --dataset", group="pictures")
    image_column: str = setting("image", "column of --dataset with the pictures", group="pictures")
    caption_column: str = setting("text", "column of --dataset with the captions", group="pictures")
    captions: Literal["auto", "template"] = setting(
        "auto", "auto: captions beside the pictures where there are any; template: always the prompt", group="pictures")
    resolution: int = setting(512, "side of the square training picture", unit="pixels", group="pictures", ge=8)
    crop: Literal["center", "random", "none"] = setting(
        "center", "after resizing the short side: centre crop, random crop, or squeeze the whole picture (none)", group="pictures")
    flip: bool = setting(False, "mirror half of the pictures at random; not for faces, text or one-sided subjects", group="pictures")
    max_pixels: int = setting(100_000_000, "refuse to decode a larger picture", unit="pixels", group="pictures", ge=1)

    class_noun: str | None = setting(None, "the plain word for the subject: dog, backpack, watercolor", group="prompts")
    subject: str | None = setting(None, "phrase that names the subject in prompts [default: 'sks NOUN', or the placeholder]", group="prompts")
    instance_prompt: str | None = setting(None, "training prompt; {} stands for the subject phrase [default: 'a photo of a {}']", group="prompts")
    class_prompt: str | None = setting(None, "prompt of the class pictures [default: 'a photo of a NOUN']", group="prompts")
    caption_dropout: float = setting(0.0, "share of training rows whose prompt is emptied", unit="share", group="prompts", ge=0, le=1)

    prior: Literal["images", "distill", "none"] = setting(
        "none", "prior preservation: class pictures rendered by the base, its predictions on class prompts, or nothing", group="prior")
    prior_weight: float = setting(1.0, "lambda: weight of a class row beside an instance row", group="prior", ge=0)
    class_dir: Path | None = setting(None, "own class pictures instead of rendered ones", group="prior")
    class_images: int = setting(100, "class pictures to render", unit="pictures", group="prior", ge=1)
    class_guidance: float = setting(7.5, "guidance scale for rendered class pictures", group="prior", ge=0)
    class_steps: int = setting(30, "sampler steps for rendered class pictures", unit="steps", group="prior", ge=1)

    steps: int = setting(800, "optimizer steps", unit="steps", ge=1)
    batch_size: int = setting(1, "instance pictures per micro-batch; class pictures come on top", unit="pictures", ge=1)
    accumulate: int = setting(1, "micro-batches per optimizer step", ge=1)
    learning_rate: float = setting(1e-4, "peak learning rate", gt=0)
    schedule: Literal["linear", "cosine", "constant"] = setting("linear", "learning rate after warm-up: to zero linearly, as a cosine, or constant")
    warmup: int = setting(0, "steps over which the learning rate rises from zero", unit="steps", ge=0)
    optimizer: Literal["adamw", "adamw8bit"] = setting("adamw", "adamw, or bitsandbytes' 8-bit AdamW (extra 'memory')")
    weight_decay: float = setting(0.0, "AdamW decay of the trained tensors", ge=0)
    beta1: float = setting(0.9, "AdamW: memory of the gradient mean", ge=0, lt=1)
    beta2: float = setting(0.999, "AdamW: memory of the gradient square", ge=0, lt=1)
    clip_norm: float = setting(1.0, "largest norm of the whole gradient; 0 is off", ge=0)
    snr_gamma: float = setting(0.0, "min-SNR weighting of rows; 5 is usual, 0 is off", ge=0)

    memory: Literal["auto", "fast", "low", "lowest"] = setting(
        "auto", "how much speed to give for memory; changes only what was not given; auto: the fastest that fits", group="memory")
    memory_limit: str | None = setting(None, "what auto must fit in, such as 8GB [default: nine tenths of what is free]", group="memory")
    frozen: Literal["auto", "fp32", "bf16", "8bit", "4bit"] = setting(
        "auto", "number format of the UNet's frozen weights; 8bit and 4bit: linear layers by bitsandbytes [auto: that of --precision]", group="memory")
    gradient_checkpointing: bool = setting(
        False, "recompute activations in the backward pass: less memory, a third more time", group="memory")
    step_in_backward: bool = setting(
        False, "optimizer step inside the backward pass, each gradient freed at once; needs --clip-norm 0 and --accumulate 1", group="memory")
    free_encoders: bool = setting(True, "text encoder and VAE leave memory once what is needed of them is computed", group="memory")
    latent_cache: Literal["memory", "disk"] = setting(
        "memory", "where encoded pictures are kept: for this run, or on disk for later runs too", group="memory")
    freed_memory: Literal["auto", "keep", "return", "library"] = setting(
        "auto", "freed memory on a CPU under Linux: kept for the next step, returned to the system, or as the C library likes "
        "[auto: return where --memory or --step-in-backward save it, else keep where the whole UNet trains]", group="memory")
    lean: bool = setting(True, "adapters as two plain products, without their wrapper's checks; the same numbers", group="speed")
    pack: Literal["auto", "on", "off"] = setting(
        "auto", "convolutions in the fastest of several ways, on a CPU in fp32 [auto: large bases; each shape is measured once]", group="speed")
    attention: Literal["auto", "sdpa", "chunked"] = setting(
        "auto", "torch's attention, or our own in chunks of queries for bf16 on a CPU [auto: the faster one]", group="speed")
    channels_last: bool = setting(False, "pictures' channels innermost in memory", group="speed")
    compile: bool = setting(False, "torch.compile of the UNet: minutes before the first step", group="speed")

    stop: Literal["steps", "dvar"] = setting(
        "steps", "end after --steps, or earlier when the loss on the fixed set has settled (dvar)", group="selection")
    stop_window: int = setting(
        6, "dvar: newest losses on the fixed set whose variance is compared with that of all", unit="losses", group="selection", ge=2)
    stop_threshold: float = setting(
        0.15, "dvar: settled when the variance of the newest is less than this share of the variance of all", unit="share",
        group="selection", gt=0, lt=1)
    export_every: int = setting(
        0, "keep an artifact every so many steps, for curves and --keep best; 0: only the last", unit="steps", group="selection", ge=0)
    keep: Literal["last", "best"] = setting(
        "last", "which artifact to keep: the last, or the one the judge scores best (needs --export-every)", group="selection")
    judge: str | None = setting(
        None, "who scores for --keep best: toybox, or a folder with clip/ and encoder/ [default: toybox on toybox, else --clip and --encoder]",
        group="selection")
    clip: str | None = setting(None, "CLIP of that judge: a folder or hub id [default: the judge's]", group="selection")
    encoder: str | None = setting(None, "picture encoder of that judge: a folder or hub id [default: the judge's]", group="selection")

    output: Path | None = setting(None, "folder of the run [default: runs/METHOD-NUMBER]", group="run")
    resume: bool = setting(False, "go on from the newest complete checkpoint of --output", group="run")
    resume_anyway: bool = setting(
        False, "resume under settings other than the checkpoint's, where its tensors fit; the result is then that of no single run", group="run")
    overwrite: bool = setting(False, "clear a finished run in --output first", group="run")
    checkpoint_every: int = setting(500, "save a checkpoint every so many steps; 0: only when interrupted", unit="steps", group="run", ge=0)
    keep_checkpoints: int = setting(1, "complete checkpoints to keep; 0: one while the run goes on, none when it has finished", group="run", ge=0)
    on_nonfinite: Literal["stop", "skip"] = setting(
        "stop", "a loss or gradient that is not a finite number: stop before it is learned, or leave that step out", group="run")
    skip_at_most: int = setting(10, "steps that --on-nonfinite skip may leave out in a row", unit="steps", group="run", ge=1)
    log_every: int = setting(10, "write loss and speed to metrics.jsonl every so many steps", unit="steps", group="run", ge=1)
    validate_every: int = setting(50, "loss on the fixed set of noises and timesteps every so many steps; 0 is off", unit="steps", group="run", ge=0)
    preview_every: int = setting(0, "render previews every so many steps; 0 is off", unit="steps", group="run", ge=0)
    preview_prompt: list[str] = setting([], "prompt to preview, may be repeated [default: the instance prompt]", group="run")
    export_dtype: Literal["fp16", "fp32"] = setting("fp16", "number format of exported weights; embeddings are always fp32", group="run")
    export: list[str] = setting(
        [], "diffusers, webui, kohya or single-file: write that target's files too, where the usual ones lack them; may be repeated", group="run")
    push_to_hub: str | None = setting(
        None, "upload the artifact with a model card to this hub repository (OWNER/NAME); nothing is uploaded without it", group="run")

    @model_validator(mode="after")
    def _possible(self) -> TrainSettings:
        """What settings need of one another is there: said wherever they come together, long before training."""
        if self.keep == "best" and not self.export_every:
            raise Problem("--keep best needs --export-every.", "Without artifacts from along the way there is only the last one to keep.",
                          "Add --export-every 50, for example.")
        if self.step_in_backward and (self.clip_norm or self.accumulate > 1 or self.precision == "fp16"):
            raise Problem("--step-in-backward needs --clip-norm 0, --accumulate 1 and no fp16.",
                          "A tensor is changed before the gradients of the others are known, so nothing can be done to all of them together.",
                          "Add --clip-norm 0 --accumulate 1, or leave --step-in-backward out.")
        if self.stop == "dvar" and not self.validate_every:
            raise Problem("--stop dvar needs --validate-every.", "It watches the loss on the fixed set, and --validate-every 0 switches that off.",
                          "Leave --validate-every out, or give the steps between two looks.")
        return self
