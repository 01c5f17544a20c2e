"""Make the pictures of the playground that the README shows: what `make screenshots` runs.

Serves the demo checkpoint on this machine, makes three clips in Chromium, asks about one, and writes WebP files.
"""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from chromium import PROGRAMS
from local_server import local_server, program

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "pictures"
CHECKPOINT = ROOT / "checkpoints" / "demo"
FLAGS = ["--served-model-name", "demo", "--dtype", "float32", "--enforce-eager"]
FLAGS += ["--max-model-len", "4096", "--max-num-seqs", "8"]
FLAGS += ["--override-generation-config", '{"temperature": 0}']  # the same answers each time
PROMPTS = (
    "a small blue circle pushes a large yellow triangle on a white background",
    "a gripper lifts a green square on a dark background",
    "a large red square moves to the right on a grey background",
)
QUESTIONS = (
    "What happens in the clip?",
    "How many things are there?",
)
PATIENCE = 300_000  # milliseconds


def main() -> int:
    """Write the pictures. The exit status."""
    browser_program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if browser_program is None:
        return 1  # tools/chromium.py has said why
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        command = [
            program(),
            "serve",
            str(CHECKPOINT),
            *FLAGS,
            "--storage-path",
            f"{scratch}/storage",
        ]
        with (
            local_server(command, log=Path(scratch) / "server.log") as server,
            sync_playwright() as playwright,
        ):
            browser = playwright.chromium.launch(
                executable_path=browser_program, args=["--no-sandbox"]
            )
            page = browser.new_page(viewport={"width": 1280, "height": 1060})
            page.set_default_timeout(PATIENCE)
            page.goto(f"{server.url}/")
            page.wait_for_selector("body[data-ready]")
            for seed, prompt in enumerate(PROMPTS):
                make(page, prompt, seed)
            save(page, "playground")
            page.emulate_media(color_scheme="dark")
            page.set_viewport_size({"width": 1280, "height": 760})
            ask(page)
            save(page, "playground-ask")
            page.set_viewport_size({"width": 390, "height": 844})
            page.click("#tab-create")
            page.wait_for_timeout(300)
            save(page, "playground-phone")
            browser.close()
    return 0


def make(page: Page, prompt: str, seed: int) -> None:
    """One clip, as the demo checkpoint was trained."""
    page.fill("#prompt", prompt)
    page.select_option("#size", "320x192")
    page.locator("details.more").evaluate("more => { more.open = true; }")
    for name, value in (
        ("fps", 12),
        ("frames", 17),
        ("steps", 16),
        ("guidance", 3),
        ("seed", seed),
    ):
        page.fill(f"#{name}", str(value))
    page.locator("details.more").evaluate("more => { more.open = false; }")
    page.click("#submit")
    page.locator("#gallery img").nth(seed).wait_for()
    page.wait_for_selector("#stage video")


def ask(page: Page) -> None:
    """A conversation about the last clip."""
    page.locator("#stage").get_by_role("button", name="Ask").click()
    for place, question in enumerate(QUESTIONS):
        page.fill("#question", question)
        page.click("#send")
        page.locator(".transcript .assistant[aria-busy=false]").nth(place).wait_for()
    page.locator("#question").evaluate("question => question.blur()")


def save(page: Page, name: str) -> None:
    """The page as a small WebP, from its top."""
    page.evaluate("scrollTo(0, 0)")
    page.wait_for_timeout(500)
    picture = Image.open(io.BytesIO(page.screenshot()))
    picture.convert("RGB").save(FOLDER / f"{name}.webp", quality=80, method=6)


if __name__ == "__main__":
    sys.exit(main())
