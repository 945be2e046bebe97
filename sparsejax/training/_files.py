"""Files that are either there in full or not at all."""

import os
from pathlib import Path


def write_atomic(path: str | Path, data: str | bytes) -> None:
    """Writes `data` to `path` so that a crash leaves the old file or the new one.

    The bytes go to a neighbour first, reach the disk, and then take the name.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
