"""A page as a browser and a reader find it: its elements, and where they lie."""

import html
import json
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser

VOID = {"meta", "br", "img", "input", "hr", "link", "col"}
# What matplotlib writes as <path .../>; HTML closes it by the next tag.
CLOSED = {"path", "use", "line", "rect", "circle", "image"}
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


class Page(HTMLParser):
    """Elements of a page, as `(tag, attributes)`; mistakes of its structure."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.mistakes, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        self.mistakes += [f"<{tag}> is never closed" for tag in self.open]
        ids = Counter(attributes["id"] for _, attributes in self.elements if "id" in attributes)
        self.mistakes += [f"id {name} stands twice" for name, times in ids.items() if times > 1]

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID and "svg" not in self.open:
            self.mistakes.append(f"<{tag}/> is not closed in HTML")

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.mistakes.append(f"</{tag}> at {self.getpos()} closes another element")

    def handle_data(self, data):
        self.texts.append(data)

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def sent_alone(text):
    """What a page would load, or run: nothing, if it can be sent as it is."""
    page, found = Page(text), []
    for tag, attributes in page.elements:
        loads = {key: attributes.get(key) or "" for key in ("src", "href", "xlink:href", "style")}
        bad = [f"{k}={v}" for k, v in loads.items() if "//" in v and not v.startswith("data:")]
        bad += [f"{k}={v}" for k, v in loads.items() if "javascript:" in v]
        bad += [key for key in attributes if key.startswith("on")]
        if tag in ("script", "link", "iframe", "object", "embed", "base") or bad:
            found.append((tag, bad))
    return found + [("css", "url")] * text.count("url(http")


MEASURE = """
const found = {};
for (const frame of document.querySelectorAll("iframe")) {
  const inner = frame.contentDocument, root = inner.documentElement, bad = [];
  const width = root.clientWidth;
  if (root.scrollWidth > width) bad.push(`page is ${root.scrollWidth} wide`);
  for (const image of inner.images)
    if (!(image.complete && image.naturalWidth)) bad.push(`no image: ${image.alt}`);
  for (const svg of inner.querySelectorAll("figure > svg"))
    if (svg.getBoundingClientRect().height < 40) bad.push("a figure without height");
  const walk = inner.createTreeWalker(inner.body, NodeFilter.SHOW_TEXT), boxes = [];
  while (walk.nextNode()) {
    const shown = walk.currentNode.parentElement.checkVisibility();
    if (!shown || !walk.currentNode.data.trim()) continue;
    const range = inner.createRange();
    range.selectNodeContents(walk.currentNode);
    for (const box of range.getClientRects())
      if (box.width > 1 && box.left > -100) boxes.push([box, walk.currentNode.data.trim()]);
  }
  for (const [box, text] of boxes)
    if (box.right > width + 1) bad.push(`beyond the page: ${text}`);
  boxes.sort((a, b) => a[0].top - b[0].top);
  boxes.forEach(([a, text], i) => {
    for (const [b, other] of boxes.slice(i + 1)) {
      if (b.top > a.bottom) break;
      const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (across > 2 && down > 4) bad.push(`${text} lies over ${other}`);
    }
  });
  const colors = getComputedStyle(inner.body);
  found[frame.width] = {bad: bad.slice(0, 9), texts: boxes.length, paper: colors.backgroundColor};
}
document.body.setAttribute("data-found", JSON.stringify(found));
"""


def measured(text, folder, *, dark):
    """What a browser finds in a page of 400 and 1400 pixels, by its width."""
    frames = "".join(
        f'<iframe width="{width}" height="900" srcdoc="{html.escape(text)}"></iframe>'
        for width in (400, 1400)
    )
    script = f"<script>addEventListener('load', () => {{{MEASURE}}})</script>"
    outside = folder / "frames.html"
    outside.write_text(f"<!DOCTYPE html><body>{frames}{script}</body>", encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1500,900"]
    command += ["--blink-settings=preferredColorScheme=0"] * dark
    command += [f"--user-data-dir={folder / 'profile'}", "--dump-dom", outside.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    body = next(attributes for tag, attributes in Page(dom).elements if tag == "body")
    return json.loads(body["data-found"])
