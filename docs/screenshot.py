"""Pictures of a report for the documentation: ``python docs/screenshot.py REPORT DIRECTORY``."""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
SECTIONS = {"explorer.png": "section.explorer", "gated.png": "section:has(#gated-title)"}


def main(report: Path, folder: Path) -> None:
    """Write one picture a section."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        page.goto(report.resolve().as_uri())
        page.wait_for_selector("html[data-drawn]")
        page.locator("#explorer-stratum").select_option(label="trajectory")
        for name, selector in SECTIONS.items():
            box = page.locator(selector).bounding_box()
            clip = {
                "x": box["x"] - 16, "y": box["y"] - 12,
                "width": box["width"] + 32, "height": box["height"] + 24,
            }  # fmt: skip
            page.screenshot(path=folder / name, clip=clip, full_page=True)
            print(folder / name)
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
