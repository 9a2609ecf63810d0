"""A page looked at in Chromium (Qt WebEngine, without a screen): what it asked for, what it complained of, how it fits.

As a program: `python -m tests.browser PAGE PICTURE WIDTH light|dark` prints one JSON object.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

MODULE = "PySide6.QtWebEngineWidgets"
HEIGHT = 3000

LOOK = """(() => {
  const chart = document.querySelector("svg[data-lines]");
  const box = chart.getBoundingClientRect();
  chart.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width / 2, clientY: box.top + 5}));
  const seen = element => { const r = element.getBoundingClientRect(); return r.width > 1 && r.height > 1; };
  return JSON.stringify({
    viewport: innerWidth, width: document.documentElement.scrollWidth,
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    ground: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,
    charts: [...document.querySelectorAll("svg[data-lines]")].filter(seen).length,
    curves: [...document.querySelectorAll("svg[data-lines] path")].filter(seen).length,
    maps: [...document.querySelectorAll(".map svg")].filter(seen).length,
    cells: [...document.querySelectorAll(".map rect")].filter(seen).length,
    tables: [...document.querySelectorAll("table")].filter(seen).length,
    samples: [...document.querySelectorAll("pre")].map(pre => pre.textContent).join("\\n"),
    pointed: chart.parentElement.querySelector("output").textContent,
    smallest: Math.min(...[...document.querySelectorAll("svg[data-lines] text")].map(
      text => text.getBoundingClientRect().height)),
  });
})()"""


@functools.cache
def missing_browser() -> str | None:
    """Why there is no browser here, None if there is one."""
    done = subprocess.run(
        [sys.executable, "-c", f"import {MODULE}"], capture_output=True, text=True, env=_environment(), check=False
    )
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["it ended by a signal"])[-1]


def look_at(page: Path, picture: Path, *, width: int, dark: bool = False) -> dict[str, Any]:
    """Open a page in a process of its own and take a picture; returns what LOOK says, `requests` and `complaints`."""
    words = [sys.executable, "-m", "tests.browser", str(page), str(picture), str(width), "dark" if dark else "light"]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=300, env=_environment(dark), cwd=Path(__file__).parents[1],
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def _environment(dark: bool = False) -> dict[str, str]:
    # Chromium's sandbox refuses to run as root, as containers do; the page is our own
    flags = "--no-sandbox --disable-gpu" + (" --blink-settings=preferredColorScheme=0" if dark else "")
    return {**os.environ, "QT_QPA_PLATFORM": "offscreen", "QTWEBENGINE_CHROMIUM_FLAGS": flags}


def main(page: str, picture: str, width: str) -> None:
    from PySide6.QtCore import QTimer, QUrl
    from PySide6.QtWebEngineCore import QWebEnginePage, QWebEngineProfile, QWebEngineUrlRequestInterceptor
    from PySide6.QtWebEngineWidgets import QWebEngineView
    from PySide6.QtWidgets import QApplication

    requests: list[str] = []
    complaints: list[str] = []

    class Watch(QWebEngineUrlRequestInterceptor):
        def interceptRequest(self, info: Any) -> None:
            requests.append(info.requestUrl().toString())

    class Page(QWebEnginePage):
        def javaScriptConsoleMessage(self, level: Any, message: str, line: int, source: str) -> None:
            complaints.append(f"{source}:{line}: {message}")

    app = QApplication(sys.argv[:1])
    profile = QWebEngineProfile()
    watch = Watch()
    profile.setUrlRequestInterceptor(watch)
    view = QWebEngineView()
    shown = Page(profile, view)
    view.setPage(shown)
    view.resize(int(width), HEIGHT)
    view.show()

    def answered(text: str) -> None:
        view.grab().save(picture)
        print(json.dumps({**json.loads(text), "requests": requests, "complaints": complaints}), flush=True)
        # Qt's own order of taking things down may crash
        os._exit(0)

    def loaded(fine: bool) -> None:
        assert fine
        QTimer.singleShot(500, lambda: shown.runJavaScript(LOOK, answered))

    shown.loadFinished.connect(loaded)
    shown.load(QUrl.fromLocalFile(str(Path(page).resolve())))
    app.exec()


if __name__ == "__main__":
    main(*sys.argv[1:4])
