"""Robots: observations to policy requests, actions to joint positions, a module each."""

from vllm_cosmos3.robots import droid

__all__ = ["droid"]
