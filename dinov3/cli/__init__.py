"""The `dinov3` command. Results go to stdout, messages to stderr; every mistake is one sentence; torch is imported late.

Exit codes: 0 done · 1 an error, as one sentence · 2 wrong usage · 3 done, but images could not be read (they are
listed; with `embed` only new ones count, unless --strict) · 130 interrupted, run the same command to continue.
"""

from __future__ import annotations

import errno
import gc
import os
import sys

from dinov3.errors import DinoError, install

try:
    import typer  # noqa: F401
except ModuleNotFoundError:  # the core that loads models does without
    print(f"the dinov3 command needs typer and rich; install them with: {install('cli')}", file=sys.stderr)
    raise SystemExit(1) from None

# importing a file registers its verbs, in the order in which --help lists them
from dinov3.cli import embedding, models, plan, predict, see, store, training  # noqa: F401
from dinov3.cli.shared import app, is_first, log
from dinov3.cli.training import training_overrides

__all__ = ["app", "main", "training_overrides"]


def main() -> None:
    """Entry point: a `DinoError` is a sentence on stderr and exit code 1."""
    # before torch and numpy are imported: threads that spin for their neighbours take the time of whoever would do the
    # work. OpenBLAS, of numpy and scipy, knows no other way of waiting
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        app()
    except DinoError as error:
        if is_first():
            log(f"error: {error}")
        else:
            from dinov3.train.train import report

            report(error)  # where it is this process's own
        raise SystemExit(1) from None
    except BrokenPipeError:  # `dinov3 models | head`
        sys.stderr.close()
        raise SystemExit(0) from None
    except OSError as error:  # no space, no permission, a file where a folder should be
        room = "; make room and run the same command again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        log(f"error: {error.strerror or error}{f': {error.filename}' if error.filename else ''}{room}")
        raise SystemExit(1) from None
    finally:
        gc.freeze()  # nothing is looked for among a million objects while the process ends: 0.3 s
