"""A file of any kind -> picture and sound at the model's frame rate, size and sample rate.

What a file holds is found out by decoding it with ffmpeg; its name, its header and its titles
decide nothing. Of a damaged file, what precedes the damage is kept.
"""

import functools
import math
import re
import subprocess
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import imageio_ffmpeg
import numpy as np
from numpy import ndarray

from mutual_forcing import Config, UserError

PICTURE, SOUND = "0:V:0", "0:a:0"  # ffmpeg's names of the first film (no cover) and first sound
LONGEST_GAP = {PICTURE: 1.0, SOUND: 0.1}  # seconds; in a damaged file, something is lost in longer


class ClipError(UserError):
    """A file cannot serve as a clip; the message says why, in one line."""


class Clip(NamedTuple):
    """A decoded file. Its sound lasts as long as its picture, or is empty."""

    frames: ndarray  # uint8 (F, image, image, 3)
    samples: ndarray  # float32 (n,) in [-1, 1]
    note: str  # how much of a damaged or uneven file this is; empty for others


def run_ffmpeg(path: Path, *options: str) -> tuple[bool, bytearray, str]:
    """Decode a file: whether ffmpeg succeeded, the raw data, and its first complaint or nothing."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-v", "error", "-i", f"file:{path}"]
    data = bytearray()
    with tempfile.TemporaryFile() as errors:
        pipes = {"stdout": subprocess.PIPE, "stderr": errors}
        with subprocess.Popen([*command, *options, "-"], **pipes) as process:
            for part in iter(functools.partial(process.stdout.read, 2**20), b""):
                data += part
        errors.seek(0)
        line = errors.readline(300).decode(errors="replace")
    if process.returncode < 0:
        raise ClipError(f"ffmpeg was stopped by signal {-process.returncode}")
    return process.returncode == 0, data, re.sub(r"^(\[[^]]*\] )*", "", line).strip()


def seconds_before_damage(path: Path, stream: str) -> float:
    """How long a stream can be decoded without an error and without a gap."""
    _, listing, _ = run_ffmpeg(path, "-xerror", "-map", stream, "-f", "framecrc")
    tick, end = Fraction(1), Fraction(0)
    for line in listing.decode().splitlines():
        if line.startswith("#tb 0:"):
            tick = Fraction(line.split()[-1])
        elif not line.startswith("#"):
            _, _, begin, length, *_ = line.split(",")
            if end > 0 and int(begin) * tick > end + LONGEST_GAP[stream]:
                break
            end = (int(begin) + int(length)) * tick
    return float(end)


def stream_options(cfg: Config) -> dict[str, list[str]]:
    """How ffmpeg brings each stream to the model's format."""
    n = cfg.image
    # dar is width / height as shown: pixels need not be square. The shorter side becomes n.
    size = f"scale=w='max({n},round({n}*dar))':h='max({n},round({n}/dar))',crop={n}:{n}"
    filters = f"bwdif=mode=send_frame:deint=interlaced,fps={cfg.fps},{size}"
    # With async=1:first_pts=0, sound that begins late or has gaps is filled up with silence.
    resample = ["-af", "aresample=async=1:first_pts=0", "-ac", "1", "-ar", str(cfg.sample_rate)]
    return {
        PICTURE: ["-vf", filters, "-f", "rawvideo", "-pix_fmt", "rgb24"],
        SOUND: [*resample, "-f", "f32le"],
    }


def decode_stream(path: Path, stream: str, cfg: Config) -> tuple[bytearray, float, str]:
    """A stream of a file -> its raw data, how many frames precede any damage, and what that is.

    The number is infinite if nothing is damaged, and if nothing precedes the damage.
    """
    succeeded, data, complaint = run_ffmpeg(path, "-map", stream, *stream_options(cfg)[stream])
    if succeeded and not complaint:
        return data, math.inf, ""
    if data:
        return data, cfg.fps * seconds_before_damage(path, stream) or math.inf, complaint
    exists, _, _ = run_ffmpeg(path, "-map", stream, "-c", "copy", "-t", "0", "-f", "null")
    return data, math.inf, complaint if exists else ""


def decode_clip(path: Path, cfg: Config, least: int = 1) -> Clip:
    """A file -> its picture and its sound; of a damaged file, what precedes the damage.

    A sound that is whole and short is followed by silence, if the picture is whole, too; one
    that is damaged and too short is left out. Raises ClipError if the picture does not last
    `least` frames.
    """
    data, intact, damage = decode_stream(path, PICTURE, cfg)
    count = len(data) // (3 * cfg.image**2)
    frames = np.frombuffer(data, np.uint8, count * 3 * cfg.image**2)
    frames = frames.reshape(count, cfg.image, cfg.image, 3)
    seen = round(min(count, intact))

    data, intact, sound_damage = decode_stream(path, SOUND, cfg)
    samples = np.frombuffer(data, np.float32, len(data) // 4)
    np.nan_to_num(samples, copy=False)
    np.clip(samples, -1, 1, out=samples)
    per_frame = cfg.sample_rate // cfg.fps
    whole = len(samples) // per_frame
    heard = round(min(whole, intact))
    if not count:
        _, _, reason = run_ffmpeg(path, "-c", "copy", "-f", "null")
        nothing = f"nothing in it can be decoded ({reason})"
        raise ClipError("it has no picture" if len(samples) else nothing)

    damage = damage or sound_damage
    if heard < least <= seen and sound_damage:
        heard = 0
    elif heard:
        heard = seen = min(seen, heard) if damage else seen
    if seen < least:
        before = f" before its damage ({damage})" if damage else ""
        lengths = f"{seen / cfg.fps:.2f} s{before}, a clip takes {least / cfg.fps:.2f} s"
        raise ClipError(lengths)
    note = f"damaged ({damage}): " if damage else ""
    if note or abs(seen - count) > cfg.fps or abs(heard - whole) > cfg.fps:
        parts = [(seen, count, "picture"), (min(heard, whole), whole, "sound")]
        seconds = [
            f"{a / cfg.fps:.1f} of {b / cfg.fps:.1f} s of {name}" for a, b, name in parts if b
        ]
        note += " and ".join(seconds) + " are used"
    missing = max(0, heard * per_frame - len(samples))
    return Clip(frames[:seen], np.pad(samples[: heard * per_frame], (0, missing)), note)
