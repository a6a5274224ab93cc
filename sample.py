"""Make a film with a checkpoint, or score checkpoints with the ruler. `python sample.py` writes sample.mp4;
`python sample.py --evaluate assets/talker.pt` prints a table. The method is in mutual_forcing.py."""
import signal
if __name__ in ("__main__", "__mp_main__"):                # the latter: see apart() in train.py
    signal.signal(signal.SIGINT, signal.SIG_DFL)           # Ctrl-C while PyTorch loads: no traceback

import argparse
import copy
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import deque
from contextlib import closing, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import soundfile
import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten
from tqdm import tqdm

import train
from mutual_forcing import (ALPHABET, SILENCE, AudioVideoTransformer, CheckpointError, Config, denoise,
                            film_controls, generate, load_checkpoint, spell, split, stream, time_grid)

SHIPPED = Path(__file__).parent / "assets" / "talker.pt"


def load_talker(path: Path) -> AudioVideoTransformer:
    """The model of a checkpoint that makes films. Raises CheckpointError for any other."""
    model, extra = load_checkpoint(path)
    if not train.streams(extra.get("stage"), extra.get("whole")):
        raise CheckpointError(f"{path}: a teacher's, or of stage 1, which cannot stream a film")
    return model


# ---- The ruler: what can be measured of a talker's film. It knows the world, not the model. ----------------

WINDOWS = ((0, 5), (5, 15), (15, 25))  # seconds; drifts are from the first one (voice: 16 voiced frames)
HELD_OUT = 2 ** 40                                         # first word of the seeds that training never draws
TALKERS_ONLY = ("transcript_error", "lip", "sync", "sync_lag_ms", "voice_drift", "letter_margin",
                "letter_spread")                           # figures that mean nothing for real clips


class Heard(NamedTuple):
    """What the recogniser makes of a sound, per frame or interval: each array (...,)."""
    letter: np.ndarray     # index into ALPHABET
    pitch: np.ndarray      # in multiples of sample_rate / hop; 0 where the best letter has no voice
    margin: np.ndarray     # how much better the best letter fits than the next, in cosine


