"""The picture of a report in the README.

    python docs/screenshot.py runs/tiny/report.html docs/images/report.png

Needs Chromium (`apt-get install chromium`) and requirements-dev.txt.
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

report, picture = map(Path, sys.argv[1:])
with sync_playwright() as playwright:
    browser = playwright.chromium.launch(
        executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
    )
    page = browser.new_page(viewport={"width": 1280, "height": 775}, color_scheme="light")
    page.goto(report.absolute().as_uri())
    page.wait_for_selector("html[data-ready]")
    page.screenshot(path=picture)
    browser.close()
