"""Type, and it speaks: `python -m lab.live` serves a page on which a character says what is typed.

The page asks for a chunk shortly before the sound of the last one ends, and none is made earlier: a
text is spoken from the next chunk on. Each request has a thread of its own. One more thread, the
maker, does all that reads or changes a film.
"""

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

from data import runs
from data.codecs import make_codecs
from data.controls import ALPHABET, spell, stream_film
from data.writer import FilmWriter
from mutual_forcing import Config, UserError
from sample import SHIPPED, load_talker

LONGEST_BODY, LONGEST_TEXT, KEPT_SECONDS = 4096, 500, 60  # bytes; letters; what can be saved
MOST_FILMS, LEFT_SECONDS = 4, 3  # films at a time; one that is not asked for so long gives way


class LiveFilm:
    """The film of one page: one stream(), or several in turn, and its last minute."""

    def __init__(self, model, codecs):
        self.model, self.codecs, self.cfg = model, codecs, model.cfg
        self.stream = iter(())  # until begin()
        self.symbols = []  # one for each frame that the stream has read, and of the text that waits
        self.num_frames, self.asked = 0, time.monotonic()  # frames made; when a page last asked
        self.kept = deque(maxlen=round(KEPT_SECONDS / self.cfg.chunk_seconds))  # frames, samples

    def transcript(self):
        """A symbol for each frame to come, chosen when the stream reads it: of text, or silence."""
        for frame in range(self.num_frames, sys.maxsize):
            if frame == len(self.symbols):
                self.symbols.append(self.cfg.silence)
            yield self.symbols[frame]

    def begin(self, frame: int | None = None, **settings) -> bytes:
        """Begin a stream, maybe at the picture of a kept frame. settings: character, steps, seed."""
        if frame is not None:
            frames, _ = self.kept[(frame - self.num_frames) // self.cfg.chunk_frames]
            settings["first_frame"] = frames[frame % self.cfg.chunk_frames]
        settings |= {"transcript": self.transcript(), "seconds": 24 * 3600}
        self.stream = stream_film(self.model, self.codecs, **settings)
        return b"begun"

    def say(self, text: str) -> bytes:
        """Append to the text that waits -> the number of the first frame that says it."""
        symbols = spell(text.strip() + " ")
        if len(text) > LONGEST_TEXT or set(symbols) == {self.cfg.silence}:
            raise UserError(f"a text needs a letter from a to z, and has at most {LONGEST_TEXT}")
        self.symbols += symbols
        return str(len(self.symbols) - len(symbols)).encode()

    def chunk(self) -> bytes:
        """The next chunk: its index (uint32), samples (float32), frames and their symbols (uint8)."""
        frames, samples = next(self.stream, (None, None))
        if frames is None:
            raise UserError("this film has ended; begin another one")
        # Sound comes a hop later than its frames: the first chunk lacks a hop, the last has one more.
        length = round(self.cfg.chunk_seconds * self.cfg.sample_rate)
        samples = np.pad(samples, (max(0, length - len(samples)), 0))[:length]
        self.kept.append((frames, samples))
        index = np.uint32(self.num_frames // self.cfg.chunk_frames)
        symbols = self.symbols[self.num_frames : self.num_frames + len(frames)]
        self.num_frames += len(frames)
        return index.tobytes() + samples.tobytes() + frames.tobytes() + bytes(symbols)

    def save(self) -> list:
        """What film_file() takes: the last minute, as it is now."""
        return list(self.kept)


def film_file(kept: list, cfg: Config) -> bytes:
    """An mp4 of what is kept. Silence stands for its last samples, which the stream returns later."""
    frames, samples = map(np.concatenate, zip(*kept))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "film.mp4")
        with closing(FilmWriter(out, cfg)) as writer:
            writer.add(frames, np.pad(samples[cfg.hop :], (0, cfg.hop)))
            writer.finish()
        return out.read_bytes()


class Handler(BaseHTTPRequestHandler):
    """A request of a page."""

    def do_GET(self) -> None:
        """Send what is asked for, or a status other than 200 and a line that says why not."""
        length = int(self.headers.get("Content-Length", 0))
        # A body that is refused is read, too: a page that still sends reads no answer.
        status, content = self.answer(self.rfile.read(min(length, 2**20)))
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if self.path == "/" else "text/plain")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_GET

    def log_message(self, *_) -> None:
        """Requests are not logged."""

    def answer(self, body: bytes) -> tuple[int, bytes]:
        """The status and the content of the answer."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        local = host.split(":")[0] in ("127.0.0.1", "localhost")
        if not local or origin not in (None, f"http://{host}"):
            return 403, b"this server answers only its own page, on 127.0.0.1 or localhost"
        if len(body) > LONGEST_BODY:
            return 413, b"a request has at most %d bytes" % LONGEST_BODY
        if self.path == "/":
            return 200, self.server.page
        if self.path not in ("/begin", "/chunk", "/say", "/save"):  # the methods of LiveFilm
            return 404, b"there is no such path"
        try:
            asked = json.loads(body)
            content = self.server.maker.submit(self.server.act, self.path, **asked).result()
            if self.path == "/save":
                content = film_file(content, self.server.model.cfg)
            return 200, content
        except (UserError, json.JSONDecodeError) as error:
            return 400, str(error).encode()
        except Exception as error:  # noqa: BLE001 - a bug, maybe of the maker; the page shows it
            traceback.print_exc()
            return 500, f"{type(error).__name__}; see the server's stderr".encode()


class Server(ThreadingHTTPServer):
    """The model, up to four films by name, and the maker, a thread. Raises UserError."""

    def __init__(self, args, make_codecs):
        device = runs.find_device(args.device)
        self.model, self.codecs = load_talker(args.checkpoint, make_codecs, device)
        self.films, self.maker = {}, ThreadPoolExecutor(1)
        # The first chunk is slow, and tells of a wrong --character or of symbols that are no letters.
        options = {"transcript": "", "character": args.character, "seconds": 1}
        self.maker.submit(next, stream_film(self.model, self.codecs, **options)).result()
        names = "characters", "image", "fps", "sample_rate", "hop", "chunk_frames", "chunk_seconds"
        about = {name: getattr(self.model.cfg, name) for name in names}
        about |= {"alphabet": ALPHABET, "character": args.character, "steps": args.steps}
        html = Path(__file__).with_suffix(".html").read_text()
        self.page = html.replace("{{about}}", json.dumps(about)).encode()
        if not 0 <= args.port < 2**16:
            raise UserError("--port is between 0 and 65535")
        super().__init__(("127.0.0.1", args.port), Handler)

    def handle_error(self, *request) -> None:
        """Print a traceback, unless it only says that a page has left."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(*request)

    def act(self, path: str, film: str = "", **asked):
        """What a film does that a page asks for, in the maker. Raises UserError."""
        if path == "/begin" and film not in self.films:
            if len(self.films) == MOST_FILMS:
                left = min(self.films, key=lambda name: self.films[name].asked)
                if time.monotonic() - self.films[left].asked < LEFT_SECONDS:
                    raise UserError(f"{MOST_FILMS} films are playing; close the page of one")
                del self.films[left]
            self.films[film] = LiveFilm(self.model, self.codecs)
        if film not in self.films:
            raise UserError("this film has ended; begin another one")
        self.films[film].asked = time.monotonic()
        return getattr(self.films[film], path[1:])(**asked)


def main(argv=None, make_codecs=make_codecs) -> int:
    """Serve until Ctrl-C. Returns 0, or 2 for a mistake of the user."""
    parser = argparse.ArgumentParser("lab.live", description="A page: type, and it speaks.")
    add = parser.add_argument
    add("--port", type=int, default=8000, help="of 127.0.0.1; default %(default)s, 0: any")
    add("--character", help="a name that the checkpoint knows; without it, chance decides")
    add("--checkpoint", type=Path, default=SHIPPED, help="default: the shipped one")
    add("--steps", type=int, choices=(4, 8), default=4, help="evaluations a chunk; default 4")
    add("--device", help="default: cuda, else mps, else cpu")
    args = parser.parse_args(argv)

    def run():
        with Server(args, make_codecs) as server, suppress(KeyboardInterrupt):
            print(f"http://127.0.0.1:{server.server_port} (Ctrl-C ends it)", flush=True)
            server.serve_forever()

    return runs.exit_code("lab.live", run)


if __name__ == "__main__":
    sys.exit(main())
