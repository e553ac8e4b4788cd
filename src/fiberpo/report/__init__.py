"""The report of a training run: an HTML page, an overview image, and tables for the terminal."""
