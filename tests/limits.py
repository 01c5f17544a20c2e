"""Time limits of the tests."""

HANG = 600.0  # seconds after which something hangs: far above what a busy machine takes
