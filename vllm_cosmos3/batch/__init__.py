"""Batch files: records of JSON, JSONL and YAML, read as requests."""
