"""A tab of a real browser, as the tests use it."""

from __future__ import annotations

import json
import time
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

# Of Chromium: for machines without a screen, a GPU or a network.
ARGUMENTS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--no-proxy-server", "--force-device-scale-factor=1", "--autoplay-policy=no-user-gesture-required"),
)

PHONE = {"width": 360, "height": 740}


class Browser:
    """driver: Selenium's, for what is not here (elements, keys)."""

    def __init__(self, driver: Any, pictures: Path) -> None:
        self.driver = driver
        self._pictures = pictures

    def open(
        self, url: str, *, width: int = 1280, height: int = 900, dark: bool = False, reduced_motion: bool = False
    ) -> None:
        """Go there with a window of that size in px, as a person with these preferences."""
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500},
        )
        preferences = {
            "prefers-color-scheme": "dark" if dark else "light",
            "prefers-reduced-motion": "reduce" if reduced_motion else "no-preference",
        }
        features = [{"name": name, "value": value} for name, value in preferences.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.driver.get(url)

    def js(self, code: str, *arguments: Any) -> Any:
        """The value of a JavaScript expression; `arguments[0]`, … in it are the further arguments."""
        return self.driver.execute_script(f"return ({code})", *arguments)

    def until(self, code: str, *arguments: Any, timeout_s: float = 20) -> Any:
        """The first value of a JavaScript expression that is true. Raises TimeoutError."""
        ends_at = time.monotonic() + timeout_s
        while not (value := self.js(code, *arguments)):
            if time.monotonic() > ends_at:
                raise TimeoutError(f"{timeout_s:g} s without {code}")
            time.sleep(0.02)
        return value

    def keys(self, *keys: str) -> None:
        """Press keys one after the other, where the focus is: letters, or Selenium's `Keys`."""
        from selenium.webdriver import ActionChains

        for key in keys:
            ActionChains(self.driver, duration=0).send_keys(key).perform()

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def find_all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def picture(self, name: str) -> Path:
        """A screenshot of what the window shows, as PNG."""
        path = self._pictures / f"{name}.png"
        self.driver.save_screenshot(str(path))
        return path

    def complaints(self) -> list[str]:
        """What the browser's console says since the last call, errors and warnings: broken scripts, refused loads."""
        return [f"{entry['level']}: {entry['message']}" for entry in self.driver.get_log("browser")
                if entry["level"] in ("SEVERE", "WARNING")]  # fmt: skip

    def requested(self) -> list[str]:
        """The addresses that pages asked for since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]

    def requested_outside(self) -> list[str]:
        """Those of them that are not on this machine."""
        inside = ("file", "data", "blob", "about", "chrome", "devtools", "chrome-extension")
        return [
            url
            for url in self.requested()
            if urlsplit(url).scheme not in inside and urlsplit(url).hostname not in ("127.0.0.1", "localhost")
        ]

    def barriers(self, *, within: str = "html") -> list[str]:
        """What axe-core finds serious or critical for people who use a keyboard or a screen reader, or see badly."""
        if self.js("typeof axe") == "undefined":
            # By the debugger, which the page's Content-Security-Policy does not bind.
            self.driver.execute_cdp_cmd("Runtime.evaluate", {"expression": axe_script()})
        self.driver.set_script_timeout(60)
        found = self.driver.execute_async_script(
            "axe.run(arguments[0], {resultTypes: ['violations']}).then(arguments[1], e => arguments[1](String(e)))",
            within,
        )
        if isinstance(found, str):
            raise RuntimeError(f"axe: {found}")
        return [
            f"{rule['id']} ({rule['impact']}): {node['html'][:200]}: {node['failureSummary']}"
            for rule in found["violations"]
            if rule["impact"] in ("serious", "critical")
            for node in rule["nodes"]
        ]


def axe_script() -> str:
    """axe-core, which a package from PyPI carries."""
    return files("axe_playwright_python").joinpath("axe.min.js").read_text("utf-8")
