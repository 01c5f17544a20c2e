"""The stage: the process that runs requests on all ranks through vLLM's executor, and its client."""
