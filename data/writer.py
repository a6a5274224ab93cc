"""Writing films: .mp4 with sound, .gif, .wav, and .png (a strip of frames above their sound)."""

import os
import re
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import soundfile

from mutual_forcing import Config, UserError

ENLARGE = 4  # of films, by nearest neighbour: H.264 blurs single pixels
ENCODE_EVERY = 160  # frames: an encoder that worked beside the model would cost it a core
STRIP_EVERY = 4  # a .png shows every fourth frame


class FilmWriter:
    """Takes a film chunk by chunk; finish() puts the whole file in its place, close() cleans up.

    The parts are written in a temporary folder beside the result, so an old result
    survives a failure.
    """

    def __init__(self, out: Path, cfg: Config):
        self.out, self.cfg, self.kind = out, cfg, out.suffix.lower()
        if self.kind not in (".mp4", ".gif", ".wav", ".png"):
            raise UserError(f"{out}: the ending must be .mp4, .gif, .wav or .png")
        if not out.parent.is_dir():
            raise UserError(f"{out.parent}: no such folder")
        self.folder = tempfile.TemporaryDirectory(prefix=".film-", dir=out.parent)
        self.path = Path(self.folder.name).resolve()  # ffmpeg takes a relative "a:b" for an URL
        self.num_frames = 0
        self.waiting = []  # frames of an .mp4 that are not encoded yet
        self.chunks = []  # (frames, samples) of a .gif or .png
        self.sound = soundfile.SoundFile(self.path / "f.wav", "w", cfg.sample_rate, 1, "PCM_16")
        self.video = None
        if self.kind == ".mp4":
            enlarge = ["-vf", f"scale=iw*{ENLARGE}:ih*{ENLARGE}:flags=neighbor"]
            fast = ["-crf", "18", "-preset", "ultrafast"]
            options = {"macro_block_size": 2, "ffmpeg_log_level": "error"}
            self.video = imageio_ffmpeg.write_frames(
                str(self.path / "video.mp4"),
                (cfg.image, cfg.image),
                fps=cfg.fps,
                codec="libx264",
                quality=None,
                output_params=enlarge + fast,
                **options,
            )
            self.video.send(None)

    def add(self, frames: np.ndarray, samples: np.ndarray) -> None:
        """Append frames, uint8 (F, h, w, 3), and samples, float32 (n,)."""
        self.num_frames += len(frames)
        try:
            self.sound.write(np.clip(samples, -1, 1))
        except soundfile.SoundFileError as error:
            raise OSError(f"{self.out}: the sound cannot be written; is the disk full?") from error
        if self.video:
            self.waiting.append(frames)
            if sum(map(len, self.waiting)) >= ENCODE_EVERY:
                self.encode()
        elif self.kind != ".wav":
            self.chunks.append((frames, samples))

    def encode(self) -> None:
        """Give the waiting frames of an .mp4 to its encoder."""
        if self.waiting:
            self.video.send(np.ascontiguousarray(np.concatenate(self.waiting)))
            self.waiting = []

    def finish(self) -> None:
        """Close the parts and put the result in its place, at once. Raises OSError."""
        self.encode()
        for part in filter(None, (self.sound, self.video)):
            part.close()
        result = self.path / f"f{self.kind}"
        if self.kind == ".mp4":
            inputs = ["-i", self.path / "video.mp4", "-i", self.path / "f.wav"]
            options = ["-c:v", "copy", "-c:a", "aac", "-ar", "48000", "-movflags", "+faststart"]
            options += ["-progress", "pipe:1"]  # prints frame=COUNT
            command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *inputs, *options, result]
            # In a process group of its own, which a Ctrl-C does not reach.
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            done = subprocess.run(command, check=False, text=True, process_group=0, **pipes)
            counts = re.findall(r"frame=\s*(\d+)", done.stdout)
            if done.returncode or counts[-1:] != [str(self.num_frames)]:
                raise OSError(f"{self.out}: ffmpeg could not write the film: {done.stderr[-200:]}")
        elif self.kind == ".gif":
            frames = np.concatenate([frames for frames, _ in self.chunks])
            frames = frames.repeat(ENLARGE, 1).repeat(ENLARGE, 2)
            # A GIF counts time in 10 ms: round the instants, not the durations, and its
            # pace is right.
            instants = np.round(np.arange(len(frames) + 1) * 100 / self.cfg.fps) * 10
            durations = np.diff(instants).tolist() if len(frames) > 1 else instants[1]
            iio.imwrite(result, frames, plugin="pillow", duration=durations, loop=0)
        elif self.kind == ".png":
            iio.imwrite(result, film_strip(self.chunks, self.cfg))
        os.replace(result, self.out)

    def close(self) -> None:
        """Stop writing and remove the temporary folder."""
        for part in filter(None, (self.sound, self.video)):
            with suppress(OSError, soundfile.SoundFileError):  # a failure was reported before
                part.close()
        self.folder.cleanup()


def film_strip(chunks: list, cfg: Config) -> np.ndarray:
    """Every fourth frame above its sound, 12 a row, enlarged twice: uint8 (h, w, 3)."""
    frames = np.concatenate([frames for frames, _ in chunks])[::STRIP_EVERY]
    samples = np.concatenate([samples for _, samples in chunks])
    hop, size = STRIP_EVERY * cfg.sample_rate // cfg.fps, cfg.image
    cells = []
    for i, frame in enumerate(frames):
        cell = np.full((size + 24, size, 3), 255, np.uint8)
        cell[:size] = frame
        for x, part in enumerate(np.array_split(samples[i * hop : (i + 1) * hop], size)):
            height = int(min(11, 40 * np.abs(part).max(initial=0)))
            cell[size + 12 - height : size + 13 + height, x] = (40, 90, 160)
        cells.append(cell)
    columns = min(12, len(cells))
    cells += [np.full_like(cell, 255)] * (-len(cells) % columns)
    rows = [np.concatenate(cells[i : i + columns], 1) for i in range(0, len(cells), columns)]
    return np.concatenate(rows).repeat(2, 0).repeat(2, 1)


@contextmanager
def delayed_interrupt():
    """Within it, Ctrl-C and SIGTERM only fill the list that it yields, and say so on stderr."""
    interrupted, numbers = [], (signal.SIGINT, signal.SIGTERM)

    def note(number, _):
        interrupted.append(number)
        print("interrupted; finishing what is in progress", file=sys.stderr)

    before = [signal.signal(number, note) for number in numbers]
    try:
        yield interrupted
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)
