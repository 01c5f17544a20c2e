"""Training of the demo checkpoint: a small world of flat things, and every part of a model of it."""
