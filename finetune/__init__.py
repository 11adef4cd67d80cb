"""finetune: four ways to teach Stable Diffusion a subject, one loop, one honest comparison."""

__version__ = "0.1.0"
