"""A film that is made while it is watched: its text, its settings and its picture may change."""

import json
import tempfile
import time
from collections import deque
from contextlib import closing
from pathlib import Path

import numpy as np

from data.controls import spell, stream_film
from data.writer import FilmWriter
from mutual_forcing import Config, UserError

LONGEST_TEXT, MOST_WAITING = 500, 16000  # letters of one text; frames of all that wait
KEPT_SECONDS = 60  # of each film


class LiveFilm:
    """The text that waits, and the last minute: one stream(), or several in turn, on one clock."""

    def __init__(self, model, codecs, settings: dict):
        """settings: what stream_film() takes beside seconds and transcript."""
        self.model, self.codecs, self.cfg = model, codecs, model.cfg
        self.samples_per_frame = self.cfg.sample_rate // self.cfg.fps
        self.waiting = deque()  # a symbol for each frame of the text to speak
        self.read = []  # symbols of the next frames, as far as the stream has read them
        self.frames = deque(maxlen=KEPT_SECONDS * self.cfg.fps)
        self.sounds = deque(maxlen=1 + KEPT_SECONDS * self.cfg.fps // self.cfg.chunk_frames)
        self.num_frames = self.num_samples = 0  # that were made
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
            age = self.num_frames - frame
            if not 1 <= age <= len(self.frames):
                raise UserError("this picture is not kept any more")
            settings = settings | {"first_frame": self.frames[-age]}
        # The stream before did not say what it only read, nor return its last samples.
        self.waiting.extendleft(reversed(self.read))
        self.read.clear()
        self.missing = self.num_frames * self.samples_per_frame - self.num_samples
        settings = settings | {"seconds": 24 * 3600, "transcript": self.transcript()}
        self.stream = stream_film(self.model, self.codecs, **settings)

    def say(self, text: str) -> int:
        """Append to the text that waits -> the number of the first frame that says it."""
        symbols = spell(text.strip())
        if len(text) > LONGEST_TEXT:
            raise UserError(f"a text has at most {LONGEST_TEXT} letters")
        if set(symbols) <= {self.cfg.silence}:
            raise UserError("nothing in this text can be spoken; letters a to z can")
        if len(self.waiting) > MOST_WAITING:
            raise UserError("too much text waits already")
        first_frame = self.num_frames + len(self.read) + len(self.waiting)
        self.waiting.extend(symbols + spell(" "))
        return first_frame

    def next_chunk(self) -> bytes:
        """The next chunk: length of the header (uint32, little-endian), header (JSON),
        samples (float32, little-endian), frames (uint8)."""
        began = self.asked = time.monotonic()
        frames, samples = next(self.stream, (None, None))
        if frames is None:
            raise UserError("this film has ended; begin another one")
        samples, self.missing = np.pad(samples, (self.missing, 0)), 0
        header = {
            "index": self.num_frames // self.cfg.chunk_frames,
            "first_frame": self.num_frames,
            "first_sample": self.num_samples,
            "samples": len(samples),
            "symbols": self.read[: len(frames)],
            "waiting": len(self.waiting),
            "make_seconds": round(time.monotonic() - began, 4),
        }
        del self.read[: len(frames)]
        self.frames.extend(frames)
        self.sounds.append(samples)
        self.num_frames += len(frames)
        self.num_samples += len(samples)
        header = json.dumps(header).encode()
        header += b" " * (-len(header) % 4)  # a page reads float32 only where 4 divides the place
        return len(header).to_bytes(4, "little") + header + samples.tobytes() + frames.tobytes()

    def last_minute(self) -> tuple[np.ndarray, np.ndarray]:
        """Frames and samples; silence stands for the last ones, which the stream returns later."""
        if not self.frames:
            raise UserError("there is nothing to save yet")
        late = self.num_frames * self.samples_per_frame - self.num_samples
        length = len(self.frames) * self.samples_per_frame - late
        samples = np.concatenate(self.sounds)[-length:]
        return np.stack(self.frames), np.pad(samples, (0, late))


def film_file(frames: np.ndarray, samples: np.ndarray, cfg: Config) -> bytes:
    """An mp4 of frames and samples."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "film.mp4")
        with closing(FilmWriter(out, cfg)) as writer:
            writer.add(frames, samples)
            writer.finish()
        return out.read_bytes()
