"""A film that is made while it is watched: its text, its settings and its picture may change."""

import json
import tempfile
import time
from collections import deque
from concurrent.futures import Executor, Future
from pathlib import Path

import numpy as np

import mutual_forcing as mf
from data.controls import spell, stream_film
from data.writer import FilmWriter
from mutual_forcing import UserError

LONGEST_TEXT, LONGEST_QUEUE = 500, 16000  # letters of one text; frames of all that wait
KEPT_SECONDS = 60  # of a film, for save()


def to_bytes(about: dict, frames: np.ndarray, samples: np.ndarray) -> bytes:
    """A chunk as it is sent: length of the header (uint32, little-endian), header
    (JSON), samples (float32, little-endian), frames (uint8)."""
    header = json.dumps(about | {"samples": len(samples)}).encode()
    header += b" " * (-len(header) % 4)  # a page reads float32 only where 4 divides the place
    return len(header).to_bytes(4, "little") + header + samples.tobytes() + frames.tobytes()


class LiveFilm:
    """The text that waits, and the chunks of the last minute.

    A film is one stream(), or several in turn: restart() begins another one, on the
    same clock. Only make() touches the streams, and one thread calls it.
    """

    def __init__(self, model: mf.AudioVideoTransformer, codecs, settings: dict):
        """settings: what stream() takes beside seconds and transcript."""
        self.model, self.codecs, self.cfg = model, codecs, model.cfg
        self.samples_per_frame = model.cfg.sample_rate // model.cfg.fps
        self.starts, self.waiting = deque([settings]), deque()  # of streams; symbols to speak
        self.read = []  # symbols of the next frames, as far as the stream has read them
        self.chunks, self.num_ordered = {}, 0  # index -> Future of what make() returns
        self.num_frames = self.num_samples = 0  # that exist
        self.asked = time.monotonic()  # when the page last got a chunk

    def transcript(self):
        """A symbol for each frame, chosen when the stream reads it: of the text, or silence."""
        while True:
            self.read.append(self.waiting.popleft() if self.waiting else self.cfg.silence)
            yield self.read[-1]

    def say(self, text: str) -> int:
        """Append to the text that waits -> the number of the first frame that says it."""
        symbols = spell(text.strip())
        if len(text) > LONGEST_TEXT or set(symbols) <= {self.cfg.silence}:
            raise UserError(f"a text has at most {LONGEST_TEXT} letters, and one of a to z")
        if len(self.waiting) > LONGEST_QUEUE:
            raise UserError("too much text waits already")
        first_frame = self.num_frames + len(self.read) + len(self.waiting)
        self.waiting.extend(symbols + spell(" "))
        return first_frame

    def restart(self, settings: dict, frame: int | None = None) -> None:
        """Other settings from the next chunk on. frame: its picture is the first of the stream."""
        if frame is not None:
            index, place = divmod(frame, self.cfg.chunk_frames)
            if index not in self.chunks:
                raise UserError("this picture is not kept any more")
            _, frames, _ = self.chunks[index].result()
            settings = settings | {"first_frame": frames[place]}
        self.starts.append(settings)

    def order(self, index: int, maker: Executor) -> Future:
        """Chunk `index`, which the maker makes if it is the next one; the newest for an old one."""
        if index > self.num_ordered:
            raise UserError(f"the next chunk is {self.num_ordered}")
        if index == self.num_ordered:
            self.chunks[index] = maker.submit(self.make)
            self.chunks.pop(index - round(KEPT_SECONDS / self.cfg.chunk_seconds), None)
            self.num_ordered += 1
        newest = self.num_ordered - 1
        return self.chunks[index if index >= newest - 1 else newest]

    def make(self) -> tuple[dict, np.ndarray, np.ndarray]:
        """The next chunk: where it stands, frames and samples, as stream() yields them."""
        began, silent = time.perf_counter(), 0
        while self.starts:
            self.waiting.extendleft(reversed(self.read))  # the stream before did not say these
            self.read.clear()
            settings = {"seconds": 24 * 3600, "transcript": self.transcript()}
            self.stream = stream_film(self.model, self.codecs, **settings, **self.starts.popleft())
            # Nor did it return the sound of its last samples.
            silent = self.num_frames * self.samples_per_frame - self.num_samples
        chunk = next(self.stream, None)
        if chunk is None:
            raise UserError("a film lasts a day; open another one")
        frames, samples = chunk[0], np.pad(chunk[1], (silent, 0))
        about = {"index": self.num_frames // len(frames)}
        about |= {"first_frame": self.num_frames, "first_sample": self.num_samples}
        about["symbols"] = self.read[: len(frames)]
        about["make_ms"] = round(1000 * (time.perf_counter() - began), 1)
        del self.read[: len(frames)]
        self.num_frames += len(frames)
        self.num_samples += len(samples)
        return about, frames, samples

    def save(self) -> bytes:
        """The last minute as mp4."""
        chunks = [future.result() for future in list(self.chunks.values())]
        if not chunks:
            raise UserError("there is nothing to save yet")
        frames = np.concatenate([frames for _, frames, _ in chunks])
        samples = np.concatenate([samples for _, _, samples in chunks])
        first = chunks[0][0]
        # Sound may lag its frames: drop that of frames that are not kept, and fill up
        # the end.
        samples = samples[first["first_frame"] * self.samples_per_frame - first["first_sample"] :]
        samples = np.pad(samples, (0, len(frames) * self.samples_per_frame - len(samples)))
        with tempfile.TemporaryDirectory() as folder:
            writer = FilmWriter(Path(folder, "film.mp4"), self.cfg)
            try:
                writer.add(frames, samples)
                writer.finish()
            finally:
                writer.close()
            return writer.out.read_bytes()
