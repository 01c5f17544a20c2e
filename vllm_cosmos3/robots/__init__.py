"""Robots: observations to policy requests, actions to joint positions, a module each."""
