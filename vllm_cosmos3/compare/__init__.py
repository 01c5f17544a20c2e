"""A yardstick: what each faster way to generate costs, on a user's own checkpoint and prompts."""