class Ruler:
    """Reads letters from sound and mouths from pixels, by fixed templates and boxes."""

    def __init__(self, cfg: Config):
        if cfg.fps % 2 or cfg.hop <= 240:                  # half seconds, and 30 bands of eight lines
            raise ValueError("the ruler needs an even fps, and more than 240 samples a hop")
        self.cfg = cfg
        rng, rows = np.random.default_rng(0), []
        someone = train.draw_identity(rng)._replace(tilt=0.5)
        for width in (0.1, 0.3, 0.5, 0.7, 0.9):            # one face for each pitch
            who = someone._replace(face_width=width)
            for letter in range(SILENCE):
                energy = self.energies(train.voice(rng, who, np.full(16, letter), cfg))[4:-4].mean(0)
                voiced = train.LETTER_TABLE[ALPHABET[letter]][4] > 0
                rows.append((train.pitch_of(who) * voiced, energy))
        self.pitches, energy = map(np.stack, zip(*rows))
        self.templates = self.shape(energy)
        self.quiet = 0.3 * min(row.sum() for row in energy)            # less energy than this is silence

    def energies(self, samples: np.ndarray) -> np.ndarray:
        """Samples (..., n hop) -> energy by 8 lines (128 Hz) around borders of hops (..., n - 1, bands)."""
        hop = self.cfg.hop
        hops = samples.reshape(*samples.shape[:-1], -1, hop)
        frames = np.concatenate([hops[..., :-1, :], hops[..., 1:, :]], -1) * np.hanning(2 * hop)
        power = np.abs(np.fft.rfft(frames)[..., :-2] / hop) ** 2
        return power[..., :power.shape[-1] // 8 * 8].reshape(*power.shape[:-1], -1, 8).sum(-1)

    def shape(self, energy: np.ndarray) -> np.ndarray:
        """Energies (..., bands) -> unit vectors (..., bands) of loudness by band."""
        loud = energy ** 0.25
        return loud / (np.linalg.norm(loud, axis=-1, keepdims=True) + 1e-9)

    def hear(self, energy: np.ndarray) -> Heard:
        """Energies (..., bands) -> the letter whose template fits best, at any pitch, or silence."""
        fit, loud = self.shape(energy) @ self.templates.T, energy.sum(-1) > self.quiet      # (..., templates)
        by_letter = fit.reshape(*fit.shape[:-1], -1, SILENCE).max(-2)
        top = np.sort(by_letter, -1)
        letter = np.where(loud, by_letter.argmax(-1), SILENCE)
        return Heard(letter, np.where(loud, self.pitches[fit.argmax(-1)], 0), top[..., -1] - top[..., -2])

    def per_frame(self, samples: np.ndarray) -> np.ndarray:
        """Samples (n, N) -> energies around the middle of each frame (n, F, bands)."""
        return self.energies(samples)[:, ::2]              # two hops a frame, border 2 f lies amid frame f

    def mouths(self, frames: np.ndarray) -> np.ndarray:
        """Frames (n, F, h, w, 3) -> how high the dark of the mouth is, in 1/64 of the picture (n, F)."""
        unit = frames.shape[2] / 64
        red = frames[:, :, int(34 * unit):int(48 * unit), int(26 * unit):int(38 * unit), 0]
        dark = np.clip((0.5 - red / np.float32(255)) / 0.25, 0, 1)
        return np.sort(dark, -1)[..., -3:].mean(-1).sum(-1) / unit

    def colours(self, frames: np.ndarray) -> np.ndarray:
        """Frames (n, F, h, w, 3) -> mean colours of background, clothes, cheeks and hair, and the face's
        width, a second (n, F / fps, 13), all in 0..1."""
        n, unit = len(frames), frames.shape[2] / 64
        seconds = frames[:, :frames.shape[1] // self.cfg.fps * self.cfg.fps]
        seconds = seconds.reshape(n, -1, self.cfg.fps, *frames.shape[2:])

        def box(top, bottom, left, right):
            rows, columns = (slice(int(a * unit), int(b * unit)) for a, b in ((top, bottom), (left, right)))
            return seconds[:, :, :, rows, columns].astype(np.float32) / 255

        means = [np.concatenate([box(*b) for b in boxes], -2).mean((2, 3, 4)) for boxes in (
            [(2, 40, 0, 6), (2, 40, 58, 64)], [(60, 64, 22, 42)], [(33, 36, 24, 28), (33, 36, 36, 40)],
            [(9, 13, 27, 37)])]
        skin = np.abs(box(33, 36, 0, 64) - means[2][:, :, None, None, None]).max(-1) < 0.12
        return np.concatenate([*means, skin.mean((2, 3, 4))[..., None]], -1)

    def video_features(self, frames: np.ndarray) -> np.ndarray:
        """Frames (n, F, h, w, 3) -> (n, half seconds, features): colour, contrast by place, edges, motion."""
        n, half = len(frames), self.cfg.fps // 2
        x = frames[:, :frames.shape[1] // half * half].reshape(-1, half, *frames.shape[2:]) / np.float32(255)
        grey, p = x.mean(-1), self.cfg.patch
        cells = grey.reshape(*grey.shape[:2], grey.shape[2] // p, p, -1, p)
        down, across, change = (np.abs(np.diff(grey, axis=axis)) for axis in (2, 3, 1))
        edges = (down, across, down[:, :, p - 1::p], across[:, :, :, p - 1::p])
        parts = [x.mean((1, 2, 3)), cells.std((3, 5)).mean(1).reshape(len(x), -1),
                 np.stack([edge.mean((1, 2, 3)) for edge in edges], 1),
                 change.reshape(len(x), half - 1, 4, -1).mean((1, 3))]
        return np.concatenate(parts, -1).reshape(n, frames.shape[1] // half, -1)

    def audio_features(self, samples: np.ndarray) -> np.ndarray:
        """Samples (n, N) -> (n, half seconds, 30): loudness of 15 bands in dB, its mean and its spread."""
        energy = self.per_frame(samples)
        n, half = len(energy), self.cfg.fps // 2
        bands = energy[..., :30].reshape(*energy.shape[:2], 15, 2).sum(-1)
        level = 10 * np.log10(bands + 1e-7)[:, :energy.shape[1] // half * half].reshape(n, -1, half, 15)
        return np.concatenate([level.mean(2), level.std(2)], -1)


def frechet(a: np.ndarray, b: np.ndarray, spread: np.ndarray) -> float:
    """Frechet distance of two sets of features (n, k), each feature in units of its spread, per feature."""
    a, b = (x.reshape(-1, x.shape[-1]) / spread for x in (a, b))
    ca, cb = (np.cov(x.T) for x in (a, b))
    root = np.sqrt(np.maximum(np.linalg.eigvals(ca @ cb).real, 0)).sum()
    apart = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return float((apart + np.trace(ca) + np.trace(cb) - 2 * root) / a.shape[-1])


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over films of the correlation of two curves (n, F); 0 for a film where either stands still."""
    a, b = (x - x.mean(1, keepdims=True) for x in (a, b))
    size = np.sqrt((a ** 2).sum(1) * (b ** 2).sum(1))
    return float(np.where(size > 1e-9, (a * b).sum(1) / np.maximum(size, 1e-9), 0).mean())


def lag_ms(seen: np.ndarray, heard: np.ndarray, fps: int) -> float:
    """By how many ms the sound comes after the picture, where curves (n, F) agree most (by a parabola)."""
    f, reach = seen.shape[1], 5
    score = [correlation(seen[:, max(0, -lag):f - max(0, lag)], heard[:, max(0, lag):f - max(0, -lag)])
             for lag in range(-reach, reach + 1)]
    i = min(max(int(np.argmax(score)), 1), 2 * reach - 1)
    bend = score[i - 1] - 2 * score[i] + score[i + 1]
    return 1000 / fps * (i - reach + (0.5 * (score[i - 1] - score[i + 1]) / bend if bend < 0 else 0))


def windows_of(seconds: float) -> list[tuple]:
    """The windows in a film of this length; of long films the last ten seconds too."""
    last = [(int(seconds) - 10, int(seconds))] if seconds >= WINDOWS[-1][1] + 10 else []
    return [window for window in WINDOWS if window[1] <= seconds] + last


def openings(letters: np.ndarray) -> np.ndarray:
    """Letters (n, F) -> how far the mouth that says them opens (n, F)."""
    return np.stack([train.mouth_of(film)[:, 0] for film in letters])


def letters_read(ruler: Ruler, samples: np.ndarray, symbols: np.ndarray, begin: int, end: int) -> float:
    """Share of the letters that lie in frames begin to end and are misread in their own interval."""
    wrong = count = 0
    energy = ruler.energies(samples)
    for film, said in zip(energy, symbols):
        borders = np.flatnonzero(np.diff(said)) + 1
        for a, b in zip(borders[:-1], borders[1:]):
            if said[a] != SILENCE and begin <= a and b <= end:
                count += 1
                wrong += ruler.hear(film[2 * a:2 * b - 1].mean(0)).letter != said[a]
    return wrong / max(1, count)


def score(ruler: Ruler, films: train.Film, reference: train.Film) -> dict[str, list]:
    """All figures of the ruler, a number a window; None where it does not apply."""
    cfg, fps = ruler.cfg, ruler.cfg.fps
    mouths, heard = ruler.mouths(films.frames), ruler.hear(ruler.per_frame(films.samples))
    implied, colours = openings(heard.letter), ruler.colours(films.frames)
    spoken = None if films.symbols is None else openings(films.symbols)
    voices = np.array([np.bincount(p[p > 0][:fps], minlength=9).argmax() for p in heard.pitch])
    features = {"frechet_video": [ruler.video_features(x.frames) for x in (films, reference)],
                "frechet_audio": [ruler.audio_features(x.samples) for x in (films, reference)]}
    figures = {}

    def put(name, value):
        figures.setdefault(name, []).append(None if value is None else round(float(value), 4))

    for begin, end in windows_of(mouths.shape[1] / fps):
        window = slice(max(begin, 1) * fps, end * fps)     # the first second is not scored
        seen, sounds, loud = mouths[:, window], implied[:, window], heard.letter[:, window] != SILENCE
        put("transcript_error", None if spoken is None else
            letters_read(ruler, films.samples, films.symbols, window.start, window.stop))
        put("lip", None if spoken is None else correlation(seen, spoken[:, window]))
        put("sync", correlation(seen, sounds))
        put("sync_lag_ms", lag_ms(seen, sounds, fps))
        put("identity_drift", np.abs(colours[:, max(begin, 1):end] - colours[:, :1]).mean())
        pitch = heard.pitch[:, window]
        put("voice_drift", (pitch != voices[:, None])[pitch > 0].mean() if (pitch > 0).any() else None)
        put("motion", np.abs(np.diff(films.frames[:, window].astype(np.int16), axis=1)).mean() / 255)
        power = (films.samples[:, window.start * 2 * cfg.hop:window.stop * 2 * cfg.hop] ** 2).mean(1)
        put("loudness_db", (10 * np.log10(power + 1e-10)).mean())
        put("letter_margin", heard.margin[:, window][loud].mean() if loud.any() else None)
        share = np.bincount(heard.letter[:, window][loud], minlength=27) / max(1, loud.sum())
        put("letter_spread", np.exp(-(share[share > 0] * np.log(share[share > 0])).sum()))
        for name, (own, other) in features.items():
            segments = slice(2 * max(begin, 1), 2 * end)
            put(name, frechet(own[:, segments], other[:, segments], other.std((0, 1)) + 1e-6))
    return figures


def held_out(cfg: Config, count: int, seconds: float, kind: int = 0, draw=train.talk) -> list[train.Film]:
    """Talkers from seeds that training never sees; kind 0 to score, 1 as the distances' reference."""
    return [draw(cfg, np.random.default_rng([HELD_OUT, kind, i]), train.frames_of(cfg, seconds))
            for i in range(count)]


def to_films(films: list[train.Film], cfg: Config) -> train.Film:
    """Films as the ruler takes them: stacked, their symbols (n, F) without the margins."""
    films = train.Film(*map(np.stack, zip(*films)))
    return films._replace(symbols=films.symbols[:, cfg.margin:-cfg.margin])


@torch.inference_mode()
def remake(model, films: list[train.Film], *, few: bool, steps: int, guidance: float, babble: bool,
           window: int | None = None, seed: int = 0) -> train.Film:
    """Let a model make the films anew from their controls; every second one is given the first frame too."""
    cfg, made, batch = model.cfg, [], 16
    _, controls = train.encode_films(cfg, train.stack(films))
    symbols = torch.full_like(controls.symbols, cfg.symbols) if babble else controls.symbols
    controls = controls._replace(symbols=symbols, has_first=torch.arange(len(films)) % 2 == 0)
    chunks = len(films[0].frames) // cfg.chunk_frames
    label = f"{'few' if few else 'multi'} {steps}, {'babbling' if babble else 'spoken'}"
    bar = tqdm(total=-(-len(films) // batch) * chunks, desc=label, disable=None, leave=False)
    for start in range(0, len(films), batch):
        some = controls.each(lambda c: c[start:start + batch].to(model.no_first.device))
        generator = torch.Generator().manual_seed(seed + start)
        frames, tokens, last, (video_codec, audio_codec) = [], [], None, model.codecs()
        for states in generate(model, some, chunks, time_grid(cfg, steps), few=few, guidance=guidance,
                               window=window, generator=generator):
            video, audio = split(cfg, states[-1])
            picture, last = video_codec.decode_next(video, last)
            frames.append(picture.cpu())
            tokens.append(audio.clone())                   # of a view, the picture's would stay too
            bar.update()
        made.append((torch.cat(frames, 1).numpy(), audio_codec.decode(torch.cat(tokens, 1)).cpu().numpy()))
    frames, samples = map(np.concatenate, zip(*made))
    return to_films(films, cfg)._replace(frames=frames, samples=samples)


def evaluate(args) -> dict:
    """Score checkpoints in both modes, spoken and babbling, beside ground truth and shuffled sound."""
    models = [(str(path), for_sampling(load_talker(path), args.device, args.precision or "fp32"))
              for path in args.evaluate]
    cfg = models[0][1].cfg
    if not all(train.alike(model.cfg, cfg) for _, model in models):
        raise ValueError(f"--evaluate: of checkpoints scored together only {', '.join(train.OWN)} may differ")
    ruler, draw = Ruler(cfg), train.talk
    if args.data:
        least, cache = train.frames_of(cfg, args.seconds), args.evaluate[0].parent / ".clips"
        draw = train.drawer(train.load_clips(args.data, cfg, least, cache), "joint")
    talkers, others = (held_out(cfg, args.talkers, args.seconds, kind, draw) for kind in (0, 1))
    truth, reference = to_films(talkers, cfg), to_films(others, cfg)
    if not windows_of(truth.frames.shape[1] / cfg.fps):
        raise ValueError(f"--seconds {args.seconds:g}: less than a window, in whole chunks of the checkpoint")
    asked = {"few": args.steps or 4, "multi": args.steps if args.steps and args.mode == "multi" else 50}
    settings = [(mode, steps) for mode, steps in asked.items() if args.mode in (None, mode)]
    rows = []

    def add(films, control, checkpoint, mode=None, steps=None, guidance=None):
        films = films._replace(symbols=films.symbols if control == "spoken" and not args.data else None)
        figures = score(ruler, films, reference)
        figures |= {name: [None] * len(figures[name]) for name in TALKERS_ONLY if args.data}
        rows.append({"checkpoint": checkpoint, "mode": mode, "steps": steps, "guidance": guidance,
                     "control": control, **figures})
        print(train.markdown(rows).splitlines()[-1], file=sys.stderr, flush=True)

    for control in ("spoken", "babbling"):
        add(truth, control, "ground truth")
        add(truth._replace(samples=np.roll(truth.samples, 1, 0)), control, "shuffled sound")
        for name, model in models:
            for mode, steps in settings:
                films = remake(model, talkers, few=mode == "few", steps=steps, guidance=args.guidance,
                               babble=control == "babbling", window=args.window, seed=args.seed)
                add(films, control, name, mode, steps, args.guidance)
    return {"windows": windows_of(truth.frames.shape[1] / cfg.fps), "rows": rows}


# ---- Writing films: into a folder beside the result, chunk by chunk, and renamed when whole. ---------------

ENDINGS = (".mp4", ".gif", ".wav", ".png")
ENLARGE = 4  # by nearest neighbour: small pixels do not survive H.264
STILL = 4    # frames between those that a filmstrip shows


class FilmWriter:
    """Takes chunks of frames and samples; finish() puts the film in its place, however it ended."""

    def __init__(self, out: Path, cfg: Config):
        self.out, self.cfg, self.kind = out, cfg, out.suffix.lower()
        self.folder = tempfile.TemporaryDirectory(prefix=".film-", dir=out.parent)
        self.path, self.frames = Path(self.folder.name).resolve(), 0   # a relative a:b would be a URL
        self.stills = []                                   # frames: numbered, with sound, for the filmstrip
        self.sound = self.video = None
        if self.kind in (".mp4", ".wav"):
            self.sound = soundfile.SoundFile(self.path / "sound.wav", "w", cfg.sample_rate, 1, "PCM_16")
        if self.kind == ".mp4":
            enlarge = ["-vf", f"scale=iw*{ENLARGE}:ih*{ENLARGE}:flags=neighbor"]
            self.video = imageio_ffmpeg.write_frames(
                str(self.path / "video.mp4"), (cfg.image, cfg.image), fps=cfg.fps, codec="libx264",
                quality=None, macro_block_size=2, ffmpeg_log_level="error", output_params=[
                    *enlarge, "-crf", "18", "-preset", "ultrafast", "-threads", "1"])      # few: the model's
            self.video.send(None)

    def add(self, frames: np.ndarray, samples: np.ndarray) -> None:
        """Frames (F, h, w, 3) uint8 and samples (N,) float32."""
        self.frames += len(frames)
        if self.sound:
            self.sound.write(np.clip(samples, -1, 1))
        if self.kind == ".png":
            starts = range(self.frames - len(frames), self.frames, STILL)
            self.stills += zip(starts, frames[::STILL], np.array_split(samples, len(starts)))
        elif self.kind == ".mp4":
            self.video.send(np.ascontiguousarray(frames))
        elif self.kind == ".gif":
            self.stills += list(frames)

    def finish(self, transcript: str = "") -> None:
        """Close everything and put the result in its place, at once. Raises OSError if that fails."""
        for part in filter(None, (self.sound, self.video)):
            part.close()
        result = self.path / ("sound.wav" if self.kind == ".wav" else f"film{self.kind}")
        if self.kind == ".mp4":
            mux = subprocess.run([                         # of a group of its own, whom no Ctrl-C reaches
                imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "level+verbose", "-i", self.path / "video.mp4",
                "-i", self.path / "sound.wav", "-c:v", "copy", "-c:a", "aac", "-ar", "48000",
                "-movflags", "+faststart", result], capture_output=True, text=True, process_group=0)
            if mux.returncode or f"(video): {self.frames} packets muxed" not in mux.stderr:
                why = " ".join(line for line in mux.stderr.splitlines() if "[error]" in line)
                raise OSError(f"ffmpeg could not write the whole film {why[-200:]}")
        if self.kind == ".png":
            train.write_picture(result, filmstrip(self.stills, self.cfg, transcript))
        if self.kind == ".gif":
            frames = np.stack(self.stills).repeat(ENLARGE, 1).repeat(ENLARGE, 2)
            result.write_bytes(iio.imwrite("<bytes>", frames, extension=".gif", plugin="pillow",
                                           duration=1000 / self.cfg.fps, loop=0))
        os.replace(result, self.out)

    def close(self) -> None:
        """Stop writing and leave nothing behind."""
        for part in filter(None, (self.sound, self.video)):
            with suppress(OSError, soundfile.SoundFileError):          # in trouble, and that has been said
                part.close()
        self.folder.cleanup()


def filmstrip(stills: list, cfg: Config, transcript: str) -> np.ndarray:
    """Every fourth frame, below it the waveform and the letters said: uint8 (h, w, 3), 12 in a row."""
    rows, columns = [], min(12, len(stills))
    for start in range(0, len(stills), columns):
        row = np.full((cfg.image + 40, columns * cfg.image, 3), 255, np.uint8)
        for i, (at, frame, samples) in enumerate(stills[start:start + columns]):
            left = i * cfg.image
            row[:cfg.image, left:left + cfg.image] = frame
            for x, part in enumerate(np.array_split(samples, cfg.image)):
                high = int(np.clip(np.abs(part).max(initial=0) * 40, 0, 11))
                row[cfg.image + 12 - high:cfg.image + 13 + high, left + x] = (40, 90, 160)
            for j, letter in enumerate(transcript[at:at + STILL]):
                bits = [[*map(int, f"{int(digit):03b}")] for digit in GLYPHS.get(letter, "00000")]     # 5 x 3
                glyph = np.kron(np.uint8(bits), np.ones((2, 2), np.uint8))[..., None]
                x = min(left + 2 + j * cfg.image // STILL, row.shape[1] - 6)
                row[cfg.image + 27:cfg.image + 37, x:x + 6] *= 1 - glyph
        rows.append(row)
    return np.concatenate(rows)


GLYPHS = dict(zip(ALPHABET, (                              # five rows of three pixels each, as octal digits
    "25755 65656 34443 65556 74647 74644 34553 55755 72227 11152 55655 44447 57755 65555 25552 65644 25561 "
    "65655 34216 72222 55557 55552 55775 55255 55222 71247").split()))


# ---- Speed: weights packed on a CPU; whole passes recorded, and replayed without Python (--graphs). --------

def for_sampling(model: AudioVideoTransformer, device, precision: str | None = None) -> AudioVideoTransformer:
    """The model itself, on the device, its weights in fp32 or bf16 (by default the faster there), packed
    where that serves; it can no longer be trained or saved."""
    dtype = train.PRECISIONS[precision or train.faster_precision(device)]
    model = model.to(device, dtype)
    packs = torch.device(device).type == "cpu" and dtype == torch.bfloat16
    if packs and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        for part in list(model.modules()):
            for name, layer in part.named_children():
                if isinstance(layer, torch.nn.Linear):
                    setattr(part, name, train.Packed(layer.weight, layer.bias))
    return model


class Traced:
    """A model for stream() and generate(), whose passes over a chunk are recorded by TorchScript when they
    first occur, and replayed, with no Python in between. On a CPU; all films of one batch, guidance and
    window. (torch.jit is no longer developed; torch.compile takes minutes, and gains nothing here.)"""

    def __init__(self, model: AudioVideoTransformer):
        self.model, self.passes = model, {}

    def __getattr__(self, name):
        return getattr(self.model, name)

    def replay(self, key, function, *inputs):
        """function(*inputs), trees of tensors, as recorded."""
        leaves, form = tree_flatten(inputs)
        if key not in self.passes:
            work = torch.nn.Module()                       # which holds the weights: they are no constants
            work.model, work.forward = self.model, lambda *leaves: function(*tree_unflatten(leaves, form))
            example = tuple(leaf.clone() for leaf in leaves)           # a cache takes what it is given once
            with warnings.catch_warnings(action="ignore"):             # deprecated; and loops are unrolled
                self.passes[key] = torch.jit.trace(work, example, check_trace=False)
            for _ in range(2):                             # its first runs optimise it
                self.passes[key](*example)
        return self.passes[key](*leaves)

    def __call__(self, x_t, t, d, controls, history, chunk):
        """As the model's, without history: what the cache is measured against."""
        assert history is None
        return self.replay(chunk, lambda *inputs: self.model(*inputs, None, chunk), x_t, t, d, controls)

    def step(self, z, changes, scripts, cache, done: int = 0):
        """As the model's. A trace serves all moments of the grid, and one place in the cache's ring."""
        count = cache.count

        def run(z, changes, scripts, kv):
            own = copy.copy(cache)
            own.kv, own.count = kv, count
            return self.model.step(z, changes, scripts, own, done)

        cache.count = count + done
        key = done, min(count, cache.window), done and count % cache.window
        return self.replay(key, run, z, changes, scripts, cache.kv)


class Graphed:
    """A model for stream() and generate(), whose passes over a chunk, and its decoding, are recorded as CUDA
    graphs when they first occur, and replayed. One film at a time; all of one batch, grid, mode, guidance and
    window."""

    def __init__(self, model: AudioVideoTransformer):
        self.model, self.cache, self.pool, self.graphs, self.laid = model, None, None, {}, {}
        self.coders = model.codecs()                       # whose tables the graphs read

    def __getattr__(self, name):
        return getattr(self.model, name)

    def lay(self, name, tree):
        """Copy a tree of tensors to where the graphs read it, unless it lies there."""
        place, last = self.laid.get(name) or (tree_map(torch.clone, tree), tree)
        if last is not tree:
            torch._foreach_copy_(tree_leaves(place), tree_leaves(tree))
        self.laid[name] = place, tree
        return place

    def replay(self, key, function):
        """What the function returns, always in the same memory."""
        if key not in self.graphs:
            kept = self.cache.kv.clone()
            function()                                     # to warm up; what it commits, it may commit once
            self.cache.kv.copy_(kept)
            self.graphs[key], self.pool = train.cuda_graph(function, self.pool)
        return self.graphs[key]()

    def codecs(self):
        """As the model's, for decode_next() alone. Of a film's first chunk and of others, a graph each."""
        def recorded(i, codec):
            def decode_next(*inputs):
                inputs = [x for x in inputs if x is not None]
                inputs = self.lay(name := ("codec", i, len(inputs)), inputs)
                made = self.replay(name, lambda: codec.decode_next(*inputs))
                return tree_map_only(torch.Tensor, torch.clone, made)          # a codec may pass on None
            return SimpleNamespace(decode_next=decode_next)
        return [recorded(*each) for each in enumerate(self.coders)]

    def start(self, *inputs):
        """As the model's; but all films share one cache, which the graphs know."""
        cache, self.moments = self.model.start(*inputs), {}
        self.cache = self.cache or cache
        assert cache.kv.shape == self.cache.kv.shape, "films of another batch, guidance or window"
        self.cache.kv.copy_(cache.kv)
        self.cache.count = 0
        return self.cache

    def script(self, controls, steps):
        """As the model's."""
        inputs = self.lay("controls", controls), self.lay("steps", steps)
        return tree_map(torch.clone, self.replay("script", lambda: self.model.script(*inputs)))

    def step(self, z, changes, scripts, cache, done: int = 0):
        """As the model's. A graph serves one moment of the grid and one place in the cache's ring."""
        k, count = self.moments.setdefault(id(changes), len(self.moments)), cache.count
        inputs = [self.lay(*pair) for pair in ((("z", done), z), (k, changes))]
        inputs.append([self.lay(("script", i), script) for i, script in enumerate(scripts)])

        def run():
            cache.count = count
            return self.lay("x_hat", self.model.step(*inputs, cache, done))        # one place for all

        x_hat = self.replay((k, min(count, cache.window), count % cache.window), run)
        cache.count = count + done
        return x_hat


def recorded(model: AudioVideoTransformer, film) -> Traced | Graphed:
    """The model, for --graphs, with all of a chunk's passes recorded: film(model, chunks) streams a film."""
    maker = (Graphed if model.no_first.is_cuda else Traced)(model)
    deque(film(maker, 2 * model.cfg.window + 1), maxlen=0) # every place in the ring
    return maker


# One thing is varied at a time from 64 x 64, a single film of 10 s, few-step mode, 4 evaluations.

MULTI = {"mode": "multi", "steps": 50}
BENCHMARK = ({}, {"steps": 8}, MULTI, {**MULTI, "guidance": 5.0}, {"batch": 8}, {"size": 96}, {"size": 128},
             {"cache": False}, {"batch": 8, "cache": False}, {"size": 128, "cache": False},
             {"window": 4}, {"window": 4, "cache": False}, {"seconds": 60}, {"seconds": 600})
ON_A_GPU = tuple({"batch": batch, "seconds": 2} for batch in (64, 512, 1024, 2048))


def films_of(model, chunks: int, *, batch, mode, steps, guidance, cache):
    """The states of each chunk, like generate(); without a cache by recomputing all that a full one holds."""
    cfg, s = model.cfg, (model.cfg.window + 2) * model.cfg.chunk
    times = time_grid(cfg, steps).to(model.no_first.device)
    controls = film_controls(cfg, chunks if cache else cfg.window + 2, "the quick brown fox " * chunks)
    controls = controls.each(lambda x: x.expand(batch, *x.shape[1:]).to(times.device))
    if cache:
        yield from generate(model, controls, chunks, times, few=mode == "few", guidance=guidance)
    for _ in range(0 if cache else chunks):
        x = torch.randn(batch, s, cfg.step_values, device=times.device)
        states = denoise(lambda x, k: model(x, times[k], times.diff(dim=0)[k], controls, None, s), x, times)
        yield [state[:, -cfg.chunk:] for state in states]


@torch.inference_mode()
def time_films(model, *, batch=1, mode="few", steps=4, guidance=1.0, seconds=10, cache=True,
               graphs=False) -> dict:
    """Stream films, decode all and write the first (then thrown away); returns a row of the benchmark.
    As many chunks after its end, or 100, take turns with a new film's, which always has a cache: so the
    machine's moods touch both."""
    cfg, device = model.cfg, model.no_first.device
    settings = {"batch": batch, "mode": mode, "steps": steps, "guidance": guidance, "cache": cache}
    film, new = (functools.partial(films_of, **settings | change) for change in ({}, {"cache": True}))
    with train.Products() as products:
        for index, states in zip(range(cfg.window + 3), film(model, cfg.window + 3)):
            if index == cfg.window + 1:                    # of a chunk after a full window, with one commit
                products.shapes.clear()
    graphs = graphs and (cache or device.type == "cpu")    # no graph without a cache
    makers = [recorded(model, some) if graphs else model for some in (film, new)]
    codecs = makers[0].codecs()

    def decode(states, last=(None, None)):                 # -> frames and samples; what the next call takes
        return zip(*(codec.decode_next(*rest)
                     for codec, *rest in zip(codecs, split(cfg, states[-1]), last)))

    _, last = decode(states)                               # to warm up: a first chunk, and a second
    decode(states, last)
    with tempfile.TemporaryDirectory() as folder, closing(FilmWriter(Path(folder, "x.mp4"), cfg)) as writer:
        chunks, times, last = round(seconds / cfg.chunk_seconds), [train.clock(device)], (None, None)
        more = min(chunks, 100)
        old, new = film(makers[0], chunks + more), new(makers[1], more)
        for _, states in zip(range(chunks), old):
            times.append(train.clock(device))
            (frames, samples), last = decode(states, last)
            times.append(train.clock(device))
            writer.add(frames[0].cpu().numpy(), samples[0].cpu().numpy())
            times.append(train.clock(device))
        writer.finish()
    turns = [train.clock(device)]
    turns += [(next(some), train.clock(device))[1] for _ in range(more) for some in (old, new)]
    whole, (model_ms, codec_ms, _) = turns[0] - times[0], 1000 * np.diff(times).reshape(-1, 3).T
    last, fresh = 1000 * np.median(np.diff(turns).reshape(-1, 2), 0)
    frames, middle, memory = batch * chunks * cfg.chunk_frames, np.median(model_ms), train.peak_memory(device)
    return {"size": cfg.image, "window": cfg.window, **settings, "seconds": seconds,
            "first_chunk_ms": 1000 * (times[2] - times[0]),
            "chunk_ms_median": middle, "chunk_ms_p95": np.quantile(model_ms, 0.95), "chunk_ms_last": last,
            "chunk_ms_new": fresh, "fps_model": 1000 * frames / model_ms.sum(),
            "fps_codec": 1000 * frames / codec_ms.sum(), "fps_end_to_end": frames / whole,
            "real_time_factor": frames / whole / cfg.fps, "peak_memory_mb": memory,
            "limit_share": 1000 * products.alone(device) / middle if batch <= 64 else None}    # else: memory


# ---- The command line. -------------------------------------------------------------------------------------

def read_first_frame(path: Path, cfg: Config) -> np.ndarray:
    """A picture file -> uint8 (image, image, 3), cropped to a square and resized, which is said."""
    try:
        picture = iio.imread(path, plugin="pillow", index=0, mode="RGB", rotate=True)     # as its camera says
    except Exception as error:  # whatever the image readers raise on a damaged file
        raise ValueError(f"{path}: not a readable picture ({type(error).__name__})") from None
    h, w = picture.shape[:2]
    if (h, w) == (cfg.image, cfg.image):
        return picture
    side = min(h, w)
    square = picture[(h - side) // 2:(h + side) // 2, (w - side) // 2:(w + side) // 2]
    print(f"{path}: {w} x {h} cropped and resized to {cfg.image} x {cfg.image}", file=sys.stderr)
    x = torch.from_numpy(square.copy()).permute(2, 0, 1)[None].float()
    x = torch.nn.functional.interpolate(x, (cfg.image, cfg.image), mode="bilinear", antialias=True)
    return x[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).numpy()


def check_out(out: Path) -> None:
    """Raise ValueError unless a film can be written there."""
    if out.suffix.lower() not in ENDINGS:
        raise ValueError(f"{out}: the ending must be one of {', '.join(ENDINGS)}")
    if not out.parent.is_dir():
        raise ValueError(f"{out.parent}: no such folder")
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise ValueError(f"{out}: cannot be written")


def film_settings(args, cfg: Config) -> dict:
    """The command line as arguments of stream(). Raises ValueError."""
    symbols = None
    if args.say is not None:
        if not any(c in ALPHABET[:SILENCE] for c in args.say.lower()):
            raise ValueError("--say: nothing in it can be spoken; letters a to z can")
        if odd := sorted({c for c in args.say.lower() if c not in ALPHABET}):
            print(f"--say: {''.join(odd)!r} become pauses", file=sys.stderr)
        symbols = [SILENCE] * 2 + spell(args.say)
    needed = 8.0 if symbols is None else (len(symbols) + cfg.fps // 2) / cfg.fps
    seconds = needed if args.seconds is None else args.seconds
    if symbols is not None and seconds < needed - 0.5:
        print(f"--seconds: the text takes {needed:.1f}, so its end will not be heard", file=sys.stderr)
    if not 1 / cfg.fps <= seconds <= 24 * 3600:
        raise ValueError(f"--seconds must be between 1/{cfg.fps} and 86400")
    if args.character is not None and args.character not in cfg.characters:
        raise ValueError(f"--character: no {args.character!r}; there are {', '.join(cfg.characters)}")
    if args.window is not None and not 1 <= args.window <= cfg.window:
        raise ValueError(f"--window must be between 1 and {cfg.window}, the longest that training saw")
    if args.mode == "few" and args.steps not in (4, 8):
        print(f"--steps {args.steps}: few-step mode was trained for 4 and 8", file=sys.stderr)
    first = None if args.first_frame is None else read_first_frame(args.first_frame, cfg)
    return {"seconds": seconds, "transcript": symbols, "character": args.character, "first_frame": first,
            "mode": args.mode, "steps": args.steps, "guidance": args.guidance, "window": args.window,
            "seed": args.seed}


def benchmark(args) -> dict:
    """Rows of BENCHMARK; on a CPU each by a process of its own, whose peak memory is then the row's."""
    rows, gpu = [], torch.device(args.device).type == "cuda"
    for change in tqdm(BENCHMARK + ON_A_GPU if gpu else BENCHMARK, disable=None):
        rows.append(benchmark_row(args, change) if gpu else train.apart(benchmark_row, args, change))
        print(train.markdown(rows).splitlines()[-1], file=sys.stderr, flush=True)
    return {"machine": train.machine(args.device), "rows": rows}


def benchmark_row(args, change: dict) -> dict:
    """A row: the checkpoint's weights, which know no window; random ones at other sizes than its own."""
    model, change = load_talker(args.checkpoint), dict(change)
    image, window = change.pop("size", model.cfg.image), change.pop("window", model.cfg.window)
    if image != model.cfg.image:
        model = AudioVideoTransformer(replace(model.cfg, image=image))
    model.cfg = replace(model.cfg, window=window)
    if torch.device(args.device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(args.device)
    model = for_sampling(model, args.device, args.precision)
    return time_films(model, graphs=args.graphs, **change)


def make_film(args) -> tuple[dict, int]:
    """Stream one film into args.out; returns the figures and the exit code (130 if it was interrupted)."""
    began = time.perf_counter()
    check_out(args.out)
    model = load_talker(args.checkpoint)
    settings = film_settings(args, cfg := model.cfg)
    model = for_sampling(model, args.device, args.precision)
    if args.graphs:
        model = recorded(model, lambda net, n: stream(net, **settings | {"seconds": n * cfg.chunk_seconds}))
    loaded = time.perf_counter()
    said = "".join(ALPHABET[i] for i in settings["transcript"] or ())
    writer, out, code, first, stop = FilmWriter(args.out, cfg), args.out, 0, None, []
    frames_asked = round(settings["seconds"] * cfg.fps)
    before = {n: signal.signal(n, lambda *_: stop.append(1)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        bar = tqdm(total=frames_asked, unit="frame", disable=None)
        for frames, samples in stream(model, **settings):
            first = first or time.perf_counter() - loaded
            writer.add(frames, samples)
            bar.update(len(frames))
            if stop and writer.frames < frames_asked:      # whole chunks only: a film cut short is playable
                code = 130
                break
        bar.close()
        if code and out.exists():
            names = (out.with_stem(f"{out.stem}-interrupted{i or ''}") for i in count())
            writer.out = out = next(name for name in names if not name.exists())
        writer.finish(said)
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
        writer.close()
    spent = time.perf_counter() - loaded
    seconds = writer.frames / cfg.fps
    return {"out": str(out), "seconds": seconds, "frames": writer.frames, "mode": args.mode,
            "steps": args.steps, "fps": round(writer.frames / spent, 1),
            "real_time_factor": round(seconds / spent, 2), "first_chunk_ms": round(1000 * first, 1),
            "load_s": round(loaded - began, 2), "peak_memory_mb": train.peak_memory(args.device)}, code


def build_parser() -> argparse.ArgumentParser:
    parser = train.Parser("sample.py", description="Make a film of a talking character, or score films.")
    add, number = parser.add_argument, train.number
    add("--checkpoint", type=Path, default=SHIPPED, help="default: the shipped one")
    add("--say", help="text to speak: letters a to z, anything else is a pause; without it, babbling")
    add("--character", help="a named character; default: anyone, whom --seed decides")
    add("--first-frame", type=Path, help="a picture to start from")
    add("--seconds", type=float, help="length; default: as long as the text takes, else 8 (25 to score)")
    add("--mode", choices=("few", "multi"), help="default: few (both to score)")
    add("--steps", type=number(int, 1, 1000), help="evaluations a chunk; default 4, in --mode multi 50")
    add("--guidance", type=number(float, 0, 1000), default=1.0, help="other than 1 doubles the evaluations")
    add("--window", type=int, help="chunks of history, at most what training saw")
    add("--seed", type=number(int, 0, 2 ** 63 - 1), default=0, help="another film; default %(default)s")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--out", type=Path, default=Path("sample.mp4"), help=".mp4 (default sample.mp4), .gif, .wav or .png")
    add("--json", action="store_true", help="print the figures as one JSON object")
    add("--evaluate", type=Path, nargs="+", metavar="CKPT", help="score checkpoints instead")
    add("--precision", choices=train.PRECISIONS, help="default: what is faster here; to score, fp32")
    add("--graphs", action="store_true", help="record the network's passes, then replay them: a longer start")
    add("--benchmark", action="store_true", help="measure speed instead, beside the machine's limit")
    add("--talkers", type=int, default=32, help="films to score; default %(default)s")
    add("--data", type=Path, help="folder of clips to score against, instead of talkers")
    return parser


NOT_FOR = {"--benchmark": "evaluate data say character first_frame seconds mode steps window",
           "--evaluate": "say character first_frame graphs", "a film": "data"}


def run(args) -> int:
    """Do what the command line asks for; returns the exit code. Raises ValueError and the like."""
    train.check_device(args.device)
    task = "--benchmark" if args.benchmark else "--evaluate" if args.evaluate else "a film"
    if odd := [name for name in NOT_FOR[task].split() if getattr(args, name)]:
        raise ValueError(f"--{odd[0].replace('_', '-')}: is not for {task}")
    if args.benchmark:
        result = benchmark(args)
        print(json.dumps(result) if args.json else f"{result['machine']}\n\n{train.markdown(result['rows'])}")
        return 0
    if args.evaluate:
        args.seconds = 25.0 if args.seconds is None else args.seconds
        if args.talkers < 2 or not WINDOWS[0][1] <= args.seconds <= 86400:
            raise ValueError(f"--evaluate needs at least 2 talkers, and {WINDOWS[0][1]} seconds to a day")
        result = evaluate(args)
        print(json.dumps(result) if args.json else train.markdown(result["rows"]))
        return 0
    args.mode = args.mode or "few"
    args.steps = args.steps if args.steps is not None else 4 if args.mode == "few" else 50
    figures, code = make_film(args)
    print(json.dumps(figures) if args.json else (
        "{out}: {seconds:.2f} s made, {fps} frames/s, {real_time_factor} times real time, first chunk after "
        "{first_chunk_ms} ms.\nThese include the network, decoding and writing the file, not the {load_s} s "
        "of loading; peak memory {peak_memory_mb} MB.").format(**figures))
    return code


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        return train.hush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (CheckpointError, ValueError) as error:
        message = error
    except (OSError, soundfile.SoundFileError) as error:
        message = f"{getattr(error, 'filename', 0) or args.out}: {getattr(error, 'strerror', 0) or error}"
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        message = (str(error) or "out of memory").splitlines()[0]
    print(f"sample.py: {' '.join(str(message).split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
