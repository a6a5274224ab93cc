"""Type, and it speaks: `python -m lab.live` serves a page on which a character says what is typed.

The page asks for a chunk shortly before the sound of the last one ends, and no chunk is made before
it is asked for: a text is spoken from the next chunk on. Each connection has a thread of its own.
One more thread, the maker, does all that reads or changes a film.
"""

import argparse
import json
import re
import secrets
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

LONGEST_BODY, LONGEST_TEXT, MOST_WAITING = 4096, 500, 16000  # bytes; letters; frames of text
PATHS = "/open", "/restart", "/chunk", "/say", "/save", "/close"
MOST_FILMS, KEPT_SECONDS = 4, 60  # films at a time; what can be saved of each
# A page that asks for no chunk so long has left. (A browser may let a hidden one ask once a minute.)
LEFT_SECONDS = 100


class LiveFilm:
    """The text that waits, and the last minute: one stream(), or several in turn, on one clock."""

    def __init__(self, model, codecs, settings: dict):
        """settings: what stream_film() takes beside seconds and transcript."""
        self.model, self.codecs, self.cfg = model, codecs, model.cfg
        self.waiting = deque()  # a symbol for each frame of the text to speak
        self.read = []  # symbols of the next frames, as far as the stream has read them
        self.kept = deque(maxlen=round(KEPT_SECONDS / self.cfg.chunk_seconds))  # frames, samples
        self.num_frames = self.late = 0  # frames made; samples by which sound follows its frames
        self.asked = time.monotonic()  # when the page last asked for a chunk
        self.restart(settings)

    def transcript(self):
        """A symbol for each frame, chosen when the stream reads it: of the text, or silence."""
        while True:
            self.read.append(self.waiting.popleft() if self.waiting else self.cfg.silence)
            yield self.read[-1]

    def restart(self, settings: dict, frame: int | None = None) -> None:
        """Begin a new stream with the next chunk. frame: its picture is the first of the stream."""
        if frame is not None:
            chunk = (frame - self.num_frames) // self.cfg.chunk_frames
            if not -len(self.kept) <= chunk < 0:
                raise UserError("this picture is not kept any more")
            frames, _ = self.kept[chunk]
            settings = settings | {"first_frame": frames[frame % self.cfg.chunk_frames]}
        settings = settings | {"seconds": 24 * 3600, "transcript": self.transcript()}
        self.stream = stream_film(self.model, self.codecs, **settings)
        # What the stream before only read, it did not say.
        self.waiting.extendleft(reversed(self.read))
        self.read.clear()

    def say(self, text: str) -> str:
        """Append to the text that waits -> the number of the first frame that says it."""
        symbols = spell(text.strip())
        if len(text) > LONGEST_TEXT:
            raise UserError(f"at most {LONGEST_TEXT} letters at a time")
        if len(self.waiting) > MOST_WAITING:
            raise UserError("too much text is waiting; let it be spoken first")
        if set(symbols) <= {self.cfg.silence}:
            raise UserError("nothing in this text can be spoken; letters a to z can")
        first_frame = self.num_frames + len(self.read) + len(self.waiting)
        self.waiting.extend(symbols + spell(" "))
        return str(first_frame)

    def next_chunk(self) -> bytes:
        """The next chunk: length of the header (uint32, little-endian), header (JSON),
        samples (float32, little-endian), frames (uint8)."""
        began = self.asked = time.monotonic()
        frames, samples = next(self.stream, (None, None))
        if frames is None:
            raise UserError("this film has ended; begin another one")
        length = self.cfg.chunk_frames * self.cfg.sample_rate // self.cfg.fps
        if len(samples) < length:  # the first chunk of a stream: silence precedes its sound
            self.late = length - len(samples)
            samples = np.pad(samples, (self.late, 0))
        index = self.num_frames // self.cfg.chunk_frames
        header = {
            "index": index,
            "first_frame": self.num_frames,
            "first_sample": index * length - self.late,
            "samples": len(samples),
            "symbols": self.read[: len(frames)],
            "waiting": len(self.waiting),
            "make_seconds": round(time.monotonic() - began, 4),
        }
        del self.read[: len(frames)]
        self.kept.append((frames, samples))
        self.num_frames += len(frames)
        header = json.dumps(header).encode()
        header += b" " * (-len(header) % 4)  # a page reads float32 only where 4 divides the place
        return len(header).to_bytes(4, "little") + header + samples.tobytes() + frames.tobytes()


