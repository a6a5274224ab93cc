"""A folder of clips: films, with the words of the subtitles beside them.

Each file is decoded once (see data/decoding.py), into a cache that is mapped into memory. What has
words, and what is not used and why, is said on stderr.
"""

import fcntl
import functools
import hashlib
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from numpy.random import Generator
from tqdm import tqdm

from data.codecs import Film
from data.controls import ALPHABET
from data.decoding import Clip, ClipError, decode_clip, stream_options
from data.subtitles import read_transcript
from data.talker import talk
from mutual_forcing import Config, UserError

SUBTITLES = (".vtt", ".srt")  # the first is taken if a clip has both
UNUSED = "not used, "  # how the remark of a file that is not used begins


def decode_once(path: Path, cfg: Config, least: int, cache: Path) -> tuple[Clip, str]:
    """What decode_clip() returns, mapped from the cache, and how its files there begin."""
    status = path.stat()
    identity = (path.resolve(), status.st_size, status.st_mtime_ns, stream_options(cfg), least)
    name = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
    files = [cache / f"{name}.{part}.npy" for part in Clip._fields]

    def open_files() -> Clip:
        frames, samples, note = [np.load(file, mmap_mode="r") for file in files]
        return Clip(frames, samples, str(note))

    try:
        clip = open_files()
    except (OSError, ValueError, EOFError):  # not there, or cut off
        for file, content in zip(files, decode_clip(path, cfg, least)):
            np.save(file, content)
        clip = open_files()
    return clip, name


def is_text(path: Path) -> bool:
    """Whether a file is a text, or empty: all others have control characters at their start."""
    with path.open("rb") as file:
        return not re.search(rb"[\0-\x08\x0e-\x1f]", file.read(4096))


def list_files(folder: Path) -> tuple[list[Path], list[Path], dict[Path, str]]:
    """What lies in a folder: files to try as clips, subtitles, and remarks on what is not used.

    Subfolders are searched, but neither hidden ones nor links to folders.
    """
    paths, texts, remarks = [], [], {}
    for path in sorted(folder.rglob("*")):
        *parents, name = path.relative_to(folder).parts
        if path.is_dir() or any(parent.startswith(".") for parent in parents):
            continue
        if not path.is_file():
            remarks[path] = f"{UNUSED}a link to nothing, or no file"
        elif name.startswith("."):
            remarks[path] = f"{UNUSED}hidden"
        elif path.suffix.lower() in SUBTITLES:
            texts.append(path)
            remarks[path] = f"{UNUSED}no clip of its name is used"  # until one is
        elif is_text(path):
            remarks[path] = f"{UNUSED}a text, or empty"
        else:
            paths.append(path)
    return paths, texts, remarks


def match_subtitles(paths: list[Path], texts: list[Path]) -> dict[Path, list[Path]]:
    """The subtitles of each clip, the best first: clip.vtt, clip.srt, then such as clip.en.srt."""
    owners, found = defaultdict(list), defaultdict(list)
    for path in paths:
        for name in {path, path.with_suffix("")}:
            owners[name].append(path)
    for text in texts:
        name = text.with_suffix("")
        while name not in owners and name.suffix:
            name = name.with_suffix("")
        for path in owners.get(name, []):
            found[path].append(text)
    for ranked in found.values():
        ranked.sort(key=lambda text: (len(text.stem), SUBTITLES.index(text.suffix.lower())))
    return found


def load_symbols(text: Path | None, cfg: Config, frames: int) -> tuple[np.ndarray, str]:
    """Symbols (margin + F + margin,) of a clip by its subtitles, and what of them is not used."""
    symbols, remark = np.full(frames, cfg.unknown), ""
    if text:
        symbols, remark = read_transcript(text, cfg, frames)
        if not (symbols < cfg.silence).any():
            remark = f"{UNUSED}{remark}"
    # Before and after the clip nothing is said; beside an unknown frame, what is said is unknown.
    ends = np.maximum(symbols[[0, -1]], cfg.silence)
    return np.pad(symbols, cfg.margin, constant_values=ends), remark


