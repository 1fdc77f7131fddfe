"""What tests ask of their S3 server (`s3_server.py`)."""

from __future__ import annotations

import urllib.request
import uuid


class S3:
    """A real S3 server of the tests' own. bucket: a new one for each time it is asked."""

    secret = "this-is-the-secret-key"

    def __init__(self, url: str) -> None:
        self.url = url

    def bucket(self) -> str:
        name = f"bucket-{uuid.uuid4()}"
        with urllib.request.urlopen(urllib.request.Request(f"{self.url}/{name}", method="PUT", data=b"")):
            return f"s3://{name}"

    def fails(self, *, before: int = 0, after: int = 0) -> None:
        with urllib.request.urlopen(f"{self.url}/t2vz-faults?before={before}&after={after}", data=b""):
            pass

    def requests(self) -> list[str]:
        """What was asked since the last such question, as "METHOD /bucket/key"."""
        with urllib.request.urlopen(f"{self.url}/t2vz-requests") as answer:
            return answer.read().decode().splitlines()