class Refusal(Exception):
    """Arguments: an HTTP status, and one line that says why the request is refused."""


class Handler(BaseHTTPRequestHandler):
    """A connection to a page, and its requests."""

    protocol_version, timeout, disable_nagle_algorithm = "HTTP/1.1", 60, True
    error_message_format, error_content_type = "%(message)s", "text/plain"

    def do_GET(self) -> None:
        """Answer with status 200, or with another one and a line that says why."""
        try:
            answer = self.answer()
            answer = answer if isinstance(answer, bytes) else answer.encode()
            self.send_response(200)
            kind = "html" if self.path == "/" else "plain"
            self.send_header("Content-Type", f"text/{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)
        except Refusal as refusal:
            self.send_error(*refusal.args)
        except UserError as error:
            self.send_error(400, str(error))
        except (ConnectionError, TimeoutError):  # the page has left, or takes no answer
            raise
        except Exception as error:  # noqa: BLE001 - a bug, maybe of the maker; the page shows it
            traceback.print_exc()
            self.send_error(500, f"{type(error).__name__}; its traceback is on the server's stderr")

    do_POST = do_GET

    def log_message(self, *_) -> None:
        """Requests are not logged."""

    def answer(self) -> bytes | str:
        """What a request asks for. Raises Refusal, and UserError."""
        length = self.headers.get("Content-Length", "0")
        length = int(length) if re.fullmatch("[0-9]{1,9}", length) else None
        # A body that is refused is read, too: a page that still sends reads no answer.
        body = self.rfile.read(min(length or 0, 2**20))
        if length is None or length > LONGEST_BODY:
            raise Refusal(413, f"a request has at most {LONGEST_BODY} bytes")
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        known = re.sub(":[0-9]+$", "", host) in ("127.0.0.1", "localhost")
        if not known or origin not in (None, f"http://{host}"):
            raise Refusal(403, "this server answers only its own page, on 127.0.0.1 or localhost")
        if (self.command, self.path) == ("GET", "/"):
            return self.server.page()
        if self.command != "POST" or self.path not in PATHS:
            raise Refusal(404, "there is no such path")
        try:
            asked = dict(json.loads(body))
        except (ValueError, TypeError) as error:
            raise Refusal(400, "the body of a request is a JSON object") from error
        answer = self.server.maker.submit(self.server.act, self.path, asked).result()
        return film_file(*answer, self.server.model.cfg) if self.path == "/save" else answer


class Server(ThreadingHTTPServer):
    """The model, up to four films by name, and the maker, a thread."""

    def __init__(self, port: int, model, codecs, **settings):
        self.model, self.codecs, self.settings = model, codecs, settings
        self.films, self.maker = {}, ThreadPoolExecutor(1)
        super().__init__(("127.0.0.1", port), Handler)

    def page(self) -> str:
        names = "characters", "image", "fps", "sample_rate", "chunk_seconds"
        about = {name: getattr(self.model.cfg, name) for name in names} | {"alphabet": ALPHABET}
        about = json.dumps(about | self.settings).replace("<", "\\u003c")
        return Path(__file__).with_suffix(".html").read_text().replace("{{about}}", about)

    def act(self, path: str, asked: dict):
        """Do what a page asks for, in the maker. Raises Refusal, and UserError."""
        film = self.films.get(str(asked.get("film")))
        if not film and path != "/open":
            raise Refusal(404, "this film has ended; begin another one")
        match path:
            case "/open":
                return self.open_film(self.film_settings(asked))
            case "/restart":
                film.restart(self.film_settings(asked), asked.get("frame"))
            case "/chunk":
                return film.next_chunk()
            case "/say":
                return film.say(str(asked.get("text", "")))
            case "/save":
                return list(film.kept), film.late
            case "/close":
                del self.films[asked["film"]]
        return "done"

    def film_settings(self, asked: dict) -> dict:
        """What stream_film() takes: character, steps, and a seed of its own unless one is given."""
        settings = self.settings | {"seed": secrets.randbelow(2**31)}
        settings = {name: asked.get(name, value) for name, value in settings.items()}
        names = self.model.cfg.characters
        if settings["character"] not in (None, *names) or settings["steps"] not in (4, 8):
            raise Refusal(400, f"steps are 4 or 8, and characters {', '.join(names)}")
        return settings

    def open_film(self, settings: dict) -> str:
        """A new film -> its name, which nobody can guess."""
        oldest = time.monotonic() - LEFT_SECONDS
        self.films = {name: film for name, film in self.films.items() if film.asked > oldest}
        if len(self.films) >= MOST_FILMS:
            raise Refusal(503, f"{MOST_FILMS} films are playing; close the page of one")
        name = secrets.token_hex(8)
        self.films[name] = LiveFilm(self.model, self.codecs, settings)
        return name

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a page may leave at any time
            super().handle_error(request, client_address)


def film_file(kept: list, late: int, cfg: Config) -> bytes:
    """An mp4 of what is kept. Silence stands for its last samples, which the stream returns later."""
    if not kept:
        raise UserError("there is nothing to save yet")
    frames, samples = map(np.concatenate, zip(*kept))
    samples = np.pad(samples[late:], (0, late))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "film.mp4")
        with closing(FilmWriter(out, cfg)) as writer:
            writer.add(frames, samples)
            writer.finish()
        return out.read_bytes()


