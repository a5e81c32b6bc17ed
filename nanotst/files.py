"""Files that are written whole: after a kill or on a full disk, a file is complete or still the old one."""

import contextlib
import json
import os

from nanotst import UserError


def write_safely(path, write):
    """Make the folder, call write(file) on a temporary file, sync it, rename it to `path`. Raises UserError,
    and leaves the old file, if that fails."""
    temporary, folder = f"{path}.tmp", os.path.dirname(path) or "."
    try:
        os.makedirs(folder, exist_ok=True)
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        if os.name == "posix":  # Windows cannot open a folder
            fd = os.open(folder, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
    except (OSError, RuntimeError) as e:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        cause = e if isinstance(e, OSError) else e.__context__  # torch.save hides it
        reason = getattr(cause, "strerror", None) or e
        old = "; the old one is untouched" * os.path.exists(path)
        raise UserError(f"cannot write {path}: {reason}{old}") from None


def write_text(path, text):
    write_safely(path, lambda file: file.write(text.encode()))


def read_json(path):
    """The object in a file, {} if there is none or it is damaged."""
    with contextlib.suppress(OSError, ValueError, TypeError), open(path, "rb") as f:
        return dict(json.load(f))
    return {}
