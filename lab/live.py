"""Type, and it speaks: `python -m lab.live` serves a page on which a character says what is typed.

A page asks for a chunk shortly before the sound of the last one ends, and no chunk is made before
it is asked for: a text is spoken from the next chunk on. One thread makes the chunks of all films.
"""

import argparse
import json
import re
import secrets
import sys
import threading
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
from lab.live_film import LiveFilm, to_bytes
from mutual_forcing import UserError
from sample import SHIPPED, load_talker

LONGEST_BODY, MOST_FILMS = 4096, 4
LEFT_SECONDS = 10  # a page that asks for no chunk so long has left


class Refusal(Exception):
    """Arguments: an HTTP status, and one line that says why the request is refused."""


class Handler(BaseHTTPRequestHandler):
    """Requests of a page: get_chunk(query, body) answers GET /chunk, and so on."""

    protocol_version, timeout, disable_nagle_algorithm = "HTTP/1.1", 60, True

    def do_GET(self) -> None:
        """Answer with status 200, or with another one and a line that says why."""
        length = self.headers.get("Content-Length", "0")
        length = int(length) if re.fullmatch("[0-9]{1,9}", length) else None
        body = self.rfile.read(min(length or 0, 2**20))  # who still sends reads no answer
        try:
            if length is None or length > LONGEST_BODY:
                raise Refusal(413, f"a request has at most {LONGEST_BODY} bytes")
            status, answer = 200, self.route(body)
        except Refusal as refusal:
            status, answer = refusal.args
        except UserError as error:
            status, answer = 400, str(error)
        except Exception as error:  # noqa: BLE001 - a bug, maybe of the maker; the page shows it
            traceback.print_exc()
            status, answer = 500, f"{type(error).__name__}: {error}"
        self.close_connection |= status != 200  # a part of the body may be unread
        answer = answer if isinstance(answer, bytes) else str(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if self.path == "/" else "text/plain")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_POST = do_GET

    def log_message(self, *_) -> None:
        """Requests are not logged."""

    def route(self, body: bytes):
        """Call the method of the path. Raises Refusal for requests that no page of ours sends."""
        host = self.headers.get("Host", "")
        origin, names = self.headers.get("Origin"), ("127.0.0.1", "localhost")
        if re.sub(":[0-9]+$", "", host) not in names or origin not in (None, f"http://{host}"):
            raise Refusal(403, "this server answers only its own page, on 127.0.0.1 or localhost")
        path, _, query = self.path.partition("?")
        method = getattr(self, f"{self.command.lower()}_{path[1:] or 'page'}", None)
        if not method:
            raise Refusal(404, "there is no such path")
        query = dict(parse_qsl(query))
        for name in query.keys() & {"index", "frame", "steps", "seed"}:
            if not re.fullmatch("[0-9]{1,9}", query[name]):
                raise Refusal(400, f"{name} must be a number")
            query[name] = int(query[name])
        return method(query, body)

    def film(self, query: dict) -> LiveFilm:
        film = self.server.films.get(query.get("film"))
        if not film:
            raise Refusal(404, "this film has ended; reload the page for another one")
        return film

    def settings(self, query: dict) -> dict:
        """character, steps and seed of a stream."""
        known = self.server.settings | {"seed": secrets.randbelow(2**31)}
        settings = {name: query.get(name, value) for name, value in known.items()}
        names = self.server.model.cfg.characters
        if settings["character"] not in (None, *names) or settings["steps"] not in (4, 8):
            raise Refusal(400, f"steps are 4 or 8, and characters {', '.join(names)}")
        return settings

    def get_page(self, *_) -> bytes:
        cfg = self.server.model.cfg
        names = "characters", "image", "fps", "sample_rate", "chunk_seconds"
        about = self.server.settings | {name: getattr(cfg, name) for name in names}
        page = Path(__file__).with_suffix(".html").read_text()
        return page.replace("{{about}}", json.dumps(about | {"alphabet": ALPHABET})).encode()

    def post_open(self, query: dict, _) -> str:
        server, settings, name = self.server, self.settings(query), secrets.token_hex(8)
        with server.lock:
            if len(server.films) >= MOST_FILMS:
                raise Refusal(503, f"{MOST_FILMS} films are playing; close the page of one")
            server.films[name] = LiveFilm(server.model, server.codecs, settings)
        return name

    def get_chunk(self, query: dict, _) -> bytes:
        """Chunk `index`, as soon as it exists."""
        with self.server.lock:
            film = self.film(query)
            future = film.order(query.get("index", 0), self.server.maker)
        chunk = future.result()
        film.asked = time.monotonic()
        return to_bytes(*chunk)

    def post_say(self, query: dict, body: bytes) -> int:
        return self.film(query).say(body.decode(errors="replace"))

    def post_restart(self, query: dict, _) -> None:
        self.film(query).restart(self.settings(query), query.get("frame"))

    def get_save(self, query: dict, _) -> bytes:
        return self.film(query).save()

    def post_close(self, query: dict, _) -> None:
        self.server.films.pop(query.get("film"), None)


class Server(ThreadingHTTPServer):
    """The model, up to four films, and the thread that makes their chunks."""

    def __init__(self, port: int, model, codecs, **settings):
        self.model, self.codecs, self.settings = model, codecs, settings
        self.films, self.lock, self.maker = {}, threading.Lock(), ThreadPoolExecutor(1)
        super().__init__(("127.0.0.1", port), Handler)

    def service_actions(self) -> None:
        """Called twice a second: end the films whose pages have left."""
        for name, film in list(self.films.items()):
            making = not all(future.done() for future in list(film.chunks.values()))
            if not making and time.monotonic() - film.asked > LEFT_SECONDS:
                self.films.pop(name, None)

    def server_close(self) -> None:
        super().server_close()
        with self.lock:
            self.films.clear()
        self.maker.shutdown()

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a page may leave at any time
            super().handle_error(request, client_address)


def make_server(argv, make_codecs) -> Server:
    """The server of a command line. Raises UserError and OSError."""
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
    if not 0 <= args.port < 2**16:
        raise UserError("--port must be between 0 and 65535")
    model.to(device, runs.native_precision(device))
    return Server(args.port, model, codecs.to(device), character=args.character, steps=args.steps)


def main(argv=None, make_codecs=make_codecs) -> int:
    """Serve until Ctrl-C. Returns 0, or 2 for a mistake of the user."""

    def run():
        with make_server(argv, make_codecs) as server, suppress(KeyboardInterrupt):
            print(f"http://127.0.0.1:{server.server_port} (Ctrl-C ends it)", flush=True)
            server.serve_forever()

    return runs.exit_code("lab.live", run)


if __name__ == "__main__":
    sys.exit(main())
