"""Files that are whole or not there."""

import contextlib
import errno
import os
import shutil

from nanotst import UserError

FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG
FULL_IN_TORCH = "unexpected pos", "PytorchStreamWriter"  # in torch.save's RuntimeErrors


def write_safely(path, write):
    """Call write(temporary path), sync, rename: a killed process or a full disk leaves the old file as it
    was."""
    temporary = f"{path}.tmp"
    try:
        write(temporary)
        with open(temporary, "r+b") as f:  # open for writing, or Windows does not sync
            os.fsync(f.fileno())
        os.replace(temporary, path)
        sync_folder(os.path.dirname(path) or ".")
    except (OSError, RuntimeError) as e:  # torch.save reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise UserError(why_not_written(path, e, os.path.exists(path))) from None


def why_not_written(path, error, kept):
    """A line about an error in writing. kept: whether what was there before is still there."""
    free = shutil.disk_usage(os.path.dirname(path) or ".").free
    full = getattr(error, "errno", None) in FULL or any(
        words in str(error) for words in FULL_IN_TORCH
    )
    reason = (
        getattr(error, "strerror", None)
        or f"{type(error).__name__} {' '.join(str(error).split())[:200]}"
    )
    reason = f"the disk is full, or nearly ({free / 1e9:.1f} GB are free)" if full else reason
    old = "; the one before it is untouched" if kept else ""
    todo = ": make room and use --resume" if full and kept else ": make room" if full else ""
    return f"cannot write {path}: {reason}{old}{todo}"


def sync_folder(folder):
    """Have the names in a folder reach the disk, after the files they name."""
    if os.name == "posix":  # Windows cannot open a folder
        fd = os.open(folder, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
