"""Use the page of lab/live.py in a real Chromium: `python -m lab.live_browser`.

Needs Debian's chromium-driver. Sentences are typed, screenshots show open mouths, and the ruler
reads the film that the page saves; a second page plays and is closed; the server is killed.
"""

import argparse
import base64
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np

from data.codecs import Film, make_codecs
from data.decoding import decode_clip
from lab.ruler import Ruler, speech_figures
from sample import SHIPPED, load_talker

FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
FLAGS += ["--window-size=980,712"]
TEXTS = ("mama", "hello you", "my name is ada", "look at me", "how are you", "i am drawn by a net")
TEXTS += ("what you type", "is what i say", "red green blue", "one two three", "good night")
SPEECH = "transcript_error", "lip", "sync", "sync_lag_ms"  # of the film that the page saves
ENTER = "\ue007"  # in WebDriver
RECORD = """film.upcoming.set = function (number, frame) {
  (window.spoken ??= {})[number] = frame.symbol; return Map.prototype.set.call(this, number, frame) }"""


class Browser:
    """Chromium, driven by chromedriver (WebDriver, a protocol of the W3C)."""

    def __init__(self, driver: str, downloads: Path):
        options = {"args": FLAGS, "prefs": {"download.default_directory": str(downloads)}}
        wanted = {"alwaysMatch": {"goog:chromeOptions": options}}
        self.session = f"{driver}/session"
        self.session += "/" + self.tell("", capabilities=wanted)["sessionId"]

    def tell(self, path: str, method: str = "POST", **arguments):
        """Send a command -> its value."""
        data = json.dumps(arguments).encode() if method == "POST" else None
        with urlopen(Request(self.session + path, data, method=method), timeout=60) as answer:
            return json.load(answer)["value"]

    def element(self, selector: str, path: str, **arguments) -> None:
        """Send a command to an element."""
        (name,) = self.tell("/element", using="css selector", value=selector).values()
        self.tell(f"/element/{name}/{path}", **arguments)

    def run(self, expression: str):
        """The value of an expression in the page."""
        return self.tell("/execute/sync", script=f"return {expression}", args=[])

    def wait(self, condition: str) -> None:
        """Until an expression is true. Raises TimeoutError."""
        end = time.monotonic() + 60
        while not self.run(f"Boolean({condition})"):
            if time.monotonic() > end:
                raise TimeoutError(f"{condition}; the page: {self.run('document.body.innerText')}")
            time.sleep(0.02)

    def begin(self, address: str) -> None:
        self.tell("/url", url=address)
        self.element("#begin", "click")
        self.wait("film?.drawn > 16")

    def say(self, text: str, screenshot: Path | None = None) -> None:
        """Type a text, and wait until it is spoken. The screenshot shows an open mouth."""
        self.run("caption.text = ''")
        self.element("#text", "value", text=text + ENTER)
        if screenshot:
            self.wait("caption.text.length > 2 && 'aeio'.includes(about.alphabet[caption.symbol])")
            screenshot.write_bytes(base64.b64decode(self.tell("/screenshot", "GET")))
        self.wait(f"caption.text.includes('{text}')")


def read_back(browser: Browser, saved: Path, cfg) -> dict:
    """Save the film, which is shorter than a minute, and read it with the ruler -> figures."""
    browser.element("#save", "click")
    end = time.monotonic() + 60
    while not saved.exists() and time.monotonic() < end:
        time.sleep(0.1)
    clip, spoken = decode_clip(saved, cfg), browser.run("spoken")
    symbols = [spoken.get(str(i), cfg.silence) for i in range(len(clip.frames))]
    film = Film(clip.frames[None], clip.samples[None], np.array([symbols]), np.zeros(1, int))
    ruler = Ruler(cfg)
    figures = speech_figures(ruler, film, ruler.read(film), cfg.fps, len(clip.frames))
    return {name: round(float(figures[name]), 4) for name in SPEECH} | {"frames": len(clip.frames)}


def memory(process: subprocess.Popen) -> int:
    """What a process holds, in MiB."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s*([0-9]+) kB", status)[1]) // 1024


def use(browser: Browser, address: str, server: subprocess.Popen, args) -> dict:
    """Do what a person would do -> figures."""
    browser.begin(address)
    browser.run(RECORD)
    for text in TEXTS:
        browser.say(text, args.out / f"{text}.png")
    cfg = load_talker(args.checkpoint, make_codecs)[0].cfg
    figures = read_back(browser, args.out / "film.mp4", cfg)

    page, other = browser.tell("/window", "GET"), browser.tell("/window/new", type="tab")
    browser.tell("/window", handle=other["handle"])
    browser.begin(address)
    browser.tell("/window", "DELETE")
    browser.tell("/window", handle=page)

    began, memories, count = time.monotonic(), [], max(16, round(200 / 60 * args.minutes))
    for i in range(count):
        time.sleep(max(0, began + 60 * args.minutes * i / count - time.monotonic()))
        browser.say("mama")
        memories.append(memory(server))
    figures["memory_mib"] = memories[:: count // 8]
    for name in ("latencies", "models"):
        figures[f"median_{name}"] = statistics.median(browser.run(f"figures.{name}"))
    figures |= {name: browser.run(f"figures.{name}") for name in ("gaps", "skipped", "late")}
    server.kill()
    browser.wait("document.body.innerText.includes('the server does not answer')")
    return figures


def main(argv=None) -> int:
    """Prints figures as JSON, or the reason why there are none."""
    parser = argparse.ArgumentParser("lab.live_browser", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default="runs/live", help="folder; default %(default)s")
    parser.add_argument("--checkpoint", type=Path, default=SHIPPED)
    parser.add_argument("--minutes", type=float, default=1, help="of talk, 200 sentences an hour")
    args = parser.parse_args(argv)
    if not shutil.which("chromedriver"):
        print("skipped: no chromedriver here (Debian: apt-get install chromium-driver)")
        return 0
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "film.mp4").unlink(missing_ok=True)
    words = [sys.executable, "-m", "lab.live", "--port=0", "--checkpoint", str(args.checkpoint)]
    pipe = {"stdout": subprocess.PIPE, "text": True}
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,  # of Chromium
        subprocess.Popen(words, **pipe) as server,
        subprocess.Popen(
            ["chromedriver", "--port=0"],
            env=os.environ | {"TMPDIR": folder},
            stderr=subprocess.DEVNULL,
            **pipe,
        ) as driver,
    ):
        browser = None
        try:
            address = server.stdout.readline().split(" ")[0]
            if not address:
                return server.wait()  # it has said why
            started = next(line for line in driver.stdout if "started successfully" in line)
            port = re.search("port ([0-9]+)", started)[1]
            browser = Browser(f"http://127.0.0.1:{port}", args.out)
            print(json.dumps(use(browser, address, server, args)))
        finally:
            server.kill()
            if browser:
                with suppress(OSError):  # the driver may have died
                    browser.tell("", "DELETE")
            driver.terminate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
