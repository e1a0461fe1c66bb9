"""Models, one family a file, composed from ``layers``."""
