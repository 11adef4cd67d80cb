"""The embedded base: a rendered, captioned world, and how a small Stable Diffusion and its judge are trained on it."""
