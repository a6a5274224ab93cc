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
from numpy import ndarray
from numpy.random import Generator
from tqdm import tqdm

from data.codecs import Film
from data.controls import ALPHABET
from data.decoding import Clip, ClipError, decode_clip, stream_options
from data.subtitles import read_transcript
from data.talker import talk
from mutual_forcing import Config, UserError

SUBTITLES = (".vtt", ".srt")  # the first is taken if a clip has both
LANGUAGE = re.compile(r"[a-z]{2,3}([-_]\w+)*|forced|default|sdh", re.IGNORECASE)  # clip.en.srt
UNUSED = "not used, "  # how the remark of a file that is not used begins
ORPHAN = "no clip of its name is used"  # of subtitles


def open_cached(files: list[Path]) -> Clip | None:
    """A clip from the cache, mapped into memory; None if it is not there, or damaged."""
    try:
        frames, samples, note = (np.load(file, mmap_mode="r") for file in files)
    except (OSError, ValueError, EOFError):
        return None
    return Clip(frames, samples, str(note))


def decode_once(path: Path, cfg: Config, least: int, cache: Path) -> tuple[Clip, str]:
    """What decode_clip() returns, from the cache, and the name of its files there."""
    status = path.stat()
    identity = (path.resolve(), status.st_size, status.st_mtime_ns, stream_options(cfg), least)
    name = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
    files = [cache / f"{name}.{part}" for part in Clip._fields]
    if open_cached(files) is None:
        for file, content in zip(files, decode_clip(path, cfg, least)):
            unfinished = cache / f"{name}.unfinished"
            with unfinished.open("wb") as stream:
                np.save(stream, np.asarray(content))
            unfinished.replace(file)
    return open_cached(files), name


def load_symbols(text: Path | None, cfg: Config, frames: int) -> tuple[ndarray, str]:
    """Symbols (margin + F + margin,) of a clip by its subtitles, and what of them is not used."""
    symbols, remark = np.full(frames, cfg.unknown), ""
    if text is not None:
        try:
            symbols, remark = read_transcript(text, cfg, frames)
        except OSError as error:
            remark = f"{error.strerror}"
        if not (symbols < cfg.silence).any():
            remark = f"{UNUSED}{remark}"
    ends = [cfg.unknown if end == cfg.unknown else cfg.silence for end in symbols[[0, -1]]]
    return np.pad(symbols, cfg.margin, constant_values=ends), remark


def why_unfit(path: Path) -> str:
    """Why a file is not even tried as a clip; empty if it is."""
    if path.name.startswith("."):
        return "hidden"
    if path.suffix.lower() in SUBTITLES:
        return ORPHAN
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        return f"{error.strerror}"
    has_control = re.search(rb"[\0-\x08\x0e-\x1f]", head)  # every film has some
    return "" if has_control else "a text, or empty"


