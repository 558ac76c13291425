"""Fails when the tracked files are too large: a clone carries every byte ever committed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

MEBIBYTE = 2**20
ALL, ONE = 34 * MEBIBYTE, 15_000_000  # bytes, each exclusive


def main(root: Path) -> int:
    """Weighs what git tracks under `root`; 0 where it fits, 1 with the reasons on stderr where it does not."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, check=True, capture_output=True, text=True).stdout
    sizes = {name: path.lstat().st_size for name in listed.split("\0") if name and (path := root / name).is_file()}
    total = sum(sizes.values())
    heaviest = sorted(sizes, key=lambda name: sizes[name], reverse=True)
    wrong = [f"{name} has {sizes[name]:,} bytes; a file stays under {ONE:,}" for name in heaviest if sizes[name] >= ONE]
    if total >= ALL:
        most = ", ".join(f"{name} ({sizes[name]:,})" for name in heaviest[:5])
        wrong.append(f"tracked files have {total:,} bytes; all stay under {ALL:,}; the largest: {most}")
    for line in wrong:
        print(f"size: {line}", file=sys.stderr)
    print(f"{len(sizes)} tracked files, {total / MEBIBYTE:.1f} of {ALL // MEBIBYTE} MiB")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else ".")))
