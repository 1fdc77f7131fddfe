"""Renders manifests/modes.csv and puts the strips of its rows into t2vz/modes/pictures, for the page on the modes.

python manifests/make_pictures.py [output folder]
"""

from __future__ import annotations

import sys
from pathlib import Path

from t2vz.cli import main as t2vz
from t2vz.results import read
from t2vz.sheet import strip_key

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "t2vz" / "modes" / "pictures"


def main() -> int:
    out = sys.argv[1] if len(sys.argv) > 1 else "modes-out"
    code = t2vz(["run", str(ROOT / "manifests" / "modes.csv"), "--out", out])
    PICTURES.mkdir(exist_ok=True)
    for row in read(out).where(status="ok"):
        strip = Path(out, strip_key(row.output_uri or ""))
        (PICTURES / f"{row.id}.webp").write_bytes(strip.read_bytes())
        print(f"{row.id}: {strip.stat().st_size / 1000:.0f} kB")
    return code


if __name__ == "__main__":
    sys.exit(main())
