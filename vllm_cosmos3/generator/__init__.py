"""The diffusion generator: one request from token ids to pixels, sound and actions."""
