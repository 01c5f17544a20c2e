"""The HTTP surface of the generator: one router, mounted in `vllm serve` or in an app of our own."""
