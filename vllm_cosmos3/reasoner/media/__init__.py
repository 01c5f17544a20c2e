"""The reasoner's front end: pictures and clips to patches, inside vLLM's processor interface."""
