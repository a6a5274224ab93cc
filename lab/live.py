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
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl

from data import runs
from data.codecs import make_codecs
from data.controls import ALPHABET
from lab.live_film import LiveFilm, film_file
from mutual_forcing import UserError
from sample import SHIPPED, load_talker

LONGEST_BODY, MOST_FILMS = 4096, 4  # bytes of a request; films at a time
# A page that asks for no chunk so long has left. (A browser may let a hidden one ask once a minute.)
LEFT_SECONDS = 100


class Refusal(Exception):
    """Arguments: an HTTP status, and one line that says why the request is refused."""


class Handler(BaseHTTPRequestHandler):
    """A connection to a page, and its requests."""

    protocol_version, timeout, disable_nagle_algorithm = "HTTP/1.1", 60, True
    error_message_format, error_content_type = "%(message)s", "text/plain"

    def do_GET(self) -> None:
        """Answer with status 200, or with another one and a line that says why."""
        length = self.headers.get("Content-Length", "0")
        length = int(length) if re.fullmatch("[0-9]{1,9}", length) else None
        body = self.rfile.read(min(length or 0, 2**20))  # who still sends reads no answer
        try:
            if length is None or length > LONGEST_BODY:
                raise Refusal(413, f"a request has at most {LONGEST_BODY} bytes")
            status, answer = 200, self.answer(body)
        except Refusal as refusal:
            status, answer = refusal.args
        except UserError as error:
            status, answer = 400, str(error)
        except Exception as error:  # noqa: BLE001 - a bug, maybe of the maker; the page shows it
            traceback.print_exc()
            status, answer = 500, f"{type(error).__name__}: {error}"
        self.close_connection |= status != 200  # a part of the body may be unread
        answer = answer if isinstance(answer, bytes) else answer.encode()
        kind = "html" if self.path == "/" else "plain"
        self.send_response(status)
        self.send_header("Content-Type", f"text/{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_POST = do_GET

    def log_message(self, *_) -> None:
        """Requests are not logged."""

    def answer(self, body: bytes) -> bytes | str:
        """What the path of a request asks for. Raises Refusal, and UserError."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        known = re.sub(":[0-9]+$", "", host) in ("127.0.0.1", "localhost")
        if not known or origin not in (None, f"http://{host}"):
            raise Refusal(403, "this server answers only its own page, on 127.0.0.1 or localhost")
        path, _, query = self.path.partition("?")
        query, server = dict(parse_qsl(query, keep_blank_values=True)), self.server
        match self.command, path:
            case "GET", "/":
                return server.page()
            case "POST", "/open":
                return server.work(server.open_film, server.film_settings(query))
            case "POST", "/restart":
                settings, frame = server.film_settings(query), number(query, "frame", None)
                server.work(server.film(query).restart, settings, frame)
                return "restarted"
            case "POST", "/chunk":
                return server.work(server.film(query).next_chunk)
            case "POST", "/say":
                return str(server.work(server.film(query).say, body.decode(errors="replace")))
            case "POST", "/save":
                return film_file(*server.work(server.film(query).last_minute), server.model.cfg)
            case "POST", "/close":
                server.films.pop(query.get("film"), None)
                return "closed"
        raise Refusal(404, "there is no such path")


def number(query: dict, name: str, default: int | None) -> int | None:
    """A number of a query. Raises Refusal."""
    if not re.fullmatch("[0-9]{1,9}", query.get(name, "0")):
        raise Refusal(400, f"{name} must be a number")
    return int(query[name]) if name in query else default


class Server(ThreadingHTTPServer):
    """The model, up to four films by name, and the maker, a thread."""

    def __init__(self, port: int, model, codecs, **settings):
        self.model, self.codecs, self.settings = model, codecs, settings
        self.films, self.maker = {}, ThreadPoolExecutor(1)
        super().__init__(("127.0.0.1", port), Handler)

    def work(self, method, *arguments):
        """Let the maker call a method -> what it returns."""
        return self.maker.submit(method, *arguments).result()

    def page(self) -> bytes:
        names = "characters", "image", "fps", "sample_rate", "chunk_seconds"
        about = {name: getattr(self.model.cfg, name) for name in names} | {"alphabet": ALPHABET}
        about = json.dumps(about | self.settings).replace("<", "\\u003c")
        return Path(__file__).with_suffix(".html").read_text().replace("{{about}}", about).encode()

    def film_settings(self, query: dict) -> dict:
        """character, steps and seed of a stream."""
        character = query.get("character", self.settings["character"]) or None  # "": any
        steps = number(query, "steps", self.settings["steps"])
        names = self.model.cfg.characters
        if character not in (None, *names) or steps not in (4, 8):
            raise Refusal(400, f"steps are 4 or 8, and characters {', '.join(names)}")
        seed = number(query, "seed", secrets.randbelow(2**31))
        return {"character": character, "steps": steps, "seed": seed}

    def open_film(self, settings: dict) -> str:
        """A new film -> its name, which nobody can guess."""
        for name, film in list(self.films.items()):
            if time.monotonic() - film.asked > LEFT_SECONDS:
                self.films.pop(name, None)
        if len(self.films) >= MOST_FILMS:
            raise Refusal(503, f"{MOST_FILMS} films are playing; close the page of one")
        name = secrets.token_hex(8)
        self.films[name] = LiveFilm(self.model, self.codecs, settings)
        return name

    def film(self, query: dict) -> LiveFilm:
        film = self.films.get(query.get("film"))
        if not film:
            raise Refusal(404, "this film has ended; begin another one")
        return film

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a page may leave at any time
            super().handle_error(request, client_address)


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
    settings = {"character": args.character, "steps": args.steps}
    try:
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
