"""titanlm: pretrain language models from TOML files.

Importing the package is cheap: torch and the other heavy dependencies are
imported by the modules that use them, never from here.
"""

__version__ = "0.1.0"
