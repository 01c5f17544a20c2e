"""Make sure of the Chromium that the tests of pages drive: `make test` and `make screenshots` run it.

Playwright's own downloads are not used: the system's browser gets the system's updates. As root on Debian or
Ubuntu a missing one is installed; otherwise the line that does it is printed, and the tests say it again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
PACKAGES = ("chromium", "fonts-dejavu-core")  # without a font a page has no text
INSTALL = ("apt-get", "install", "--yes", "--no-install-recommends", *PACKAGES)
NO_BROWSER = "VLLM_COSMOS3_NO_BROWSER"


def main() -> int:
    """Install Chromium where it is missing and may be installed. Always 0: most tests need none."""
    if NO_BROWSER in os.environ or any(map(shutil.which, PROGRAMS)):
        return 0
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        print(
            f"chromium: not found; `{' '.join(INSTALL)}` as root provides it, and {NO_BROWSER}=1 leaves the "
            "tests of pages out",
            file=sys.stderr,
        )
        return 0
    print("chromium: installing it", flush=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (("apt-get", "update"), INSTALL):
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
            print(f"chromium: `{' '.join(command)}` failed: {lines[-1]}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
