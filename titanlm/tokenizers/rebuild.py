"""A tokenizer out of the files that travelled with an artifact.

A tokenizer that needs files (``tokenizer.files()`` is not empty) has a factory
with an optional keyword ``files``: given, it wins over any path in the
settings, because the path names a file of the machine that trained.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from titanlm.errors import DataError
from titanlm.registry import Component, Tokenizer, lookup


def rebuild(component: Component, files: Mapping[str, bytes]) -> Tokenizer:
    """The tokenizer of ``component`` from ``files``, what its ``files()`` once gave; no path is opened.

    Raises DataError when there are files and the factory takes none.
    """
    factory = lookup("tokenizer", component.name).factory
    if "files" in inspect.signature(factory).parameters:
        return factory(component.config, files=files)
    if files:
        raise DataError(
            f"tokenizer {component.name!r} cannot be rebuilt from {', '.join(sorted(files))}: "
            "its factory lacks the keyword `files: Mapping[str, bytes] | None = None`"
        )
    return factory(component.config)
