"""JSON files of the published layout, by size and kind."""
