"""The generator's networks, built from vLLM's layers."""
