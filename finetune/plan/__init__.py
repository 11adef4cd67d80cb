"""Cost before the first step: memory, files and time of a run, from configurations alone."""
