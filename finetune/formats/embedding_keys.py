"""Names of an embedding's single tensor that say nothing about its token. Torch-free, so `inspect` shares them."""

# `emp_params` is one trainer's established misspelling.
ANONYMOUS_KEYS = ("emb_params", "emp_params")
