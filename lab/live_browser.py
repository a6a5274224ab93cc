"""Use the page of lab/live.py in a real Chromium: `python -m lab.live_browser --out FOLDER`.

Needs Debian's chromium-driver. Two pages play; in one of them sentences are typed, screenshots show
open mouths, and the ruler reads the saved film. At last the server is killed.
"""

import argparse
import base64
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import Request, urlopen, urlretrieve

import numpy as np

from data.codecs import Film, make_codecs
from data.decoding import decode_clip
from lab.ruler import Ruler, transcript_error
from sample import SHIPPED, load_talker

DRIVER = "http://127.0.0.1:9515/session"
FLAGS = ["--headless=new", "--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
WANTED = {"alwaysMatch": {"goog:chromeOptions": {"args": FLAGS}}}
RECORD = """window.spoken = []; const set = upcoming.set.bind(upcoming)
  upcoming.set = (number, frame) => { spoken[number] = frame.symbol; set(number, frame) }"""


def command(url: str, method: str = "POST", **arguments):
    """Send a command of WebDriver -> its value."""
    data = json.dumps(arguments).encode() if method == "POST" else None
    with urlopen(Request(url, data, method=method), timeout=60) as answer:
        return json.load(answer)["value"]


def use(session: str, address: str, server, args) -> dict:
    """All that a person would do -> figures."""

    def run(script):
        return command(f"{session}/execute/sync", script=script, args=[])

    def wait(condition):
        for _ in range(1000):
            if run(f"return Boolean({condition})"):
                return
            time.sleep(0.02)
        raise AssertionError(f"in vain: {condition}; {run('return document.body.innerText')}")

    def say(text):
        count = run("return state.latencies.length")
        (name,) = command(f"{session}/element", using="css selector", value="#text").values()
        command(f"{session}/element/{name}/value", text=text + "\ue007")  # Enter
        wait(f"state.latencies.length > {count} && state.caption")

    command(f"{session}/url", url=address)
    run(RECORD)
    run("begin()")
    wait("state.drawn > 16")
    for sentence in ("mama", "hello you", "my name is ada", "look at me"):
        say(sentence)
        wait("'aeio'.includes(about.alphabet[state.symbol])")  # the mouth is open
        picture = command(f"{session}/screenshot", "GET")
        Path(args.out, f"{sentence}.png").write_bytes(base64.b64decode(picture))
        wait("state.run > 8 && state.symbol === silence")
    path, symbols = Path(args.out, "film.mp4"), np.array([run("return spoken")])
    urlretrieve(f"{address}/save?film={run('return state.film')}", path)
    cfg = load_talker(args.checkpoint, make_codecs)[0].cfg
    clip = decode_clip(path, cfg)
    film = Film(clip.frames[None], clip.samples[None], symbols, np.zeros(1, int))
    figures = {"letters_misread": transcript_error(Ruler(cfg), film, 0, len(clip.frames))}
    page, other = command(f"{session}/window", "GET"), command(f"{session}/window/new", type="tab")
    command(f"{session}/window", handle=other["handle"])
    command(f"{session}/url", url=address)
    run("begin()")
    wait("state.next > 4")
    command(f"{session}/window", "DELETE")
    command(f"{session}/window", handle=page)
    for _ in range(16):  # 20 sentences in all
        say("mama")
        wait("state.run > 8 && state.symbol === silence")
    for name in ("latencies", "models"):
        figures[f"median_{name}_ms"] = statistics.median(run(f"return state.{name}"))
    figures |= {name: run(f"return state.{name}") for name in ("gaps", "skipped", "behind")}
    server.kill()
    wait("document.getElementById('error').textContent.includes('does not answer')")
    return figures


def main(argv=None) -> int:
    """Prints figures as JSON, or the reason why there are none."""
    parser = argparse.ArgumentParser("lab.live_browser", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=".", help="folder of screenshots and film")
    parser.add_argument("--checkpoint", type=Path, default=SHIPPED)
    args = parser.parse_args(argv)
    if not shutil.which("chromedriver"):
        print("skipped: no chromedriver here (Debian: apt-get install chromium-driver)")
        return 0
    pipe = {"stdout": subprocess.PIPE, "text": True}
    words = [sys.executable, "-m", "lab.live", "--port=0", "--checkpoint", str(args.checkpoint)]
    with (
        subprocess.Popen(words, **pipe) as server,
        subprocess.Popen(["chromedriver", "--port=9515"], **pipe) as driver,
    ):
        try:
            address = server.stdout.readline().split()[0]
            next(line for line in driver.stdout if "successfully" in line)  # it has started
            session = f"{DRIVER}/{command(DRIVER, capabilities=WANTED)['sessionId']}"
            print(json.dumps(use(session, address, server, args)))
            command(session, "DELETE")
        finally:
            driver.terminate()
            server.kill()
    return 0


if __name__ == "__main__":
    sys.exit(main())
