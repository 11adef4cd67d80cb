"""The only place that knows foreign tensor names and file layouts. Nothing here imports torch until it is needed."""
