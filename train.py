"""Train Mutual Forcing on the synthetic talker or on clips: the world, the data and one flat loop (the
method is in mutual_forcing.py). `python train.py` runs all stages; with `--preset tiny` in minutes."""
import signal
if __name__ in ("__main__", "__mp_main__"):                # the latter: see apart()
    signal.signal(signal.SIGINT, signal.SIG_DFL)           # Ctrl-C while PyTorch loads: no traceback

import argparse
import atexit
import colorsys
import copy
import dataclasses
import errno
import functools
import hashlib
import html
import json
import multiprocessing
import os
import platform
import re
import resource
import subprocess
import sys
import time
import timeit
import warnings
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from tqdm import tqdm

from mutual_forcing import (ALPHABET, BRANCHES, FORMAT, SILENCE, AudioCodec, AudioVideoTransformer,
                            CheckpointError, Config, Controls, VideoCodec, add_noise, dmd_loss,
                            flow_matching_loss, generate, join, load_checkpoint, load_file,
                            mutual_forcing_loss, replace_file, rollout, save_checkpoint, save_file,
                            shortcut_loss, spell, split, stream, time_grid)

# ---- The synthetic talker: a drawn face that speaks, rich enough to learn, exact enough to measure. --------

NAMES = Config().characters                                # len(NAMES) as an index: anyone

# Each letter: how far the mouth opens and how wide it is, then its sound: two resonances (Hz) that the voice
# excites, how loud the voice is, and the centre (Hz), width (Hz) and loudness of a band of noise.
LETTER_TABLE = {
    #    open width   F1    F2  voice   hiss width loud
    "a": (1.00, 0.55, 900, 1500, 1.0,      0, 1, 0), "b": (0.00, 0.50, 250, 1000, 0.6,    0, 1, 0),
    "c": (0.25, 0.60, 0, 0, 0.0,        2600, 150, .5), "d": (0.30, 0.55, 250, 2200, 0.6,  0, 1, 0),
    "e": (0.55, 0.80, 550, 2200, 1.0,      0, 1, 0), "f": (0.10, 0.50, 0, 0, 0.0,     1900, 500, .5),
    "g": (0.40, 0.45, 450, 1500, 0.7,      0, 1, 0), "h": (0.60, 0.50, 0, 0, 0.0,      700, 250, .5),
    "i": (0.35, 0.95, 300, 2700, 0.9,      0, 1, 0), "j": (0.30, 0.40, 250, 1600, 0.4, 3300, 250, .3),
    "k": (0.45, 0.55, 0, 0, 0.0,        1300, 150, .5), "l": (0.45, 0.70, 500, 2900, 0.7,  0, 1, 0),
    "m": (0.00, 0.45, 300, 1300, 0.7,      0, 1, 0), "n": (0.25, 0.60, 300, 1900, 0.7,    0, 1, 0),
    "o": (0.80, 0.25, 550, 1000, 1.0,      0, 1, 0), "p": (0.00, 0.55, 0, 0, 0.0,      350, 120, .5),
    "q": (0.35, 0.20, 0, 0, 0.0,         950, 120, .5), "r": (0.40, 0.35, 700, 1200, 0.8,   0, 1, 0),
    "s": (0.15, 0.80, 0, 0, 0.0,        3400, 350, .5), "t": (0.20, 0.65, 0, 0, 0.0,     3000, 120, .5),
    "u": (0.45, 0.10, 300, 700, 1.0,       0, 1, 0), "v": (0.10, 0.60, 300, 500, 0.5, 1900, 300, .3),
    "w": (0.25, 0.05, 400, 500, 0.8,       0, 1, 0), "x": (0.30, 0.75, 0, 0, 0.0,     2200, 150, .5),
    "y": (0.30, 0.90, 300, 3300, 0.8,      0, 1, 0), "z": (0.15, 0.70, 250, 350, 0.5, 3500, 250, .35),
    " ": (0.00, 0.50, 0, 0, 0.0,           0, 1, 0)}
MOUTH = np.array([LETTER_TABLE[c][:2] for c in ALPHABET], np.float32)  # (27, 2) opening and width in 0..1


class Identity(NamedTuple):
    """Who the talker is. Colours are RGB in 0..1; face_width in 0..1 sets the voice too: wide is low."""
    skin: np.ndarray
    hair: np.ndarray
    eyes: np.ndarray
    cloth: np.ndarray
    back: np.ndarray       # (2, 3), top and bottom of the background
    face_width: float
    fringe: float          # how far the hair hangs into the face, 0..1
    glasses: bool
    hat: bool
    tilt: float            # dullness of the voice, 0..1
    texture: np.ndarray    # (6,) phases and frequencies of hair and cloth
    character: int         # index into NAMES, or len(NAMES) for anyone


def hsv(*colour: float) -> np.ndarray:
    """Hue, saturation and value in 0..1 -> RGB in 0..1, float32 (3,)."""
    return np.array(colorsys.hsv_to_rgb(*colour), np.float32)


def draw_identity(rng: np.random.Generator) -> Identity:
    """A random person; half are one of the named characters, who fix hair, hat, glasses, face and voice."""
    character = int(rng.integers(len(NAMES))) if rng.random() < 0.5 else len(NAMES)
    named = np.random.default_rng(1000 + character) if character < len(NAMES) else rng
    light = rng.random()
    skin = (1 - light) * np.array([0.58, 0.38, 0.28]) + light * np.array([0.97, 0.80, 0.68])
    back = hsv(rng.random(), rng.uniform(0.15, 0.6), rng.uniform(0.5, 0.95))
    return Identity(
        skin=skin.astype(np.float32), eyes=hsv(rng.random(), 0.7, 0.55),
        cloth=hsv(rng.random(), rng.uniform(0.3, 0.8), rng.uniform(0.4, 0.9)),
        back=np.stack([back, back * rng.uniform(0.6, 0.9)]).astype(np.float32), texture=rng.random(6),
        tilt=rng.random(), hair=hsv(named.random(), named.uniform(0.2, 0.8), named.uniform(0.15, 0.75)),
        face_width=named.random(), fringe=named.random(), glasses=bool(named.random() < 0.3),
        hat=bool(named.random() < 0.3), character=character)


def draw_symbols(rng: np.random.Generator, frames: int) -> np.ndarray:
    """A random transcript: a symbol per frame. Letters last 2 to 4 frames, words 2 to 6 letters."""
    symbols, letter = [SILENCE] * int(rng.integers(0, 5)), SILENCE
    while len(symbols) < frames:
        for _ in range(rng.integers(2, 7)):
            letter = int(rng.choice([i for i in range(26) if i != letter]))  # a repeat could not be heard
            symbols += [letter] * int(rng.integers(2, 5))
        symbols += [SILENCE] * int(rng.integers(2, 7))
    return np.array(symbols[:frames])


def letter_weights(symbols: np.ndarray) -> np.ndarray:
    """Symbols (F,) -> smooth weights (4 F + 1, 27) at quarters of frames: letters blend over about 60 ms."""
    fine = np.eye(27, dtype=np.float32)[np.repeat(symbols, 4)]
    padded = np.concatenate([np.eye(27, dtype=np.float32)[[SILENCE] * 2], fine, fine[-1:], fine[-1:]])
    kernel = (0.125, 0.375, 0.375, 0.125)                  # centred on the borders between quarters
    return sum(k * padded[i:i + len(fine) + 1] for i, k in enumerate(kernel))


def mouth_of(symbols: np.ndarray) -> np.ndarray:
    """Symbols (F,) -> opening and width of the mouth amid each frame (F, 2)."""
    weights = letter_weights(symbols)
    return (weights[1:-1:4] + 2 * weights[2::4] + weights[3::4]) / 4 @ MOUTH


def voice(rng: np.random.Generator, who: Identity, symbols: np.ndarray, cfg: Config) -> np.ndarray:
    """The sound of symbols (F,): float32 samples (F sample_rate / fps,) in [-1, 1]. Pitch is a multiple of
    sample_rate / hop, so that a steady vowel is steady in the codec's frames too."""
    hop, points = cfg.hop, letter_weights(symbols)[::2]    # control points, hop samples apart
    pitch = pitch_of(who)
    harmonics = np.arange(1, int(0.95 * cfg.sample_rate / 2 / (pitch * cfg.sample_rate / hop)) + 1) * pitch
    phases = np.pi * harmonics ** 2 / harmonics[-1]        # spread out, so that peaks do not add up
    waves = np.sin(2 * np.pi * np.outer(harmonics, np.arange(hop)) / hop + phases[:, None])
    bands = np.arange(hop + 1)                             # of the noise, half as wide as the harmonics' grid
    voiced, hissed = timbre(harmonics * cfg.sample_rate / hop, bands * cfg.sample_rate / (2 * hop), who.tilt)
    tables = (points @ voiced).astype(np.float32) @ waves.astype(np.float32)  # (points, hop), periodic
    fade = np.linspace(0, 1, hop, endpoint=False, dtype=np.float32)
    sound = (1 - fade) * tables[:-1] + fade * tables[1:]
    noise = rng.standard_normal((len(points), hop + 1)) + 1j * rng.standard_normal((len(points), hop + 1))
    grains = np.fft.irfft(noise * (points @ hissed), axis=1) * np.sin(np.pi * np.arange(2 * hop) / (2 * hop))
    return (sound + grains[:-1, hop:] + grains[1:, :hop]).reshape(-1).astype(np.float32)


