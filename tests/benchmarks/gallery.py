"""What a long gallery costs the browser: 5,000 rows against 50, in one run. The last line is one JSON object.

Needs Chromium and its driver. Ratios near 1 mean that the length does not matter. Frames are those of 240 steps of a
scroll, a step a frame: at the same speed in both (a fast wheel, up and down), and, as a fling, through the whole list.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "browser")]

from browser import ARGUMENTS, Browser  # noqa: E402
from finished import keep, row  # noqa: E402

from t2vz.gallery import page  # noqa: E402

ROWS = (50, 5000)
_SCROLL = """
const [fling, done] = arguments, steps = 240, times = [];
const height = document.documentElement.scrollHeight - innerHeight, speed = 150, way = Math.min(height, 4500);
let step = 0, last = performance.now();
function next() {
  const now = performance.now();
  times.push(now - last);
  last = now;
  if (step++ >= steps) { done(times.slice(1)); return; }
  const passed = step * speed % (2 * way);
  scrollTo({top: fling ? height * step / steps : passed < way ? passed : 2 * way - passed, behavior: "instant"});
  requestAnimationFrame(next);
}
requestAnimationFrame(next);
"""
_FILTER = """
(() => {
  const field = document.querySelector("[name=words]"), times = [];
  for (const words of ["n", "ni", "nig", "nigh", "night", "night ca", "night cat", ""]) {
    const began = performance.now();
    field.value = words;
    field.dispatchEvent(new Event("input", {bubbles: true}));
    document.body.offsetHeight;
    times.push(performance.now() - began);
  }
  return Math.max(...times);
})()
"""


def main() -> None:
    from selenium import webdriver

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium") or sys.exit("no Chromium")
        for argument in (*ARGUMENTS, f"--user-data-dir={folder}/profile"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            for rows in ROWS:
                out = Path(folder, str(rows))
                keep(out, [row(number) for number in range(1, rows + 1)])
                found[str(rows)] = _measured(Browser(driver, Path(folder)), out)
                print(rows, found[str(rows)])
        finally:
            driver.quit()
    few, many = (found[str(rows)] for rows in ROWS)
    ratios = {f"{name}_ratio": round(many[name] / max(few[name], 1e-9), 2) for name in few}
    print(json.dumps({"benchmark": "gallery", "rows": found, **ratios}))


def _measured(browser: Browser, out: Path) -> dict[str, float]:
    began = time.perf_counter()
    where, _ = page.write(out)
    write_s = time.perf_counter() - began
    browser.open(Path(where).as_uri())
    browser.until("document.querySelectorAll('.card').length")
    ready_s = browser.js("performance.now()") / 1000
    browser.driver.set_script_timeout(120)
    scroll_ms, fling_ms = (sorted(browser.driver.execute_async_script(_SCROLL, fling)) for fling in (False, True))
    return {
        "write_s": round(write_s, 3),
        "page_bytes": Path(where).stat().st_size,
        "ready_s": round(ready_s, 3),
        "scroll_frame_median_ms": round(statistics.median(scroll_ms), 2),
        "scroll_frame_p99_ms": round(scroll_ms[int(0.99 * len(scroll_ms))], 2),
        "fling_frame_median_ms": round(statistics.median(fling_ms), 2),
        "fling_frame_p99_ms": round(fling_ms[int(0.99 * len(fling_ms))], 2),
        "slowest_filter_ms": round(browser.js(_FILTER), 2),
        "elements": browser.js("document.querySelectorAll('*').length"),
    }


if __name__ == "__main__":
    main()
