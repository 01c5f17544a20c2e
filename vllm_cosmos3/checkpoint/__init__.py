"""A checkpoint folder: its kind, configuration, tensors and weights, and where it comes from."""