def make_server(argv, make_codecs) -> Server:
    """The server of a command line. Raises UserError."""
    parser = argparse.ArgumentParser("lab.live", description="A page: type, and it speaks.")
    add = parser.add_argument
    add("--port", type=int, default=8000, help="of 127.0.0.1; default %(default)s, 0: any")
    add("--character", help="a name that the checkpoint knows; without it, chance decides")
    add("--checkpoint", type=Path, default=SHIPPED, help="default: the shipped one")
    add("--steps", type=int, choices=(4, 8), default=4, help="evaluations a chunk; default 4")
    add("--device", help="default: cuda, else mps, else cpu")
    args = parser.parse_args(argv)
    device = runs.find_device(args.device)
    model, codecs = load_talker(args.checkpoint, make_codecs)
    if model.cfg.symbols != len(ALPHABET):
        raise UserError(f"{args.checkpoint}: the symbols of this model are not letters")
    if args.character not in (None, *model.cfg.characters):
        raise UserError(f"--character: there are {', '.join(model.cfg.characters)}")
    model.to(device, runs.native_precision(device))
    try:
        settings = {"character": args.character, "steps": args.steps}
        return Server(args.port, model, codecs.to(device), **settings)
    except (OSError, OverflowError) as error:
        raise UserError(f"--port {args.port}: {error}") from error


def main(argv=None, make_codecs=make_codecs) -> int:
    """Serve until Ctrl-C. Returns 0, or 2 for a mistake of the user."""

    def run():
        with make_server(argv, make_codecs) as server, suppress(KeyboardInterrupt):
            print(f"http://127.0.0.1:{server.server_port} (Ctrl-C ends it)", flush=True)
            server.serve_forever()

    return runs.exit_code("lab.live", run)


if __name__ == "__main__":
    sys.exit(main())
