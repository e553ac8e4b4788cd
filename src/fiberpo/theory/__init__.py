"""The laboratory: the theory behind the objectives, as numbers and pictures."""