def summarise(folder: Path, clips: dict[Path, Film], remarks: dict[Path, str], cfg: Config) -> None:
    """Say on stderr what a folder holds, and of each file that is not used, or not whole, why."""
    wordless = [path for path, clip in clips.items() if not (clip.symbols < cfg.silence).any()]
    mute = [path for path, clip in clips.items() if not len(clip.samples)]
    unused = sum(remark.startswith(UNUSED) for remark in remarks.values())
    counts = f"{len(clips) - len(wordless)} clips with words, {len(wordless)} without words"
    print(f"{folder}: {counts}, {unused} files not used", file=sys.stderr)
    if len(wordless) == len(clips):
        wordless = []  # that has been said
    for name, paths in (("words", wordless), ("sound, for stage codec alone", mute)):
        if paths:
            names = ", ".join(str(path.relative_to(folder)) for path in paths)
            print(f"  without {name}: {names}", file=sys.stderr)
    for path, remark in sorted(remarks.items()):
        if remark:
            print(f"  {path.relative_to(folder)}: {remark}", file=sys.stderr)


def load_clips(folder: Path, cfg: Config, least: int, cache: Path) -> list[Film]:
    """The films of a folder and its subfolders that last at least so many frames.

    Each file is decoded once, into the folder cache, from which all other files are removed. A
    summary on stderr says what is used, and what is not and why. Raises UserError without a folder,
    OSError for a file that cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of clips")
    if cfg.symbols != len(ALPHABET):
        raise UserError(f"subtitles have {len(ALPHABET)} symbols, the model has {cfg.symbols}")
    cache.mkdir(exist_ok=True)
    paths, texts, remarks = list_files(folder)
    subtitles = match_subtitles(paths, texts)
    clips, cached = {}, {"lock"}
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # processes that train together take turns
        for path in tqdm(paths, desc="clips", disable=None):
            try:
                clip, name = decode_once(path, cfg, least, cache)
            except ClipError as error:
                remarks[path] = f"{UNUSED}{error}"
                continue
            cached.add(name)
            remarks[path] = clip.note
            text, *others = subtitles.get(path, [None])
            symbols, remark = load_symbols(text, cfg, len(clip.frames))
            clips[path] = Film(clip.frames, clip.samples, symbols, len(cfg.characters))
            if text:
                remarks[text] = remark
            for other in others:
                remarks[other] = f"{UNUSED}{path.name} has {text.name}"
        for file in cache.iterdir():
            if file.name.partition(".")[0] not in cached:
                file.unlink()
    summarise(folder, clips, remarks, cfg)
    return list(clips.values())


def fingerprint(clips: list[Film]) -> str:
    """A checksum that tells one set of clips from another: a run is resumed only with its own."""
    checksum = hashlib.sha256()
    for clip in clips:
        for part in (clip.frames, clip.samples, clip.symbols):
            checksum.update(repr(part.shape).encode())
            checksum.update(part.ravel())
    return checksum.hexdigest()


def draw_stretch(clips: list[Film], cfg: Config, rng: Generator, frames: int) -> Film:
    """A random stretch of a random clip as a film; a missing sound becomes silence."""
    clip = clips[rng.integers(len(clips))]
    begin = int(rng.integers(len(clip.frames) - frames + 1))
    end, per_frame = begin + frames, cfg.sample_rate // cfg.fps
    samples = clip.samples[begin * per_frame : end * per_frame]
    samples = np.pad(samples, (0, frames * per_frame - len(samples)))
    symbols = clip.symbols[begin : end + 2 * cfg.margin]
    return Film(clip.frames[begin:end], samples, symbols, clip.character)


def drawer(clips: list[Film] | None, stage: str):
    """What draws a stage's films, called like talk(). UserError if no clip has what it needs."""
    if clips is None:
        return talk
    if stage != "codec":
        clips = [clip for clip in clips if len(clip.samples)]
    if not clips:
        raise UserError(f"--data: no clip has what stage {stage} needs")
    return functools.partial(draw_stretch, clips)
