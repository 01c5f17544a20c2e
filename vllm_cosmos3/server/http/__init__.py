"""HTTP bodies in, errors and files out."""
