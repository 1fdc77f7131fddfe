"""CPU seconds and peak memory of reading and checking a manifest of a million rows, in a fresh process.

python tests/benchmarks/manifest.py [rows]
"""

import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path

READ = """
import json, resource, sys
from t2vz.manifest import BadRow, read
rows = bad = 0
for row in read(sys.argv[1]):
    rows += 1
    bad += isinstance(row, BadRow)
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"rows": rows, "bad": bad, "cpu_s": round(used.ru_utime + used.ru_stime, 2),
                  "peak_rss_mb": used.ru_maxrss // 1024}))
"""
HEADER = [
    "id",
    "mode",
    "prompt",
    "negative_prompt",
    "source",
    "condition",
    "seed",
    "guidance_scale",
    "fps",
    "width",
]


def write(path: Path, rows: int) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(HEADER)
        for n in range(rows):
            prompt = f'a "small" ball, number {n}, rolling over a lawn in the evening light'
            given = f"row {n}" if n % 2 else ""
            if n % 3 == 0:
                clip = f"clips/{n % 100}.mp4"
                out.writerow([given, "control", prompt, "blurry, low quality", clip, "edge+depth", n, 7.5, "", 512])
            else:
                seed = "x" if n % 1000 == 1 else n
                out.writerow([given, "text", prompt, "blurry, low quality", "", "", seed, 7.5, "30000/1001", 512])


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "manifest.csv")
        write(path, rows)
        size_mb = path.stat().st_size // 2**20
        done = subprocess.run([sys.executable, "-c", READ, path], check=True, capture_output=True, text=True)
    print(json.dumps({"benchmark": "manifest", "size_mb": size_mb, **json.loads(done.stdout)}))


if __name__ == "__main__":
    main()
