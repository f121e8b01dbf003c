"""Headless Chromium for the tests: the one of the system, driven by playwright, whose own download is never used."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync")  # fmt: skip
PHONE = {"width": 390, "height": 844}
READABLE = 4.5  # contrast of text: WCAG 2.2, 1.4.3

# The least contrast of an element that holds text, and that text. Inside a drawing text has the fill's colour.
LEAST_CONTRAST = """() => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => {
    const linear = (c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = channels(color).map((c) => linear(c / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor;
      if (channels(color)[3] !== 0) return color;
    }
    return "rgb(255, 255, 255)";
  };
  let least = { ratio: Infinity, text: "" };
  for (const element of document.querySelectorAll("body *")) {
    const text = [...element.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data.trim()).join(" ").trim();
    if (!text || !element.getClientRects().length || element.closest("script, style, defs")) continue;
    const style = getComputedStyle(element);
    const [a, b] = [light(element.closest("svg") ? style.fill : style.color), light(behind(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < least.ratio) least = { ratio, text: text.slice(0, 80) };
  }
  return least;
}"""


@dataclass
class Tab:
    """A page, what its console said was wrong, and every address that it asked for."""

    page: Any
    errors: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    @property
    def overflow_px(self) -> int:
        """How much wider the page is than its window."""
        return self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")

    def least_contrast(self) -> dict[str, Any]:
        return self.page.evaluate(LEAST_CONTRAST)


@contextmanager
def tab(browser: Any, **settings: Any) -> Iterator[Tab]:
    """A page with nothing from any other one. settings: playwright's, such as viewport and color_scheme."""
    context = browser.new_context(**settings)
    found = Tab(context.new_page())
    found.page.on("console", lambda said: found.errors.append(said.text) if said.type == "error" else None)
    found.page.on("pageerror", lambda error: found.errors.append(str(error)))
    found.page.on("request", lambda request: found.asked.append(request.url))
    try:
        yield found
    finally:
        context.close()
