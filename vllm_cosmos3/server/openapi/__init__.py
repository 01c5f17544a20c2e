"""The OpenAPI page: schemas of request bodies and of responses."""
