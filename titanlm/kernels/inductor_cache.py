"""Which form of each kernel inductor found fastest, found again below another folder.

Of a kernel inductor may compile several forms, times them at the first launch
and writes which is fastest into a file beside the kernel's source. The file is
among what ``torch.compiler.load_cache_artifacts`` puts below this machine's
folder. But the kernel, which comes with all its forms compiled, looks beside the
absolute path that its source had when it was pickled: where
``$TORCHINDUCTOR_CACHE_DIR`` is another, or the user's name in the default of it,
they are timed again.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any


def look_here() -> None:
    """Let kernels that are loaded look for the fastest form below this process's folder. Once or more."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # these bring the compiler along
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    recheck: Any = CachingAutotuner.recheck_autotune_cache
    if hasattr(recheck, "here"):
        return

    @functools.wraps(recheck)
    def here(self: Any, *args: Any, **settings: Any) -> None:
        if self.filename is not None:
            self.filename = str(Path(cache_dir(), *Path(self.filename).parts[-2:]))
        recheck(self, *args, **settings)

    here.here = True  # type: ignore[attr-defined]
    CachingAutotuner.recheck_autotune_cache = here  # type: ignore[method-assign]
