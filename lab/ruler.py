"""The ruler: what can be measured of a film. It knows the talker, not the model.

Letters: n films, F frames, N samples; h, w height and width of a frame.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from data.codecs import Film
from data.controls import ALPHABET
from data.talker import LETTER_TABLE, draw_identity, mouth_of, pitch_of, voice
from lab.looks import Look, MouthReader, look_at, stills_of, stripes_of, to_units
from mutual_forcing import Config, UserError

FIGURES = {
    "transcript_error": "share of the transcript's letters that are misread from the sound",
    "lip": "correlation of the mouth in the picture with the mouth that says the transcript",
    "sync": "correlation of the mouth in the picture with the mouth that says the letters heard",
    "sync_lag_ms": "by how much the sound comes after the picture, at the best correlation",
    "identity_drift": "mean difference of colours and face width (0 to 1) from the first second",
    "voice_drift": "share of voiced frames at another pitch than the first 16 voiced frames",
    "motion": "mean change of a pixel (0 to 1) from one frame to the next",
    "loudness_db": "mean power of the sound in dB; samples of 1 have 0 dB",
    "letter_margin": "how clear letters are: cosine of the best template minus the second best",
    "letter_spread": "effective number of different letters heard",
    "frechet_video": "distance of colours, contrast, edges and motion from other talkers' films",
    "frechet_audio": "distance of the loudness of 15 bands of frequency from other talkers' films",
    "palette": "distance of the five colours of films from those of other films, in grey levels",
    "iris": "chroma of the irises: largest minus smallest of red, green and blue, in grey levels",
    "iris_difference": "mean difference of the left iris' colour from the right's, in grey levels",
    "saturation": "saturation of the background's colour (0 to 1)",
    "stripes": "contrast of the stripes of the clothes in percent of their mean brightness",
    "mouth_letters": "share of frames whose mouth is read as the letter said (heard, if babbling)",
    "lopsided": "share of frames whose mouth or chin differs from its mirror image",
    "lips_follow": "by how much the closed mouth moves when the head moves by 1",
    "flicker": "mean change of the background from one frame to the next, in grey levels",
    "grain": "standard deviation of the background around an even gradient, in grey levels",
}
MINOR = ("voice_drift", "motion", "frechet_video", "frechet_audio")  # shown with --all alone
DEFAULT_FIGURES = [name for name in FIGURES if name not in MINOR]
OF_CLIPS = ["identity_drift", "motion", "loudness_db", "frechet_video", "frechet_audio"]
WINDOWS = ((0, 5), (5, 15), (15, 25))  # seconds
LOPSIDED = 4.0  # grey levels of difference from the mirror image; talkers have less than 3
CLOSED = 0.5  # a mouth whose dark inside is less high, in units, is closed


class Features(NamedTuple):
    """What the ruler reads from n films, before windows of time are cut."""

    mouths: np.ndarray  # (n, F): how high the mouth's dark inside is in the picture
    letters: np.ndarray  # (n, F): heard in the sound, as indices into ALPHABET
    pitches: np.ndarray  # (n, F): in multiples of sample_rate / hop; 0 where there is no voice
    margins: np.ndarray  # (n, F): cosine of the best letter's template minus the second best
    colours: np.ndarray  # (n, seconds, 13)
    video: np.ndarray  # (n, half seconds, k), for the Frechet distance
    audio: np.ndarray  # (n, half seconds, 30), likewise
    looks: Look  # each of its arrays (n, F, ...); mouths: the groups of letters that are read
    flicker: np.ndarray  # (n, F): change of the background from the frame before, in grey levels
    grain: np.ndarray  # (n, F): deviation of the background from an even gradient, in grey levels
    clothes: np.ndarray  # (n, seconds, h, w): mean brightness, in grey levels


class Ruler:
    """Reads letters from sound by templates, and mouths and colours from fixed boxes of pixels."""

    def __init__(self, cfg: Config):
        if cfg.fps % 2 or cfg.hop <= 240:  # for half seconds, and for 30 bands of eight lines
            raise UserError("the ruler needs an even fps, and more than 240 samples a hop")
        self.cfg = cfg
        rng = np.random.default_rng(0)
        someone = draw_identity(rng)._replace(tilt=0.5)
        pitches, energies = [], []
        for width in (0.1, 0.3, 0.5, 0.7, 0.9):  # one face for each pitch
            who = someone._replace(face_width=width)
            for letter in range(cfg.silence):
                samples = voice(rng, who, np.full(16, letter), cfg)
                voiced = LETTER_TABLE[ALPHABET[letter]][4] > 0
                pitches.append(pitch_of(who) * voiced)
                energies.append(self.energies(samples)[4:-4].mean(0))
        self.pitches = np.stack(pitches)  # (templates,)
        self.templates = self.shape(np.stack(energies))  # (templates, bands)
        self.quiet = 0.3 * min(energy.sum() for energy in energies)  # less energy is silence
        self.mouth_reader = MouthReader(cfg.image)

    def energies(self, samples: np.ndarray) -> np.ndarray:
        """Samples (..., H hop) -> energies of bands of 128 Hz around the H - 1 borders of hops."""
        hop = self.cfg.hop
        hops = samples.reshape(*samples.shape[:-1], -1, hop)
        pairs = np.concatenate([hops[..., :-1, :], hops[..., 1:, :]], -1) * np.hanning(2 * hop)
        power = np.abs(np.fft.rfft(pairs)[..., :-2] / hop) ** 2
        bands = power.shape[-1] // 8
        return power[..., : bands * 8].reshape(*power.shape[:-1], bands, 8).sum(-1)

    def shape(self, energy: np.ndarray) -> np.ndarray:
        """Energies (..., bands) -> unit vectors (..., bands) of loudness by band."""
        loud = energy**0.25
        return loud / (np.linalg.norm(loud, axis=-1, keepdims=True) + 1e-9)

    def hear(self, energy: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Energies (..., bands) -> the letter that fits best (or silence), its pitch and margin."""
        loud = energy.sum(-1) > self.quiet
        fit = self.shape(energy) @ self.templates.T  # (..., templates)
        by_letter = fit.reshape(*fit.shape[:-1], -1, self.cfg.silence).max(-2)
        letter = np.where(loud, by_letter.argmax(-1), self.cfg.silence)
        pitch = np.where(loud, self.pitches[fit.argmax(-1)], 0)
        best = np.sort(by_letter, -1)
        return letter, pitch, best[..., -1] - best[..., -2]

    def box(self, frames: np.ndarray, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """A box of frames (..., h, w, 3), bounds in 1/64 of the picture -> float32 in 0..1."""
        unit = frames.shape[-2] / 64
        rows = slice(int(top * unit), int(bottom * unit))
        columns = slice(int(left * unit), int(right * unit))
        return frames[..., rows, columns, :].astype(np.float32) / 255

    def mouths(self, frames: np.ndarray) -> np.ndarray:
        """Frames (n, F, h, w, 3) -> height of the dark inside of the mouth (n, F), in box units."""
        red = self.box(frames, 34, 48, 26, 38)[..., 0]
        dark = np.clip((0.5 - red) / 0.25, 0, 1)
        rows = np.sort(dark, -1)[..., -3:].mean(-1)  # the darkest three pixels of each row
        return rows.sum(-1) / (frames.shape[2] / 64)

    def colours(self, frames: np.ndarray) -> np.ndarray:
        """Frames (n, F, h, w, 3) -> mean colours and face width of each second (n, seconds, 13)."""
        n, fps = len(frames), self.cfg.fps
        whole = frames[:, : frames.shape[1] // fps * fps]
        seconds = whole.reshape(n, -1, fps, *frames.shape[2:])
        backs = [self.box(seconds, 2, 40, 0, 6), self.box(seconds, 2, 40, 58, 64)]
        cheeks = [self.box(seconds, 33, 36, 24, 28), self.box(seconds, 33, 36, 36, 40)]
        clothes, hair = self.box(seconds, 60, 64, 22, 42), self.box(seconds, 9, 13, 27, 37)
        boxes = np.concatenate(backs, -2), clothes, np.concatenate(cheeks, -2), hair
        means = [box.mean((2, 3, 4)) for box in boxes]
        skin = means[2][:, :, None, None, None]
        away = np.abs(self.box(seconds, 33, 36, 0, 64) - skin).max(-1)
        width = (away < 0.12).mean((2, 3, 4))
        return np.concatenate([*means, width[..., None]], -1)

    def video_features(self, frames: np.ndarray) -> np.ndarray:
        """Frames (n, F, h, w, 3) -> colour, contrast, edges and motion (n, half seconds, k)."""
        n, half, patch = len(frames), self.cfg.fps // 2, 16 * self.cfg.image // 64
        whole = frames[:, : frames.shape[1] // half * half]
        x = whole.reshape(-1, half, *frames.shape[2:]) / np.float32(255)
        grey = x.mean(-1)  # (half seconds, frames, h, w)
        cells = grey.reshape(*grey.shape[:2], grey.shape[2] // patch, patch, -1, patch)
        contrast = cells.std((3, 5)).mean(1)
        down, across = np.abs(np.diff(grey, axis=2)), np.abs(np.diff(grey, axis=3))
        borders = [down[:, :, patch - 1 :: patch], across[:, :, :, patch - 1 :: patch]]
        edges = [edge.mean((1, 2, 3)) for edge in (down, across, *borders)]
        change = np.abs(np.diff(grey, axis=1)).reshape(len(x), half - 1, 4, -1).mean((1, 3))
        parts = [x.mean((1, 2, 3)), contrast.reshape(len(x), -1), np.stack(edges, 1), change]
        return np.concatenate(parts, -1).reshape(n, len(x) // n, -1)

    def audio_features(self, energy: np.ndarray) -> np.ndarray:
        """Energies (n, F, bands) -> mean and spread of 15 bands' dB (n, half seconds, 30)."""
        n, frames, half = *energy.shape[:2], self.cfg.fps // 2
        bands = energy[..., :30].reshape(n, frames, 15, 2).sum(-1)
        level = 10 * np.log10(bands + 1e-7)[:, : frames // half * half].reshape(n, -1, half, 15)
        return np.concatenate([level.mean(2), level.std(2)], -1)

    def read(self, films: Film) -> Features:
        """Stacked films -> all that can be read from them."""
        frames = films.frames
        energy = self.energies(films.samples)[:, ::2]  # two hops a frame: around its middle
        letters, pitches, margins = self.hear(energy)
        stills = [stills_of(to_units(film), self.cfg.fps) for film in frames]
        flicker, grain, clothes = [np.stack(part) for part in zip(*stills)]
        return Features(
            mouths=self.mouths(frames),
            letters=letters,
            pitches=pitches,
            margins=margins,
            colours=self.colours(frames),
            video=self.video_features(frames),
            audio=self.audio_features(energy),
            looks=self.looks(frames),
            flicker=flicker,
            grain=grain,
            clothes=clothes,
        )

    def looks(self, frames: np.ndarray) -> Look:
        """Frames (n, F, h, w, 3) -> what is read of every face; mouths as groups of letters."""
        films = []
        for film in frames:
            look = look_at(to_units(film))
            films.append(look._replace(mouths=self.mouth_reader.read(look.mouths)))
        return Look(*[np.stack(part) for part in zip(*films)])


def frechet(a: np.ndarray, b: np.ndarray, spread: np.ndarray) -> float:
    """Frechet distance of two sets (..., k), per feature, in units of each one's spread (k,)."""
    a, b = a.reshape(-1, a.shape[-1]) / spread, b.reshape(-1, b.shape[-1]) / spread
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    root = np.sqrt(np.maximum(np.linalg.eigvals(cov_a @ cov_b).real, 0)).sum()
    means = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return float((means + np.trace(cov_a) + np.trace(cov_b) - 2 * root) / a.shape[-1])


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over films of the correlation of two curves (n, F); a constant curve counts as 0."""
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    size = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return float(np.where(size > 1e-9, (a * b).sum(1) / np.maximum(size, 1e-9), 0).mean())


def lag_ms(picture: np.ndarray, sound: np.ndarray, fps: int) -> float:
    """By how many ms the sound's curve (n, F) comes after the picture's; see FIGURES.

    A parabola through the best correlation and its neighbours gives the fraction of a frame.
    """
    frames, reach, scores = picture.shape[1], 5, []
    for lag in range(-reach, reach + 1):
        early, late = max(0, -lag), max(0, lag)
        seen, heard = picture[:, early : frames - late], sound[:, late : frames - early]
        scores.append(correlation(seen, heard))
    best = min(max(int(np.argmax(scores)), 1), 2 * reach - 1)
    before, at, after = scores[best - 1 : best + 2]
    bend = before - 2 * at + after
    return 1000 / fps * (best - reach + (0.5 * (before - after) / bend if bend < 0 else 0))


def windows_of(seconds: float) -> list[tuple]:
    """The windows in a film of this length; of long films the last ten seconds too."""
    last = [(int(seconds) - 10, int(seconds))] if seconds >= WINDOWS[-1][1] + 10 else []
    return [window for window in WINDOWS if window[1] <= seconds] + last


def openings(letters: np.ndarray) -> np.ndarray:
    """Letters (n, F) -> how far the mouth that says them opens (n, F)."""
    return np.stack([mouth_of(film)[:, 0] for film in letters])


def transcript_error(ruler: Ruler, films: Film, begin: int, end: int) -> float:
    """Share of the letters from frame begin to end that are misread in their own interval."""
    wrong = count = 0
    for energy, symbols in zip(ruler.energies(films.samples), films.symbols):
        borders = np.flatnonzero(np.diff(symbols)) + 1
        for start, stop in pairwise(borders):
            if symbols[start] != ruler.cfg.silence and begin <= start and stop <= end:
                letter, _, _ = ruler.hear(energy[2 * start : 2 * stop - 1].mean(0))
                wrong += letter != symbols[start]
                count += 1
    return wrong / max(1, count)


def speech_figures(ruler: Ruler, films: Film, features: Features, begin: int, end: int) -> dict:
    """Figures of mouth, letters and voice from frame begin to end."""
    silence, fps, window = ruler.cfg.silence, ruler.cfg.fps, slice(begin, end)
    mouths, letters = features.mouths[:, window], features.letters[:, window]
    pitches, loud = features.pitches[:, window], letters != silence
    heard = openings(features.letters)[:, window]
    own = [np.bincount(film[film > 0][:fps], minlength=9).argmax() for film in features.pitches]
    strange = (pitches != np.array(own)[:, None])[pitches > 0]
    share = np.bincount(letters[loud], minlength=silence + 1) / max(1, loud.sum())
    share = share[share > 0]
    figures = {
        "sync": correlation(mouths, heard),
        "sync_lag_ms": lag_ms(mouths, heard, fps),
        "voice_drift": strange.mean() if strange.size else None,
        "letter_margin": features.margins[:, window][loud].mean() if loud.any() else None,
        "letter_spread": np.exp(-(share * np.log(share)).sum()),
    }
    if films.symbols is not None:
        figures["lip"] = correlation(mouths, openings(films.symbols)[:, window])
        figures["transcript_error"] = transcript_error(ruler, films, begin, end)
    return figures


def palettes(features: Features, begin: int, end: int, fps: int) -> np.ndarray:
    """Mean colours of each film from second begin to end (n, 5, 3); an iris never seen is black.

    The background's, that of clothes, of skin, of hair and of irises.
    """
    boxes = features.colours[:, begin:end, :12].mean(1).reshape(-1, 4, 3)
    irises = eye_colours(features, begin * fps, end * fps).mean(1, keepdims=True)
    return np.concatenate([boxes, np.nan_to_num(irises)], 1)


def palette_distance(films: Features, others: Features, begin: int, end: int, fps: int) -> float:
    """Distance in grey levels of films' colours from others', from second begin to end.

    It is the root of the mean Frechet distance of the five colours: if others have the same
    colours but for a shift by d, it is d. One by one, they are compared well by a few films.
    """
    own, other = palettes(films, begin, end, fps), palettes(others, begin, end, fps)
    distances = [frechet(own[:, i], other[:, i], np.full(3, 1 / 255)) for i in range(5)]
    return max(0.0, np.mean(distances)) ** 0.5


def eye_colours(features: Features, begin: int, end: int) -> np.ndarray:
    """Mean colours of each film's left and right iris from frame begin to end (n, 2, 3), or NaN."""
    irises = features.looks.irises[:, begin:end]
    seen = np.isfinite(irises).sum(1)
    return np.where(seen, np.nansum(irises, 1) / np.maximum(seen, 1), np.nan)


def lips_follow(looks: Look, closed: np.ndarray) -> float | None:
    """The slope of the mouth's position over the head's, where closed (n, F); None if none moves.

    Least squares over all films, down and across; each film's means are subtracted.
    """
    both = moved = 0.0
    for head, mouth, use in zip(looks.head, looks.mouth, closed):
        if use.sum() > 1:
            head = head[use] - head[use].mean(0)
            both += (head * (mouth[use] - mouth[use].mean(0))).sum()
            moved += (head**2).sum()
    return both / moved if moved > 1 else None


def picture_figures(ruler: Ruler, films: Film, features: Features, begin: int, end: int) -> dict:
    """Figures of face, clothes and background from second begin to end."""
    silence, fps = ruler.cfg.silence, ruler.cfg.fps
    window = slice(begin * fps, end * fps)
    looks = Look(*[part[:, window] for part in features.looks])
    spoken = (features.letters if films.symbols is None else films.symbols)[:, window]
    right = (looks.mouths == ruler.mouth_reader.groups[spoken])[spoken != silence]
    eyes = eye_colours(features, begin * fps, end * fps)
    eyes = eyes[np.isfinite(eyes).all((1, 2))]
    back = features.colours[:, begin:end, :3].mean(1)
    return {
        "iris": 255 * np.ptp(eyes.mean(1), axis=-1).mean() if len(eyes) else None,
        "iris_difference": 255 * np.abs(eyes[:, 0] - eyes[:, 1]).mean() if len(eyes) else None,
        "saturation": (np.ptp(back, axis=-1) / (back.max(-1) + 1e-6)).mean(),
        "stripes": stripes_of(features.clothes[:, begin:end].mean(1)).mean(),
        "mouth_letters": right.mean() if right.size else None,
        "lopsided": (looks.asymmetry > LOPSIDED).mean(),
        "lips_follow": lips_follow(looks, features.mouths[:, window] < CLOSED),
        "flicker": features.flicker[:, window].mean(),
        "grain": features.grain[:, window].mean(),
    }


def score(ruler: Ruler, films: Film, reference: Film, names=tuple(FIGURES)) -> dict[str, list]:
    """All FIGURES of stacked films: a number a window, None where it does not apply.

    The first second is not scored. reference: other films, for the Frechet distances. names:
    figures that apply to these films at all.
    """
    cfg, figures = ruler.cfg, {name: [] for name in FIGURES}
    features, others = ruler.read(films), ruler.read(reference)
    for begin, end in windows_of(films.frames.shape[1] / cfg.fps):
        begin = max(begin, 1)
        start, stop = begin * cfg.fps, end * cfg.fps
        row = speech_figures(ruler, films, features, start, stop)
        row |= picture_figures(ruler, films, features, begin, end)
        row["palette"] = palette_distance(features, others, begin, end, cfg.fps)
        colours, halves = features.colours, slice(2 * begin, 2 * end)
        row["identity_drift"] = np.abs(colours[:, begin:end] - colours[:, :1]).mean()
        change = np.diff(films.frames[:, start:stop].astype(np.int16), axis=1)
        row["motion"] = np.abs(change).mean() / 255
        power = films.samples[:, start * 2 * cfg.hop : stop * 2 * cfg.hop] ** 2
        row["loudness_db"] = (10 * np.log10(power.mean(1) + 1e-10)).mean()
        for name in ("video", "audio"):
            own, other = getattr(features, name), getattr(others, name)
            spread = other.std((0, 1)) + 1e-6
            row[f"frechet_{name}"] = frechet(own[:, halves], other[:, halves], spread)
        for name, values in figures.items():
            value = row.get(name) if name in names else None
            values.append(None if value is None else round(float(value), 4))
    return figures
