"""The report in a real browser: offline, on a phone."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from report_runs import run

from kdkernels.report.evaluation import evaluation_page
from kdkernels.report.version import load_version

__all__ = ["run"]  # fixtures

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


MEASURE = """<!doctype html><iframe id="f" src="PAGE" style="width:390px;height:800px;border:0"></iframe><p id="o"></p>
<script>document.getElementById("f").onload = (e) => { const d = e.target.contentDocument;
  const body = getComputedStyle(d.body);
  document.getElementById("o").textContent = "width " + d.documentElement.scrollWidth + " height " + d.body.scrollHeight
    + " size " + body.fontSize + " charts " + [...d.querySelectorAll("svg")].filter(s => s.clientHeight > 50).length;
};</script>"""


@pytest.mark.slow
def test_in_a_real_browser_offline_on_a_phone(run: Path, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser to open the page with; looked for {', '.join(BROWSERS)}")
    page, picture = tmp_path / "report.html", tmp_path / "phone.png"
    page.write_text(evaluation_page([load_version(run, "full")]))
    (tmp_path / "frame.html").write_text(MEASURE.replace("PAGE", page.name))
    line = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
            f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND"]  # fmt: skip
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 120}
    shot = subprocess.run(
        [*line, "--window-size=412,2400", f"--screenshot={picture}", page.as_uri()], check=False, **options
    )
    assert shot.returncode == 0, shot.stderr
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture.stat().st_size > 50_000  # not a blank page
    measure = [*line, "--allow-file-access-from-files", "--virtual-time-budget=3000", "--dump-dom"]
    seen = subprocess.run([*measure, (tmp_path / "frame.html").as_uri()], check=False, **options).stdout
    found = re.search(r"width (\d+) height (\d+) size ([\d.]+)px charts (\d+)", seen)
    assert found, seen[-500:]
    assert int(found[1]) <= 390  # nothing is wider than the phone
    assert int(found[2]) > 2000
    assert float(found[3]) >= 16
    assert int(found[4]) >= 6