def pitch_of(who: Identity) -> int:
    """The voice in multiples of sample_rate / hop (32 Hz): 7 for the narrowest face, 3 for the widest."""
    return 7 - int(who.face_width * 4.999)


def timbre(voice_hz: np.ndarray, noise_hz: np.ndarray, tilt: float) -> tuple[np.ndarray, np.ndarray]:
    """Amplitudes of each letter's harmonics (27, len(voice_hz)) and of its noise (27, len(noise_hz))."""
    f1, f2, loud, centre, width, hiss = np.array([LETTER_TABLE[c] for c in ALPHABET]).T[2:, :, None]
    peaks = np.exp(-((voice_hz - f1) / 130) ** 2) + 0.7 * np.exp(-((voice_hz - f2) / 180) ** 2)
    peaks = (peaks + 0.01) * 10 ** (-0.3 * tilt * voice_hz / 4000)
    voiced = 0.16 * loud * peaks / np.sqrt((peaks ** 2).sum(1, keepdims=True))
    band = np.exp(-((noise_hz - centre) / width) ** 2)
    hissed = 26 * hiss * band / np.sqrt((band ** 2).sum(1, keepdims=True) + 1e-9)
    return voiced, hissed


def blob(y: np.ndarray, x: np.ndarray, cy, cx, ry, rx) -> np.ndarray:
    """How much of each pixel (y, x) an ellipse covers, 0..1; all in pixels, soft over one at the rim."""
    norm = np.sqrt(((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2)
    return np.clip(0.5 + (1 - norm) * np.minimum(ry, rx), 0, 1).astype(np.float32)


def paint(canvas: np.ndarray, cover: np.ndarray, colour, shade=np.ones((1, 1), np.float32)) -> None:
    """Lay a colour (3,), times a shade, over the canvas (..., 3, h, w) where cover (..., h, w) says."""
    colour = np.broadcast_to(np.float32(colour), 3)[:, None, None] * shade[..., None, :, :]
    canvas += cover[..., None, :, :] * (colour - canvas)


def wander(rng: np.random.Generator, frames: int, fps: int, size: float) -> np.ndarray:
    """A slow random curve (F,): two sine waves of random pace and phase, about +-size."""
    seconds = np.arange(frames)[:, None] / fps
    waves = np.sin(2 * np.pi * (rng.uniform(0.1, 0.6, 2) * seconds + rng.random(2)))
    return (size * waves.mean(1)).astype(np.float32)


def draw_moves(rng: np.random.Generator, frames: int, fps: int) -> dict[str, np.ndarray]:
    """What chance does within a film: sway and nods (pixels), gaze (-1..1), eyelids (1 = shut), each (F,)."""
    lids, gaze = np.zeros(frames + 4, np.float32), np.zeros((frames, 2), np.float32)
    for f in range(frames):
        if rng.random() < 1 / (2.5 * fps):
            lids[f:f + 3] = np.maximum(lids[f:f + 3], (0.6, 1.0, 0.5))
        gaze[f] = rng.uniform(-1, 1, 2) if f == 0 or rng.random() < 1 / fps else gaze[f - 1]
    return {"sway": wander(rng, frames, fps, 2.5), "nod": wander(rng, frames, fps, 2.0),
            "lids": lids[:frames], "gaze_x": gaze[:, 0], "gaze_y": gaze[:, 1]}


def draw_still(who: Identity, size: int) -> np.ndarray:
    """What does not move: background, neck and clothes, float32 (3, size, size)."""
    y, x = np.mgrid[:size, :size].astype(np.float32) * (64 / size)
    down = y / 64
    canvas = (1 - down) * who.back[0][:, None, None] + down * who.back[1][:, None, None]
    paint(canvas, blob(y, x, 50, 32, 12, 6.5), 0.85 * who.skin)
    angle, pace = 2 * np.pi * who.texture[0], 0.5 + 0.9 * who.texture[1]
    stripes = 0.85 + 0.15 * np.sin(pace * (np.cos(angle) * x + np.sin(angle) * y) + 6.3 * who.texture[2])
    paint(canvas, blob(y, x, 72, 32, 16, 25), who.cloth, stripes.astype(np.float32))
    return canvas


def draw_frames(who: Identity, moves: dict[str, np.ndarray], mouth: np.ndarray, size: int) -> np.ndarray:
    """The film of a talker whose mouth (F, 2) has an opening and a width a frame: uint8 (F, size, size, 3).
    Drawn in 1/64ths of the picture, back to front; what moves is painted in the box that it can reach."""
    film = np.repeat(draw_still(who, size)[None], len(mouth), 0)
    unit = 64 / size
    grid_y, grid_x = np.mgrid[:size, :size].astype(np.float32) * unit
    head_x, head_y = 32 + moves["sway"][:, None, None], 29 + moves["nod"][:, None, None]

    def box(top, bottom, left, right):
        """A part of the film, and the distance of its pixels from the head's centre."""
        part = np.s_[int(top / unit):int(bottom / unit), int(left / unit):int(right / unit)]
        return film[:, :, *part], grid_y[part] - head_y, grid_x[part] - head_x

    wide = 13 + 4 * who.face_width
    part, y, x = box(4, 54, 8, 56)
    strands = 0.8 + 0.2 * np.sin((0.9 + 0.8 * who.texture[3]) * x + 0.25 * y + 6.3 * who.texture[4])
    paint(part, blob(y, x, -3, 0, 20, wide + 3.5), who.hair, strands)
    fringe = np.clip(6.5 + 5 * who.fringe - 2 * np.sin(0.35 * x + 6.3 * who.texture[5]) + y, 0, 1)
    paint(part, blob(y, x, 0, 0, 19, wide) * fringe, who.skin)
    if who.hat:
        part, y, x = box(2, 24, 6, 58)
        cap = np.clip(-10 - y, 0, 1) * np.clip(wide + 4.5 - abs(x), 0, 1) * np.clip(y + 24, 0, 1)
        paint(part, cap, 0.6 * who.cloth)
        paint(part, cap * np.clip(y + 13, 0, 1), 0.35 * who.cloth)
    draw_eyes(who, moves, 0.45 * wide, *box(19, 38, 14, 50))

    part, y, x = box(31, 50, 20, 44)
    opening, width = mouth[:, :1, None], mouth[:, 1:, None]
    high, half = 0.3 + 4.7 * opening, 3.0 + 4.0 * width
    paint(part, blob(y, x, 10, 0, high + 1.4, half + 1.4), (0.75, 0.30, 0.30))
    paint(part, blob(y, x, 10, 0, high, half) * np.minimum(1, 4 * opening), (0.22, 0.05, 0.08))
    return (np.clip(film, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(0, 2, 3, 1)


def draw_eyes(who: Identity, moves: dict[str, np.ndarray], apart: float, part, y, x) -> None:
    """Eyes with lids and gaze, glasses and the nose, into a part of the film (see draw_frames)."""
    lids = moves["lids"][:, None, None]
    gaze_x, gaze_y = 1.3 * moves["gaze_x"][:, None, None], -3 + 0.7 * moves["gaze_y"][:, None, None]
    for eye in (-apart, apart):
        open_eye = blob(y, x, -3, eye, 2.6 * (1 - lids) + 0.3, 3.4) * np.minimum(1, 2.5 * (1 - lids))
        paint(part, open_eye, 0.97)
        paint(part, open_eye * blob(y, x, gaze_y, eye + gaze_x, 1.9, 1.9), who.eyes)
        paint(part, open_eye * blob(y, x, gaze_y, eye + gaze_x, 0.8, 0.8), 0.05)
        paint(part, lids * blob(y, x, -2.6, eye, 0.6, 3.4), 0.6 * who.skin)
        if who.glasses:
            paint(part, blob(y, x, -3, eye, 4.6, 5.0) - blob(y, x, -3, eye, 3.7, 4.1), 0.12)
    paint(part, blob(y, x, 3.5, 0, 1.6, 1.8), 0.9 * who.skin)


class Film(NamedTuple):
    """A film with its transcript, as the world or a folder of clips gives it."""
    frames: np.ndarray     # uint8 (F, image, image, 3)
    samples: np.ndarray    # float32 (F sample_rate / fps,)
    symbols: np.ndarray    # int (margin + F + margin,), what is said before, during and after
    character: int


def talk(cfg: Config, rng: np.random.Generator, frames: int) -> Film:
    """One film of the synthetic talker, from its very beginning; the same state makes the same film."""
    who, symbols = draw_identity(rng), draw_symbols(rng, frames + cfg.margin)
    film = draw_frames(who, draw_moves(rng, frames, cfg.fps), mouth_of(symbols[:frames]), cfg.image)
    samples = voice(rng, who, symbols[:frames], cfg)
    return Film(film, samples, np.pad(symbols, (cfg.margin, 0), constant_values=SILENCE), who.character)


# ---- The clip folder: ordinary films and sounds, brought to the model's frame rate, size and sample rate. --

FILMS, SOUNDS = (".mp4", ".mov", ".webm", ".mkv"), (".wav", ".flac", ".ogg", ".mp3")
SUBTITLES = (".vtt", ".srt")
CUE = re.compile(2 * r"(?:(\d+):)?(\d+):(\d+)[.,](\d+)(?:\s*-->\s*)?" + r".*\n((?:(?!.*-->).+\n?)*)")


def decode_clip(path: Path, cfg: Config) -> tuple[np.ndarray, np.ndarray]:
    """A file -> frames uint8 (F, image, image, 3) and samples float32 (N,), equally long; either is empty if
    the file has none. Raises ValueError for a file that cannot be read to its end."""
    def decode(*options):
        return subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-nostats", "-xerror", "-i",
                               f"file:{path}", *options, "-"], capture_output=True)

    n, rate = cfg.image, str(cfg.sample_rate)
    sound = decode("-vn", "-af", "aresample=async=1:first_pts=0", "-ac", "1", "-ar", rate, "-f", "f32le")
    samples = np.nan_to_num(np.frombuffer(sound.stdout, np.float32)).clip(-1, 1)
    about = sound.stderr.decode(errors="replace").partition("Stream mapping:")[0]    # the file itself
    frames, fine = np.empty((0, n, n, 3), np.uint8), sound.returncode == 0 or "Audio:" not in about
    if path.suffix.lower() in FILMS:                       # ffmpeg turns and times the frames as they ask
        fit = f"fps={cfg.fps},scale={n}:{n}:force_original_aspect_ratio=increase,crop={n}:{n}"
        film = decode("-vf", fit, "-f", "rawvideo", "-pix_fmt", "rgb24")
        frames = np.frombuffer(film.stdout, np.uint8)
        frames = frames[:len(frames) // (3 * n * n) * (3 * n * n)].reshape(-1, n, n, 3).copy()
        fine = fine and (film.returncode == 0 or "Video:" not in about)
    said = re.search(r"Duration: (\d+):(\d+):([\d.]+), start: ([-\d.]+)", about)
    seconds = np.dot([float(x) for x in said.groups()], (3600, 60, 1, -1)) if said else 0
    if not fine or not 0 < max(len(frames) / cfg.fps, len(samples) / cfg.sample_rate) >= 0.9 * seconds - 0.2:
        raise ValueError("unreadable, or cut short")
    if len(frames) and len(samples):                       # late sound begins, short sound ends in silence
        whole = len(frames) * cfg.sample_rate // cfg.fps
        samples = np.pad(samples, (0, max(0, whole - len(samples))))[:whole]
    return frames, samples


def read_subtitles(path: Path, cfg: Config, frames: int) -> np.ndarray:
    """A clip's subtitles, letters spread over their interval -> symbols (F,), unknown without a letter."""
    symbols, data = np.full(frames, SILENCE), path.read_bytes()
    text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig", "replace")
    lines = (line.strip() + "\n" for line in text.splitlines())
    for *clock, text in CUE.findall("".join(lines)):
        seconds = np.array([float(x or 0) for x in clock]).reshape(2, 4) @ (3600, 60, 1, 0.001)
        begin, end = (int(round(min(x * cfg.fps, 1e9))) for x in seconds)
        text = html.unescape(re.sub(r"<.*?>|{.*?}", "", text))
        letters = spell(" ".join(text.split()) + " ", 1)
        at = np.arange(begin, min(end, frames))
        symbols[at] = np.array(letters)[(at - begin) * (len(letters) - 1) // max(1, end - begin)]
    if (symbols == SILENCE).all():
        print(f"{path}: no transcript of letters a to z in it", file=sys.stderr)
        symbols[:] = cfg.symbols
    return symbols


def load_clips(folder: Path, cfg: Config, least: int, cache: Path) -> list[Film]:
    """The films and sounds of a folder that last at least so many frames, decoded once into a cache; others
    are named and left out. Raises OSError without such a folder."""
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "no such folder of clips", str(folder))
    cache.mkdir(exist_ok=True)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    texts = {path.with_suffix(""): path for path in files if path.suffix.lower() in SUBTITLES}
    paths, clips = [path for path in files if path.suffix.lower() in FILMS + SOUNDS], []
    for path in tqdm(paths, desc="clips", disable=None):
        size, changed = path.stat().st_size, path.stat().st_mtime_ns
        about = repr((FORMAT, path.resolve(), size, changed, cfg.image, cfg.fps, cfg.sample_rate))
        kept = cache / hashlib.sha256(about.encode()).hexdigest()[:16]
        try:
            try:
                clip = load_file(kept)
            except CheckpointError:                        # none yet, or damaged
                frames, samples = map(torch.from_numpy, decode_clip(path, cfg))
                clip = {"format": FORMAT, "frames": frames, "samples": samples}
                save_file(kept, clip)
            frames, samples = clip["frames"].numpy(), clip["samples"].numpy()
            length = len(frames) or len(samples) * cfg.fps // cfg.sample_rate
            if length < least:
                raise ValueError(f"{length} frames of it can be read, not {least}")
            text = texts.get(path.with_suffix(""))
            said = np.full(length, cfg.symbols) if text is None else read_subtitles(text, cfg, length)
            around = np.full(cfg.margin, said[0] if said[0] == cfg.symbols else SILENCE)
            clips.append(Film(frames, samples, np.concatenate([around, said, around]), len(NAMES)))
        except ValueError as error:
            print(f"{path}: skipped, {error}", file=sys.stderr)
    print(f"{folder}: {len(clips)} of {len(paths)} files serve", file=sys.stderr)
    return clips


def fingerprint(clips: list[Film]) -> str:
    """Tells one set of clips from another: a run goes on only with its own."""
    known = hashlib.sha256()
    for clip in clips:
        for part in clip[:3]:
            known.update(repr(part.shape).encode() + part.tobytes())
    return known.hexdigest()


def drawer(clips: list[Film] | None, stage: str):
    """What draws a film for a stage: talk(), or of clips a random stretch of one, taken for a whole film."""
    if clips is None:
        return talk
    needs = {"video": ("frames",), "audio": ("samples",)}.get(stage, ("frames", "samples"))
    able = [clip for clip in clips if all(len(getattr(clip, part)) for part in needs)]
    if not able:
        raise TrainingError(f"--data: no clip has what stage {stage} needs")

    def draw(cfg: Config, rng: np.random.Generator, length: int) -> Film:
        clip, hop = able[rng.integers(len(able))], cfg.sample_rate // cfg.fps
        start = int(rng.integers(len(clip.symbols) - 2 * cfg.margin - length + 1))
        frames, samples = clip.frames[start:start + length], clip.samples[start * hop:(start + length) * hop]
        frames = frames if len(frames) else np.zeros((length, cfg.image, cfg.image, 3), np.uint8)
        return clip._replace(frames=frames, samples=np.pad(samples, (0, length * hop - len(samples))),
                             symbols=clip.symbols[start:start + length + 2 * cfg.margin])

    return draw


# ---- The data: films to latents and controls. --------------------------------------------------------------

def stack(films: list[Film]) -> Film:
    """Films of equal length -> one of tensors, each with an axis more."""
    return Film(*(torch.from_numpy(np.stack(part)) for part in zip(*films)))


@functools.cache
def codecs(cfg: Config, device: torch.device) -> tuple[VideoCodec, AudioCodec]:
    """The codecs, whose tables take as long to make as some films."""
    return VideoCodec(cfg, device), AudioCodec(cfg, device)


def encode_films(cfg: Config, films: Film) -> tuple[torch.Tensor, Controls]:
    """Stacked films -> latents (B, S, E), and their controls, none of them dropped; on the films' device."""
    video, audio = codecs(cfg, films.frames.device)
    first = video.encode(films.frames[:, :1].expand(-1, cfg.step_frames, -1, -1, -1))      # a latent step
    controls = Controls(films.symbols, films.character, first, torch.ones_like(films.character).bool())
    return join(video.encode(films.frames), audio.encode(films.samples)), controls


def frames_of(cfg: Config, seconds: float) -> int:
    """Frames of a clip of about this length: whole chunks."""
    return round(seconds / cfg.chunk_seconds) * cfg.chunk_frames


def draw_films(cfg: Config, draw, seed: int, index: int, step: int, rows: range, seconds: float):
    """Rows of the films of a step of stage number index, stacked; with numbers in 0..1 (3, rows), by which
    their controls are dropped. A function of its arguments, so that a run can be resumed anywhere, and
    divided among processes and passes."""
    chances = [np.random.default_rng([seed, index, step, row]) for row in rows]
    films = stack([draw(cfg, rng, frames_of(cfg, seconds)) for rng in chances])
    return films, torch.from_numpy(np.stack([rng.random(3) for rng in chances], 1))


def film_batch(model, drawn: tuple[Film, torch.Tensor], babble: float):
    """What draw_films() drew -> latents and controls, on the model's device. Controls are dropped by chance,
    as guidance and babbling need; babble: the share of films without words."""
    cfg, like = model.cfg, model.no_first
    films, chance = Film(*(part.to(like.device) for part in drawn[0])), drawn[1].to(like.device)
    x, controls = encode_films(cfg, films)
    words, who, first = chance >= chance.new_tensor([[babble], [0.3], [0.5]])          # what is kept
    null = controls.dropped(cfg)
    return x.to(like.dtype), Controls(torch.where(words[:, None], controls.symbols, null.symbols),
                                      torch.where(who, controls.character, null.character),
                                      controls.first, first)


# ---- Many processes (torchrun) and many passes: each takes its part; gradients are averaged. ---------------

def process() -> tuple[int, int]:
    """Which process this is, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class Share(TorchFunctionMode):
    """While it is entered, random numbers are drawn for the whole batch, and this part of it keeps its own:
    however a batch is divided, the run is the same."""

    def __init__(self, part: int, parts: int):
        super().__init__()
        self.part, self.parts = part, parts

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.randn_like:
            like, function = args[0], torch.randn
            args, kwargs = (like.shape,), {"dtype": like.dtype, "device": like.device}
        if function not in (torch.randn, torch.rand, torch.randint) or len(args[-1]) == 0:   # one for all
            return function(*args, **kwargs)
        *bounds, (rows, *size) = args
        whole = function(*bounds, (self.parts * rows, *size), **kwargs)
        return whole[self.part * rows:(self.part + 1) * rows]


def average_gradients(weights: list[torch.Tensor]) -> None:
    """Give all processes the same mean, bit for bit, of their gradients (FSDP2 averages those it divides)."""
    gradients = [weight.grad for weight in weights if type(weight.grad) is torch.Tensor]
    if process()[1] > 1 and gradients:
        flat = torch.nn.utils.parameters_to_vector(gradients) / process()[1]
        dist.all_reduce(flat)
        torch.nn.utils.vector_to_parameters(flat, gradients)


def shard(net: AudioVideoTransformer, device: str) -> None:
    """Divide a network's weights among the processes (FSDP2); each block's are gathered while it works."""
    from torch.distributed.device_mesh import init_device_mesh         # here: half a second that films save
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    warnings.filterwarnings("ignore", "FSDP2-wrapped")     # of views changed in place: none is here
    mesh = init_device_mesh(torch.device(device).type, (process()[1],))
    verbs = dict.fromkeys([*net.video.sides, *net.audio.sides], ("modulate", "project", "finish"))
    for module, names in (verbs | {net: ("modulate", "script", "start", "step")}).items():
        fully_shard(module, mesh=mesh)
        for name in names:                                 # what is called from outside
            register_fsdp_forward_method(module, name)


def anyone(wish, device: str) -> bool:
    """Whether any of the processes wishes it; all wait for all."""
    wishes = torch.tensor(float(bool(wish)), device=device)
    if process()[1] > 1:
        dist.all_reduce(wishes)
    return bool(wishes)


# ---- The loop. ---------------------------------------------------------------------------------------------

class Plan(NamedTuple):
    """What a stage takes (our choice; the paper's rate is 5e-5 for 7B weights)."""
    steps: int
    lr: float = 1e-3
    seconds: list = [1.5, 1.5, 3.0]    # of clips, in turn
    batch: int = 8         # clips of the first length in a step
    ema: float = 0.999
    babble: float = 0.6    # share of clips without words: few steps have to learn most there
    picture: float = 1.0   # pace of its branch, times lr: in stage 3, at 1, faces moved more than the world's
    window: int = 99       # chunks of history from here on, at most: with fewer, errors grow less in films

    def clips(self, seconds: float) -> int:
        """Clips of this length in a step, among all processes: at about equal cost."""
        return max(1, round(self.batch * self.seconds[0] / seconds))


STAGES = {"video": Plan(500), "audio": Plan(600), "joint": Plan(6500),
          "mutual": Plan(200, 2e-4, [3.0], 12, ema=0.99, picture=0.15, window=1)}      # 3 s: a history fits
OBJECTIVES = ("flow", "shortcut", "dmd")                   # options: their weights in stage 3
TINY = {"config": ["width=64", "layers=2", "heads=1"], "steps": 24, "batch": 3, "seconds": [1.5, 2.0],
        "save": 12}


class TrainingError(ValueError):
    """Training cannot start or go on; the message says why in one line."""


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def number(kind: type, least: float, most: float):
    """The type of an argument: a number between these, both included."""
    def read(text: str):
        if not least <= kind(text) <= most:
            raise ValueError
        return kind(text)

    read.__name__ = f"number from {least} to {most}:"
    return read


def check_device(name: str) -> None:
    """Raise TrainingError unless PyTorch can compute there."""
    try:
        torch.zeros(1, device=name).item()
        if name.startswith("cuda:"):                       # one of several: graphs are recorded there
            torch.cuda.set_device(name)
    except Exception:  # PyTorch has many for this
        raise TrainingError(f"--device {name}: PyTorch sees no such device here") from None


def optimizers_of(net: AudioVideoTransformer, pace: float, picture: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices and AdamW for all else (our choice; the paper has AdamW alone): 1 to 3 %
    less loss after 200 steps, for 8 % more time. What only the few-step mode uses learns 4 times as fast: it
    begins at zero, and disturbs nothing else. pace: times the rate; picture: that branch's pace, times it."""
    matrices, others = {}, {}                              # parameter groups
    for name, weight in net.named_parameters():
        own, size = pace * (picture if branch_of(name) == "video" else 1), ".step.size." in name
        group = {"params": [], "pace": 4 * own if size else own, "weight_decay": 0.0 if size else 0.02}
        kind = matrices if ".sides." in name and weight.ndim == 2 else others
        kind.setdefault((own, size), group)["params"].append(weight)
    return [torch.optim.AdamW(others.values(), betas=(0.9, 0.95), fused=True),
            torch.optim.Muon(matrices.values(), adjust_lr_fn="match_rms_adamw")]


class InFp32(TorchFunctionMode):
    """While it is entered, PyTorch's Muon multiplies in fp32: it asks for bf16, whatever the machine."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        function = torch.Tensor.clone if function is torch.Tensor.bfloat16 else function
        return function(*args, **(kwargs or {}))


WHOLE = {"full_state_dict": True, "cpu_offload": True}     # of a state that may be divided


def branch_of(name: str) -> str:
    """The branch that a weight belongs to; the stand-in for the first frame is a picture too."""
    return "audio" if name.startswith("audio") else "video"


def plan_of(args, stage: str) -> Plan:
    """A stage's plan, but for what the command line says."""
    said = {name: getattr(args, name) for name in ("steps", "lr", "seconds", "batch")}
    return STAGES[stage]._replace(**{name: value for name, value in said.items() if value})


class State:
    """All that a step changes. Saved and restored whole, so that 2 + 2 steps are 4 steps, bit for bit."""

    def __init__(self, model: AudioVideoTransformer, stage: str, args):
        self.stage, self.step, self.plan = stage, 0, plan_of(args, stage)
        self.draw, self.films, self.index = drawer(args.clips, stage), None, list(STAGES).index(stage)
        (rank, ranks), passes = process(), args.accumulate
        self.parts, self.own = ranks * passes, range(rank * passes, (rank + 1) * passes)   # of a batch; ours
        model.cfg = dataclasses.replace(model.cfg, window=min(model.cfg.window, self.plan.window))
        self.model, self.ema, self.fake = model, copy.deepcopy(model).requires_grad_(False), None
        self.nets = {"model": self.model, "ema": self.ema}
        if stage == "mutual" and args.dmd > 0:
            self.fake = self.nets["fake"] = copy.deepcopy(args.real or model).requires_grad_(True)
        for net in (*self.nets.values(), args.real if stage == "mutual" else None):
            if net:
                shard(net, args.device) if args.shard else net.to(args.device)
        self.optimizers = {"model": optimizers_of(self.model, 1, self.plan.picture)}
        if self.fake:                                      # has to keep up with the few-step mode
            self.optimizers["fake"] = optimizers_of(self.fake, 5, self.plan.picture)

    def next_films(self, args):
        """What draw_films() draws for the next pass: on the spot, or ahead, by processes for that alone."""
        if self.films is None:
            plan, own, parts = self.plan, self.own, self.parts
            draw = functools.partial(draw_films, self.model.cfg, self.draw, args.seed, self.index)

            def films(turn: int):                          # of passes, through all steps
                step, i = divmod(turn, len(own))
                seconds = plan.seconds[step % len(plan.seconds)]       # lengths in turn
                size = plan.clips(seconds) // parts
                return draw(step, range(own[i] * size, (own[i] + 1) * size), seconds)

            turns = range(self.step * len(own), plan.steps * len(own))
            self.films = iter(DataLoader(                  # not in our group: Ctrl-C is not for them
                turns, None, collate_fn=films, num_workers=args.workers,
                worker_init_fn=lambda _: os.setpgrp(),
                multiprocessing_context="fork" if args.workers else None))
        return next(self.films)

    def content(self, args) -> dict:
        """As plain types and, in the first process, whole tensors: any number of them can go on from it."""
        import torch.distributed.checkpoint.state_dict as states       # here, as in shard()
        whole = states.StateDictOptions(**WHOLE)
        return {"format": FORMAT, "config": dataclasses.asdict(self.model.cfg), "settings": args.settings,
                "stage": self.stage, "step": self.step,
                "optimizers": {name: states.get_optimizer_state_dict(self.nets[name], some, options=whole)
                               for name, some in self.optimizers.items()},
                **{name: states.get_model_state_dict(net, options=whole) for name, net in self.nets.items()}}

    def restore(self, content: dict) -> None:
        """Inverse of content(). Raises CheckpointError for what is not."""
        import torch.distributed.checkpoint.state_dict as states
        try:
            self.step = range(self.plan.steps + 1).index(content["step"])
            for name, net in self.nets.items():
                states.set_model_state_dict(net, content[name], options=states.StateDictOptions(**WHOLE))
            loose = states.StateDictOptions(**WHOLE, strict=False)     # one branch has none
            for name, optimizers in self.optimizers.items():
                states.set_optimizer_state_dict(self.nets[name], optimizers, content["optimizers"][name],
                                                options=loose)
        except Exception:  # whatever foreign content may raise
            raise CheckpointError("resume.pt: does not fit this version, or this command") from None


def settings_of(args) -> dict:
    """The part of the command line that changes what is learned, as plain types."""
    names = ("stage", "config", "steps", "batch", "lr", "seed", "seconds", "history", *OBJECTIVES,
             "guidance", "whole", "init", "teacher", "precision")
    said = {name: str(value) if isinstance(value := getattr(args, name), Path) else value for name in names}
    return said | {"clips": args.clips and fingerprint(args.clips),
                   "defaults": {stage: list(value) for stage, value in STAGES.items()}}


def losses_of(state: State, x: torch.Tensor, controls: Controls, args) -> tuple[dict, dict]:
    """The losses of this step by term, and figures to log."""
    if state.stage == "mutual":                            # our choice: every fourth rollout, and DMD, of 8
        return mutual_forcing_loss(
            state.model, x, controls, teacher=state.ema, real=args.real or state.ema, fake=state.fake,
            steps=8 if state.step % 4 == 3 else 4, history=args.history, guidance=args.guidance,
            score_chunk=x.shape[1] if args.real_whole else None, **{n: getattr(args, n) for n in OBJECTIVES})
    branches = (state.stage,) if state.stage in BRANCHES else BRANCHES
    history, chunk = (None, x.shape[1]) if args.whole else (x, None)
    window = 1 + int(torch.randint(state.model.cfg.window, ()))        # a short one has to ask the sink
    loss, logs = flow_matching_loss(state.model, x, history, controls, chunk=chunk, branches=branches,
                                    window=window)
    return {"flow": loss}, logs


def backward(state: State, losses: dict) -> dict[str, float]:
    """Add up the gradients of all terms; returns their norms by term and branch."""
    norms = {}
    for term, loss in losses.items():
        net = state.fake if term == "fake" else state.model
        others = [weight.grad for weight in net.parameters()]
        net.zero_grad()
        loss.backward()
        for branch in BRANCHES:
            own = [weight.grad for name, weight in net.named_parameters() if branch_of(name) == branch]
            norm = torch.nn.utils.get_total_norm([x for x in own if x is not None])
            norms[f"norm_{term}_{branch}"] = getattr(norm, "full_tensor", lambda: norm)().item()
        for weight, other in zip(net.parameters(), others):
            if other is not None:
                weight.grad = other if weight.grad is None else weight.grad + other
    return norms


def train_step(state: State, args) -> dict[str, float]:
    """One step of the state's stage; returns the figures to log, of this process's last part of the batch
    (and norms of that part's share). Raises TrainingError at a loss of NaN."""
    plan, bf16 = state.plan, args.precision == "bf16"
    for part in state.own:
        x, controls = film_batch(state.model, state.next_films(args), plan.babble)
        torch.manual_seed((args.seed * len(STAGES) + state.index) * 10 ** 7 + state.step)
        with Share(part, state.parts), torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            losses, logs = losses_of(state, x, controls, args)
        if anyone(not all(loss.isfinite() for loss in losses.values()), args.device):
            raise TrainingError(f"the loss of stage {state.stage} is not finite at step {state.step}; the "
                                f"last good checkpoint, if one was saved, is {args.out / state.stage}.pt")
        logs |= backward(state, {term: loss / args.accumulate for term, loss in losses.items()})
    average_gradients([weight for net in state.nets.values() for weight in net.parameters()])
    # Warm-up, descent to a twentieth (a high rate's noise is costly), each optimizer clips: our choices.
    rate = plan.lr * min(1, (state.step + 1) / min(100, plan.steps)) * (1 - 0.95 * state.step / plan.steps)
    for optimizer in sum(state.optimizers.values(), []):
        torch.nn.utils.clip_grad_norm_([w for group in optimizer.param_groups for w in group["params"]], 0.5)
        for group in optimizer.param_groups:
            group["lr"] = group["pace"] * rate
        with torch.no_grad() if bf16 else InFp32():        # a step is without gradient anyway
            optimizer.step()
        optimizer.zero_grad()
    move = torch.optim.swa_utils.get_ema_multi_avg_fn(min(plan.ema, (state.step + 1) / (state.step + 10)))
    move([*state.ema.parameters()], [*state.model.parameters()], None)     # the slow copy toward the fast one
    state.step += 1
    return {"loss": sum(loss.item() for loss in losses.values()), **logs}


@torch.no_grad()
def write_strip(model: AudioVideoTransformer, draw, seconds: float, path: Path) -> None:
    """What the model makes now, a PNG: four films, few-step mode, 4 evaluations, two frames a chunk."""
    cfg, noise = model.cfg, torch.Generator().manual_seed(0)
    _, controls = film_batch(model, draw_films(cfg, draw, 0, len(STAGES), 0, range(4), seconds), 0.5)
    chunks = generate(model, controls, round(seconds / cfg.chunk_seconds), time_grid(cfg, 4), generator=noise)
    video, _ = split(cfg, torch.cat([states[-1] for states in chunks], 1))
    films = VideoCodec(cfg, video.device).decode(video)[:, ::cfg.chunk_frames // 2].cpu().numpy()
    write_picture(path, np.vstack([np.hstack(film) for film in films]))        # a row each, time to the right


def write_picture(path: Path, pixels: np.ndarray) -> None:
    """uint8 (h, w, 3) -> a PNG of twice the size; the old one stands until the new one is whole."""
    replace_file(path, iio.imwrite("<bytes>", pixels.repeat(2, 0).repeat(2, 1), extension=".png"))


def train_stage(state: State, args) -> None:
    """Train a stage from where its state is to its end; log, checkpoints and filmstrips now and then. Ctrl-C
    and SIGTERM end it after the step in progress, with a checkpoint. Raises KeyboardInterrupt then."""
    stop, stopped, first = [], False, process()[0] == 0
    before = {n: signal.signal(n, lambda *_: stop.append(1)) for n in (signal.SIGINT, signal.SIGTERM)}
    steps = state.plan.steps
    bar = tqdm(total=steps, initial=state.step, desc=state.stage, disable=None)
    try:
        with open(args.out / "log.jsonl" if first else os.devnull, "a", buffering=1) as log:
            while state.step < steps and not stopped:
                began = time.perf_counter()
                figures = train_step(state, args)
                if state.step % args.log_every == 0 or state.step in (1, steps):
                    figures |= {"seconds": time.perf_counter() - began}
                    figures = {name: round(value, 5) for name, value in figures.items()}
                    print(json.dumps({"stage": state.stage, "step": state.step} | figures), file=log)
                bar.set_postfix(loss=f"{figures['loss']:.3f}")
                bar.update()
                stopped = anyone(stop, args.device)
                if state.step % args.save == 0 or state.step == steps or stopped:
                    save(state, args)
    finally:
        bar.close()
        for n, handler in before.items():
            signal.signal(n, handler)
    anyone(False, args.device)                             # the others wait until the first has saved
    if stopped:
        raise KeyboardInterrupt


def streams(stage: str | None, whole: bool) -> bool:
    """Whether a checkpoint makes films: not of stage 1, nor a bidirectional teacher's."""
    return stage not in ("video", "audio") and not whole


def save(state: State, args) -> None:
    """Write the EMA weights, all that --resume needs, and a filmstrip; the first process alone writes."""
    first = process()[0] == 0
    content = state.content(args) if first or args.shard else None
    if first:
        ema = AudioVideoTransformer(state.ema.cfg)
        ema.load_state_dict(content["ema"])
        save_checkpoint(args.out / f"{state.stage}.pt", ema, {
            "stage": state.stage, "step": state.step, "seed": args.seed, "whole": args.whole})
        save_file(args.out / "resume.pt", content)
        if streams(state.stage, args.whole) and not args.shard:        # fits one device
            strip, seconds = args.out / f"{state.stage}.png", max(state.plan.seconds)
            write_strip(ema.to(args.device), state.draw, seconds, strip)


# ---- Speed, beside the machine's limit: the time that the same matrix products take alone. -----------------

@torch.jit.script_if_tracing
def packed_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None):
    """oneDNN's linear layer, of a weight that it has laid out."""
    none: list[int | float | complex | None] = []          # how TorchScript spells a list of scalars
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", none, "")


class Packed(torch.nn.Module):
    """A linear layer (weight (out, in), bias) whose weight cannot learn, but lies as a CPU's products in bf16
    read it: F.linear lays it out anew for each, a tenth of a film's time. Its output is the same."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None):
        super().__init__()
        self.register_buffer("weight", torch.ops.mkldnn._reorder_linear_weight(weight))
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return packed_linear(x, self.weight, self.bias)


class Products(TorchDispatchMode):
    """Collects the shapes of matrix products made while it is entered, attention's two among them (but not
    those of a fused attention's backward pass)."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm", "matmul", "addmm", "baddbmm"):        # of some, a bias comes first
            self.shapes.append((args[-2].shape, args[-1].shape, False))
        elif name in ("linear", "_linear_pointwise"):                  # the latter: see Packed
            self.shapes.append((args[0].shape, args[1].shape[::-1], name != "linear"))
        elif "scaled_dot_product" in name and "backward" not in name:
            q, k, v = (x.shape for x in args[:3])
            self.shapes += [(q, (*k[:-2], k[-1], k[-2]), False), ((*q[:-1], k[-2]), v, False)]
        return func(*args, **(kwargs or {}))

    def alone(self, device) -> float:
        """Seconds for the products alone, in the faster of fp32 and bf16, packed weights packed."""
        random = functools.partial(torch.randn, dtype=PRECISIONS[faster_precision(device)], device=device)
        pairs = [(random(a), Packed(random(b).T) if packed else random(b)) for a, b, packed in self.shapes]

        def products():
            return [b(a) if isinstance(b, Packed) else a @ b for a, b in pairs]

        if torch.device(device).type == "cuda":            # there, one by one, they would wait for launches
            products()                                     # to warm up
            products, _ = cuda_graph(products)
        return fastest(products, device, 5)


def cuda_graph(function, pool=None):
    """Record what a function asks of the GPU -> a function that asks it again, and returns the same tensors;
    and the pool of memory to pass on to the next graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = function()
    return lambda: (graph.replay(), result)[1], graph.pool()


def fastest(function, device, runs: int) -> float:
    """Seconds of the fastest of several runs."""
    return min(timeit.repeat(lambda: (function(), clock(device)), number=1, repeat=runs))


def clock(device) -> float:
    """Seconds, once all that was asked of the device is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory(device) -> int:
    """The most memory held so far, in MiB: of the device, or of this process."""
    if torch.device(device).type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2 ** 20)
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2 ** 20
    said = Path("/proc/self/status").read_text()           # elsewhere ru_maxrss begins with the parent's
    return int(re.search(r"VmHWM:\s+(\d+) kB", said)[1]) // 2 ** 10


def apart(function, *args):
    """function(*args), by a process of its own, whose peak memory is then of this alone."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def machine(device) -> str:
    """What the figures were measured on."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    about = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [*re.findall(r"model name\s*: (.*)", about), platform.processor()]
    return f"{names[0]}, {torch.get_num_threads()} threads"


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def faster_precision(device) -> str:
    """The faster precision for small products: without a unit for it, bf16 is a hundred times slower."""
    if torch.device(device).type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"

    def seconds(precision):
        a, b = (torch.randn(n, 192, dtype=PRECISIONS[precision], device=device) for n in (48, 768))
        return fastest(lambda: a @ b.T, device, 10)

    return min(PRECISIONS, key=seconds)


def markdown(rows: list[dict]) -> str:
    """Rows of figures as a Markdown table; a cell holds one number a window."""
    def cell(x):
        if isinstance(x, (list, tuple)):
            return " / ".join(map(cell, x))
        return "-" if x is None else f"{x:.3g}" if isinstance(x, float) else str(x)

    lines = [[name.replace("_", " ") for name in rows[0]], ["---"] * len(rows[0]),
             *(map(cell, map(row.get, rows[0])) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def benchmark(args, cfg: Config) -> dict:
    """Seconds of one step of each stage, of the parts of stage 3 on their share of the rows, and of
    Self-Forcing's recipe, each beside its matrix products alone; and the most memory that a step holds."""
    args.steps, args.workers = None, 0                     # the drawing counts
    plan = plan_of(args, "joint")                          # one length and batch, to compare the stages by
    args.seconds, args.batch, args.dmd = plan.seconds[:1], plan.batch, 1 / 3
    rows = sum((apart(time_stage, args, cfg, stage, f"stage {stage}") for stage in STAGES), [])
    args.flow, args.shortcut, args.dmd = 0.0, 0.0, 1.0
    args.real, args.real_whole = AudioVideoTransformer(cfg), True
    rows += apart(time_stage, args, cfg, "mutual", "Self-Forcing")
    return {"machine": machine(args.device), "rows": rows}


def time_stage(args, cfg: Config, stage: str, name: str) -> list[dict]:
    """Rows of the benchmark: a step, and of Mutual Forcing its parts."""
    rows, device = [], args.device
    check_device(device)
    state = State(AudioVideoTransformer(cfg).to(device), stage, args)

    def add(what: str, function):
        function()
        with Products() as products:
            function()
        seconds = fastest(function, device, 3)
        memory = None if rows else peak_memory(device)     # parts come after the whole
        rows.append({"what": what, "seconds": seconds, "limit_share": products.alone(device) / seconds,
                     "peak_memory_mb": memory})

    add(f"a step of {name}", lambda: train_step(state, args))
    if stage != "mutual" or args.real:
        return rows
    drawn = draw_films(cfg, talk, 0, 0, 0, range(args.batch), args.seconds[0])
    x, controls = film_batch(state.model, drawn, 0.5)
    third = slice(0, max(1, args.batch // 3))
    some, said = x[third], controls.each(lambda c: c[third])
    times, student = time_grid(cfg, 4).to(device), state.model
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=args.precision == "bf16"):
        add("rollout", lambda: rollout(student, x, controls, times, "few"))
        states, made = rollout(student, some, said, times, "few")
        own = {"real": state.ema, "fake": state.fake, "times": times, "made": made}
        for what, loss in (
                ("flow matching", lambda: flow_matching_loss(student, some, some, said)),
                ("ShortCut", lambda: shortcut_loss(student, some, some, said, teacher=state.ema)),
                ("DMD", lambda: dmd_loss(student, states, some, said, **own)),
                ("fake score", lambda: flow_matching_loss(state.fake, states[-1], some, said, made=made))):
            add(what, lambda: loss()[0].backward())
    return rows


# ---- The paper's claims, put to the test. ------------------------------------------------------------------
# Each arm: how it is trained, most of them from one checkpoint of the end of stage 2 and for as many steps;
# and what is scored of it: mode, evaluations, guidance, seconds.

STAGE_3 = "--stage mutual --init {init} --steps 300 --batch 6 "
STAGE_2 = "--stage joint --init {init} --lr 3e-4 --steps 500 "
ARMS = {
    "hybrid": (STAGE_3, "few-4 few-8 few-1 few-2 few-16 multi-50 few-4-1-60 few-4-1-600"),
    "teacher-forcing": (STAGE_3 + "--history real --flow 1 --shortcut 0 --dmd 0",
                        "few-4 multi-50 multi-50-5 few-4-1-60"),
    "hybrid-tf": (STAGE_3 + "--history real", "few-4"),
    "shortcut": (STAGE_3 + "--shortcut 1 --dmd 0", "few-4 few-8"),
    "dmd": (STAGE_3 + "--shortcut 0 --dmd 1", "few-4 few-8"),
    "teacher": (STAGE_2 + "--whole --batch 4 --seconds 3", ""),
    "self-forcing": (STAGE_3 + "--flow 0 --shortcut 0 --dmd 1 --teacher {out}/teacher-0/joint.pt", "few-4"),
    "shortcut-tf": (STAGE_3 + "--history real --shortcut 1 --dmd 0", "few-4 few-8"),
    "dmd-tf": (STAGE_3 + "--history real --shortcut 0 --dmd 1", "few-4"),
    "clips-of-1s": (STAGE_2 + "--batch 12 --seconds 1", "few-4"),
    "clips-of-3s": (STAGE_2 + "--batch 4 --seconds 3", "few-4"),
    "video": ("--stage video --steps 500 --batch 8 --seconds 1.5", ""),
    "audio": ("--stage audio --init {out}/video-0/video.pt --steps 600 --batch 8 --seconds 1.5", ""),
    "two-stages": ("--stage joint --init {out}/audio-0/audio.pt --steps 2800 --batch 8 --seconds 1.5",
                   "few-4"),
    "one-stage": ("--stage joint --steps 3500 --batch 8 --seconds 1.5", "few-4"),
}
THREE_SEEDS = ("teacher-forcing", "shortcut-tf", "self-forcing", "hybrid")
FIGURES = ("transcript_error", "lip", "sync", "identity_drift", "voice_drift", "loudness_db", "letter_margin",
           "letter_spread", "frechet_video", "frechet_audio")


def reproduce(args) -> dict:
    """Train and score the ARMS into folders of args.out; what its results.json holds is not made again."""
    jobs = [(name, 0, what) for name, (_, scores) in ARMS.items() for what in scores.split()]
    jobs += [(name, seed, "few-4") for seed in (1, 2) for name in THREE_SEEDS]
    if not args.init or process()[1] > 1:
        raise TrainingError("--reproduce: needs --init, a checkpoint of the end of stage 2, and one process")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {"arms": {}, "rows": []}
    begun = args.init.read_bytes()[-32:].hex()             # its checksum
    if results.setdefault("init", begun) != begun:
        raise TrainingError(f"{path}: the results of another --init")
    results["machine"], rows = machine(args.device), results["rows"]
    for name, seed, what in tqdm(jobs, desc="arms", disable=None):
        job = {"arm": name, "seed": seed, "asked": what}
        if not any(job.items() <= row.items() for row in rows):
            made = train_arm(name, seed, args, results["arms"])
            for row in scored(made, args.device, *what.split("-")):
                row |= job if row["mode"] else {"arm": row["checkpoint"]}
                rows += [] if row in rows else [row]
            replace_file(path, json.dumps(results, indent=0).encode())
    return results


def train_arm(name: str, seed: int, args, arms: dict) -> Path:
    """Train an arm, after those it builds on, or go on with it; it is entered in arms. Returns its file."""
    options, scores = ARMS[name]
    for before in re.findall(r"{out}/(\S+)-0/", options):
        train_arm(before, 0, args, arms)
    folder, options = args.out / f"{name}-{seed}", [word.format(**vars(args)) for word in options.split()]
    arm = build_parser().parse_args([*options, "--seed", str(seed), "--out", str(folder)])
    arm.device, arm.precision, arm.workers = args.device, args.precision, args.workers
    made = folder / f"{arm.stage}.pt"
    if folder.name not in arms or not made.exists() or load_checkpoint(made)[1]["step"] < arm.steps:
        arm.resume = (folder / "resume.pt").exists()
        run(arm)
        model = load_checkpoint(made)[0]
        arms[folder.name] = {"options": " ".join(options), "alike": likeness(model)}
        if scores and seed == 0:
            shown = [arm for arm in arms if arm.endswith("-0") and ARMS[arm[:-2]][1]]
            draw_arm(model, shown.index(folder.name), args.out / "arms.png")
    return made


def scored(checkpoint: Path, device: str, mode: str, steps: str, guidance="1", seconds="25") -> list[dict]:
    """The rows that `sample.py --evaluate --json` gives for a checkpoint, with how much film was asked."""
    talkers = {"25": "32" if int(steps) < 50 else "16", "60": "16", "600": "4"}.get(seconds, "2")
    command = [sys.executable, Path(__file__).with_name("sample.py"), "--json", "--evaluate", checkpoint,
               "--mode", mode, "--steps", steps, "--guidance", guidance, "--seconds", seconds,
               "--talkers", talkers, "--device", device]
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if said.returncode:
        raise TrainingError(f"{checkpoint} could not be scored")
    extent = {"seconds": int(seconds), "talkers": int(talkers)}
    return [row | extent for row in json.loads(said.stdout)["rows"]]


@torch.no_grad()
def likeness(model: AudioVideoTransformer) -> list[float]:
    """How alike the two modes are: cosine of their attention outputs on the same noised chunks, by layer."""
    drawn = draw_films(model.cfg, talk, 0, len(STAGES), 0, range(8), 2 * model.cfg.chunk_seconds)
    x, controls = film_batch(model, drawn, 0.5)
    begin, end = time_grid(model.cfg, 4)[1:3]
    torch.manual_seed(0)
    x_t, outputs = add_noise(x, torch.randn_like(x), begin[0]), ([], [])
    for seen, d in zip(outputs, (0 * begin, end - begin)):
        hooks = [side.out.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
                 for branch in (model.video, model.audio) for side in branch.sides]
        model(x_t, begin, d, controls, x)
        [hook.remove() for hook in hooks]
    noisy = [[part[:, part.shape[1] // 2:].flatten(0, 1) for i, part in enumerate(seen) if i % 3 < 2]
             for seen in outputs]                          # of a layer: video, audio and the first frame
    alike = [torch.cosine_similarity(a, b, -1).mean().item() for a, b in zip(*noisy)]
    return [round((video + audio) / 2, 4) for video, audio in zip(alike[::2], alike[1::2])]


def draw_arm(model: AudioVideoTransformer, row: int, path: Path) -> None:
    """Draw an arm's row of the picture of all: three characters at 2 and 25 s, the same words and noise."""
    shots, size = [], model.cfg.image
    for character in model.cfg.characters[:3]:
        chunks = stream(model, seconds=25.5, transcript="the quick brown fox jumps " * 6, character=character)
        film = np.concatenate([frames for frames, _ in chunks])
        shots += [film[2 * model.cfg.fps], film[25 * model.cfg.fps]]
    strip = np.concatenate(shots, 1)
    old = iio.imread(path)[::2, ::2] if path.exists() else strip[:0]
    write_picture(path, np.concatenate([old[:row * size], strip, old[(row + 1) * size:]]))


def tables(results: dict) -> str:
    """The scores as Markdown, means over seeds: the last window; folded, all, and how alike modes are."""
    order, groups = ["ground truth", "shuffled sound", *ARMS], {"spoken": {}, "babbling": {}}
    for row in sorted(results["rows"], key=lambda r: (r["seconds"], -r["talkers"], order.index(r["arm"]))):
        how = f"{row['mode']} {row['steps']}, " if row["mode"] else ""
        how += f"guidance {row['guidance']:g}, " if row["guidance"] not in (None, 1) else ""
        key = row["arm"], how + f"{row['talkers']} talkers of {row['seconds']} s"
        groups[row["control"]].setdefault(key, []).append(row)

    def table(control: str, begin: int) -> str:
        lines = []
        for (arm, how), same in groups[control].items():
            lines.append({"arm": arm, "how": how + (f", {len(same)} seeds" if len(same) > 1 else "")})
            for figure in (name for name in FIGURES if same[0][name][0] is not None):
                values = np.array([row[figure] for row in same], float)[:, begin:]     # (seeds, windows)
                spread = f" ± {values.std(0, ddof=1)[-1]:.2g}" if len(same) > 1 and begin < 0 else ""
                lines[-1][figure] = " / ".join(f"{x:.3g}" for x in values.mean(0)) + spread
        return f"*{control.capitalize()}*\n\n{markdown(lines)}"

    alike = [{"arm": name, "cosine, by layer": arm["alike"]} for name, arm in results["arms"].items()]
    return "\n\n".join([*(table(control, -1) for control in groups), "<details><summary>All windows, and how "
                        "alike the two modes are</summary>", *(table(control, 0) for control in groups),
                        f"*How alike the two modes are*\n\n{markdown(alike)}", "</details>"])


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="train.py", description="Train Mutual Forcing on the synthetic talker.")
    add, count, weight = parser.add_argument, number(int, 1, 10 ** 9), number(float, 0, 1000)
    default = {name: ", ".join(f"{stage} {getattr(value, name)}" for stage, value in STAGES.items())
               for name in ("steps", "lr", "batch", "seconds")}
    add("--stage", choices=(*STAGES, "all"), default="all")
    add("--init", type=Path, help="checkpoint to start from")
    add("--resume", action="store_true", help="go on from where the run in --out was interrupted")
    add("--preset", choices=("tiny",), help="tiny: every stage in under three minutes, to see it all work")
    add("--config", nargs="+", action="extend", default=[], metavar="FIELD=N", help="sizes, see Config")
    add("--steps", type=count, help=f"of each stage; default {default['steps']}")
    add("--data", type=Path, help="folder of clips with sound to train on, instead of the talker")
    add("--batch", type=count, help=f"clips of the first length in a step; default {default['batch']}")
    add("--seconds", type=float, nargs="+", help=f"of clips, in turn; default {default['seconds']}")
    add("--shard", action="store_true", help="with torchrun: divide the weights among the processes too")
    add("--accumulate", type=count, default=1, help="passes that share a step's clips, for a small device")
    add("--lr", type=number(float, 1e-12, 1), help=f"learning rate; default {default['lr']}")
    add("--history", choices=("real", "few"), default="few", help="stage 3: self-made (default), or real")
    add("--flow", type=weight, default=0.3, help="stage 3: weight of flow matching; default %(default)s")
    add("--shortcut", type=weight, default=2 / 3, help="stage 3: weight of ShortCut; default 2/3")
    add("--dmd", type=weight, default=1 / 3, help="stage 3: weight of DMD; default 1/3")
    add("--guidance", type=weight, default=1.0, help="stage 3: in the targets of the few-step mode; paper: 5")
    add("--teacher", type=Path, help="stage 3: a frozen checkpoint, DMD's real score")
    add("--whole", action="store_true", help="a chunk as long as the clip: trains a bidirectional teacher")
    add("--benchmark", action="store_true", help="measure speed instead, beside the machine's limit")
    add("--reproduce", action="store_true", help="train and score all arms of the paper's claims from --init")
    add("--tables", type=Path, metavar="JSON", help="print the results of --reproduce as Markdown")
    add("--json", action="store_true", help="print the benchmark as one JSON object")
    add("--seed", type=number(int, 0, 999999), default=0, help="of all chance; default 0")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--precision", choices=PRECISIONS, help="of matrix products; default: what is faster here")
    add("--workers", type=number(int, 0, 1000), help="processes that draw films ahead; default: on a GPU one "
        "for each other core, 16 at most, else none")
    add("--log-every", type=count, default=20, metavar="STEPS", help="between lines of log.jsonl; default 20")
    add("--save", type=count, default=250, metavar="STEPS", help="between checkpoints; default 250")
    add("--out", type=Path, default=Path("runs/talker"), help="folder of all it makes; default %(default)s")
    return parser


def sizes_of(args) -> Config:
    """The sizes of a new model."""
    numbers = {name: type(x) for name, x in dataclasses.asdict(Config()).items() if name != "characters"}
    pairs = [text.partition("=")[::2] for text in args.config]
    try:
        cfg = Config(**{name: numbers[name](value) for name, value in pairs})
    except KeyError as error:
        raise TrainingError(f"--config: no field {error}; there are {', '.join(numbers)}") from None
    except ValueError as error:
        raise TrainingError(f"--config: {error}") from None
    if cfg.step_sounds != 2 * cfg.step_frames or cfg.symbols != Config.symbols:
        raise TrainingError("--config: the talker needs step_sounds = 2 step_frames, and its 27 symbols")
    return cfg


OWN = ("width", "layers", "heads", "window")               # sizes that a network's films do not show


def alike(one: Config, other: Config) -> bool:
    """Whether networks of these sizes make films of one kind, from the same controls."""
    return dataclasses.replace(one, **{name: getattr(other, name) for name in OWN}) == other


def check(args, cfg: Config) -> None:
    """Check the arguments against a model's sizes; settle the precision; load the teacher."""
    if args.shard and not dist.is_initialized():
        raise TrainingError("--shard: is for several processes, started by torchrun")
    if args.whole and args.stage in ("mutual", "all"):
        raise TrainingError("--whole: is for a teacher's stages, video, audio and joint")
    parts, terms = args.accumulate * process()[1], sum(getattr(args, name) > 0 for name in OBJECTIVES)
    if not terms:
        raise TrainingError("--flow, --shortcut and --dmd: one of them must weigh more than 0")
    for stage in stages_of(args.stage):
        plan, mutual = plan_of(args, stage), stage == "mutual"
        least = cfg.chunk_seconds * (3 if mutual else 2)   # to roll out history
        if not all(least <= seconds <= cfg.clock / 2 for seconds in plan.seconds):
            raise TrainingError(f"--seconds must be between {least} and {cfg.clock / 2}")
        counts, rows = [*map(plan.clips, plan.seconds)], parts * (terms if mutual else 1)
        if parts > 1 and any(n % rows for n in counts):
            raise TrainingError(
                f"--batch: {', '.join(map(str, counts))} clips a step of {stage} must each be a multiple of "
                f"{rows}, for {parts} parts and an equal share of each objective")
    if not args.precision:                                 # one for all processes
        args.precision = "bf16" if anyone(faster_precision(args.device) == "bf16", args.device) else "fp32"
    if args.workers is None:
        spare = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1       # torchrun's
        args.workers = max(0, min(16, spare)) if args.device.startswith("cuda") else 0
    args.clips, args.real, args.real_whole = None, None, False
    if args.teacher:
        args.real, extra = load_checkpoint(args.teacher)
        if not alike(args.real.cfg, cfg):
            raise TrainingError(f"{args.teacher}: only {', '.join(OWN)} may differ from the model's")
        args.real_whole = bool(extra.get("whole"))


def stages_of(stage: str) -> list[str]:
    """The stages asked for."""
    return list(STAGES) if stage == "all" else [stage]


def load_resume(args) -> dict:
    """What --resume goes on from, its sizes as a new network. Raises CheckpointError."""
    content = load_file(args.out / "resume.pt")
    try:
        net, settings = AudioVideoTransformer(Config(**content["config"])), dict(content["settings"])
        if content["stage"] not in stages_of(settings["stage"]):
            raise ValueError
    except (AttributeError, KeyError, TypeError, ValueError):
        raise CheckpointError(f"{args.out / 'resume.pt'}: not what --resume goes on from") from None
    return content | {"net": net, "settings": settings}


def run(args) -> None:
    """What the command line asks for. Raises TrainingError, CheckpointError, OSError, KeyboardInterrupt."""
    if args.tables:
        try:
            print(tables(json.loads(args.tables.read_text())))
        except (AttributeError, KeyError, TypeError, IndexError, ValueError):
            raise TrainingError(f"{args.tables}: not the results of --reproduce") from None
        return
    check_device(args.device)
    torch.manual_seed(args.seed)
    if args.reproduce:
        print(tables(reproduce(args)))
    elif args.benchmark:
        check(args, sizes_of(args))
        result = benchmark(args, sizes_of(args))
        print(json.dumps(result) if args.json else f"{result['machine']}\n\n{markdown(result['rows'])}")
    else:
        train_stages(args)


def train_stages(args) -> None:
    """Train the stages asked for, into the folder args.out. Raises as run() does."""
    content = load_resume(args) if args.resume else None
    if content:
        model, args.precision = content["net"], args.precision or content["settings"].get("precision")
    else:
        model = load_checkpoint(args.init)[0] if args.init else AudioVideoTransformer(sizes_of(args))
    narrowed = content or args.stage == "mutual" or "window=" not in " ".join(args.config)
    asked = dataclasses.replace(sizes_of(args), **{"window": model.cfg.window} if narrowed else {})
    if args.config and model.cfg != asked:
        raise TrainingError("--config: the checkpoint has other sizes, and keeps them")
    check(args, model.cfg)
    args.out.mkdir(parents=True, exist_ok=True)
    halves = (*args.out.glob("*.unfinished"), *args.out.glob(".clips/*.unfinished"))       # of a killed run
    for half in halves if process()[0] == 0 else ():
        half.unlink(missing_ok=True)
    stages = stages_of(args.stage)
    least = max(frames_of(model.cfg, seconds) for stage in stages for seconds in plan_of(args, stage).seconds)
    for rank in range(process()[1] if args.data else 0):               # one process after the other decodes
        if rank == process()[0]:
            args.clips = load_clips(args.data, model.cfg, least, args.out / ".clips")
        anyone(False, args.device)
    args.settings = settings_of(args)
    if content:
        changed = [name for name, value in args.settings.items() if content["settings"].get(name) != value]
        if changed:
            raise TrainingError(f"--resume: this run was started with other {', '.join(changed)}")
        stages = stages[stages.index(content["stage"]):]
    for stage in stages:
        drawer(args.clips, stage)                                      # is there something for each of them?
    size = sum(weight.numel() for weight in model.parameters()) / 1e6
    print(f"{size:.2f} M parameters, {args.settings}", file=sys.stderr)
    if not content and process()[0] == 0 and (old := args.out / "resume.pt").exists():
        old.replace(args.out / "resume-before.pt")                     # another run's: it may be dear
        print(f"{old}, of another run, is now resume-before.pt", file=sys.stderr)
    for stage in stages:
        state = State(model.train().requires_grad_(True), stage, args)
        if content and stage == content["stage"]:
            state.restore(content)
        train_stage(state, args)
        model = load_checkpoint(args.out / f"{stage}.pt")[0]  # the next stage starts from the EMA weights
    hint = "; sample.py --checkpoint shows what it can do" if streams(stages[-1], args.whole) else ""
    print(f"{args.out / stages[-1]}.pt is made{hint}", file=sys.stderr)


def join_processes(args) -> None:
    """Take part in torchrun's group, if it has started this process. The first speaks for all."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        return
    if args.device == "cuda":
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        check_device(args.device)
    dist.init_process_group("gloo" if args.device == "cpu" else "nccl", timeout=timedelta(hours=3))
    atexit.register(dist.destroy_process_group)            # or its threads may abort a process that ends
    if process()[0] > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")


def hush() -> int:
    """Whoever read our words has gone (| head): end without a complaint, as a signal would end us."""
    for file in (sys.__stdout__, sys.__stderr__):
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
    return 128 + signal.SIGPIPE


def main(argv=None) -> int:
    parser = build_parser()
    if parser.parse_args(argv).preset == "tiny":
        parser.set_defaults(**TINY)
    args = parser.parse_args(argv)
    resume = f"--resume --out {args.out} and all else as before"
    aloud = sys.stderr                                     # of this process, whichever it is
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        join_processes(args)
        run(args)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:
        return hush()
    except KeyboardInterrupt:
        again = "the same command" if args.reproduce else resume
        kept = args.reproduce or ("settings" in args or args.resume) and (args.out / "resume.pt").exists()
        print(f"interrupted; go on with {again}" if kept else "interrupted", file=sys.stderr)
        return 130
    except (TrainingError, CheckpointError) as error:
        print(f"train.py: {error}", file=sys.stderr)
    except OSError as error:
        print(f"train.py: {error.filename or args.out}: {error.strerror or error}", file=aloud)
    except (RuntimeError, MemoryError) as error:
        if process()[1] == 1 and isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        said = (str(error) or "out of memory").splitlines()[0]
        print(f"train.py: process {process()[0]}: {said}; if another process has ended, or with more memory, "
              f"go on with {resume}", file=aloud)
    return 2


if __name__ == "__main__":
    sys.exit(main())
