"""Jobs: planned, queued, run, kept in the journal."""
