"""Losses, one a file; ``chunked`` is the engine that runs every one of them."""