def list_files(folder: Path) -> dict[Path, str]:
    """The files of a folder and its subfolders, each with a remark if it is not to be tried.

    Hidden folders are left out, and so are links to folders.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        parents = path.relative_to(folder).parts[:-1]
        if path.is_file() and not any(part.startswith(".") for part in parents):
            reason = why_unfit(path)
            files[path] = UNUSED + reason if reason else ""
    return files


def match_subtitles(paths: list[Path], texts: list[Path]) -> dict[Path, list[Path]]:
    """The subtitles of each clip, the best first: clip.vtt, clip.srt, then such as clip.en.srt."""
    owners, found = defaultdict(list), defaultdict(list)
    for path in paths:
        for name in {path, path.with_suffix("")}:
            owners[name].append(path)
    for text in texts:
        name, tags = text.stem, 0
        while text.parent / name not in owners:
            name, dot, tag = name.rpartition(".")
            if not (dot and LANGUAGE.fullmatch(tag)):
                break
            tags += 1
        for path in owners.get(text.parent / name, []):
            found[path].append((tags, SUBTITLES.index(text.suffix.lower()), text))
    return {path: [text for *_, text in sorted(ranked)] for path, ranked in found.items()}


def summarise(folder: Path, clips: dict[Path, Film], remarks: dict[Path, str], cfg: Config) -> None:
    """Say on stderr what a folder holds, and of each file that is not used, or not whole, why."""
    wordless = [path for path, clip in clips.items() if not (clip.symbols < cfg.silence).any()]
    mute = [path for path, clip in clips.items() if not len(clip.samples)]
    unused = [path for path, remark in remarks.items() if remark.startswith(UNUSED)]
    counts = f"{len(clips) - len(wordless)} clips with words, {len(wordless)} without words"
    print(f"{folder}: {counts}, {len(unused)} files not used", file=sys.stderr)
    groups = {
        "without words": wordless if len(wordless) < len(clips) else [],
        "without sound, for stage codec alone": mute,
    }
    for name, paths in groups.items():
        if paths:
            names = ", ".join(str(path.relative_to(folder)) for path in paths)
            print(f"  {name}: {names}", file=sys.stderr)
    for path, remark in remarks.items():
        if remark:
            print(f"  {path.relative_to(folder)}: {remark}", file=sys.stderr)


def load_clips(folder: Path, cfg: Config, least: int, cache: Path) -> list[Film]:
    """The films of a folder and its subfolders that last at least so many frames.

    Each file is decoded once, into the folder cache, from which all other files are
    removed. A summary on stderr says what is used, and what is not and why. Raises
    UserError without a folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of clips")
    if cfg.symbols != len(ALPHABET):
        raise UserError(f"subtitles have {len(ALPHABET)} symbols, the model has {cfg.symbols}")
    cache.mkdir(exist_ok=True)
    remarks = list_files(folder)
    paths = [path for path, remark in remarks.items() if not remark]
    texts = [path for path, remark in remarks.items() if remark == UNUSED + ORPHAN]
    subtitles = match_subtitles(paths, texts)
    clips, cached = {}, {"lock"}
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # processes that train together take turns
        for path in tqdm(paths, desc="clips", disable=None):
            text, *others = subtitles.get(path, [None])
            try:
                clip, name = decode_once(path, cfg, least, cache)
            except ClipError as error:
                remarks[path] = f"{UNUSED}{error}"
                continue
            cached.add(name)
            symbols, refused = load_symbols(text, cfg, len(clip.frames))
            clips[path] = Film(clip.frames, clip.samples, symbols, len(cfg.characters))
            remarks[path] = clip.note
            if text:
                remarks[text] = refused
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
            if isinstance(part, np.memmap):  # mapped for a moment, it takes no memory afterwards
                part = np.load(part.filename, mmap_mode="r")
            checksum.update(repr(part.shape).encode())
            checksum.update(part.ravel())
    return checksum.hexdigest()


def draw_stretch(clips: list[Film], cfg: Config, rng: Generator, frames: int) -> Film:
    """A random stretch of a random clip as a film; a missing sound becomes silence."""
    clip = clips[rng.integers(len(clips))]
    whole = len(clip.symbols) - 2 * cfg.margin  # frames of the clip
    begin = int(rng.integers(whole - frames + 1))
    end = begin + frames
    per_frame = cfg.sample_rate // cfg.fps
    samples = np.array(clip.samples[begin * per_frame : end * per_frame])
    samples = np.pad(samples, (0, frames * per_frame - len(samples)))
    return Film(
        np.array(clip.frames[begin:end]),
        samples,
        clip.symbols[begin : end + 2 * cfg.margin],
        clip.character,
    )


def drawer(clips: list[Film] | None, stage: str):
    """What draws a stage's films, called like talk(). UserError if no clip has what it needs."""
    if clips is None:
        return talk
    if stage != "codec":
        clips = [clip for clip in clips if len(clip.samples)]
    if not clips:
        raise UserError(f"--data: no clip has what stage {stage} needs")
    return functools.partial(draw_stretch, clips)
