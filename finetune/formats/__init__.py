"""The only place that knows foreign tensor names and file layouts. Importing the package imports no torch."""
