"""The synthetic talker: random films of a drawn face that speaks, with exact transcripts.

Axes: F frames; 27 symbols (letters and silence); h and w, pixels of a part of the picture. Lengths
in the picture are in units of 1/64 of its side, whatever its size in pixels; y points down.
"""

import colorsys
from collections import namedtuple
from typing import NamedTuple

import numpy as np
from numpy import ndarray
from numpy.random import Generator, default_rng

from data.codecs import Film
from data.controls import ALPHABET
from mutual_forcing import Config, UserError

NAMES = Config().characters  # the named characters; len(NAMES) as an index: an unknown person
SILENCE = Config().silence  # a symbol; those below it are the letters

# How a letter looks and sounds: the mouth's opening and width (0..1), two resonances (Hz) and the
# loudness of the voice (0..1), the centre (Hz), bandwidth (Hz) and loudness (0..1) of a noise.
# Vowels are those of Peterson and Barney (1952), men: hod, head, heed, hawed, who'd. Consonants are
# near the values of Klatt (1980), chosen apart; j as in French, q as a deep k, x as in Scots loch.
Letter = namedtuple("Letter", "opening width formant_1 formant_2 voice centre bandwidth noise")
LETTER_TABLE = {
    "a": Letter(1.00, 0.55,  730, 1090, 1.0,     0,   1, 0.00),
    "b": Letter(0.00, 0.50,  180, 1100, 0.4,   650, 150, 0.40),
    "c": Letter(0.25, 0.60,    0,    0, 0.0,  2700, 200, 0.50),
    "d": Letter(0.30, 0.55,  180, 1750, 0.5,  3000, 150, 0.25),
    "e": Letter(0.55, 0.80,  530, 1840, 1.0,     0,   1, 0.00),
    "f": Letter(0.10, 0.50,    0,    0, 0.0,  2300, 950, 0.50),
    "g": Letter(0.40, 0.45,  180, 2100, 0.5,  1700, 150, 0.25),
    "h": Letter(0.60, 0.50,    0,    0, 0.0,  1100, 650, 0.50),
    "i": Letter(0.35, 0.95,  270, 2290, 0.9,     0,   1, 0.00),
    "j": Letter(0.30, 0.40,  250, 1850, 0.4,  2600, 400, 0.30),
    "k": Letter(0.45, 0.55,    0,    0, 0.0,  2000, 120, 0.50),
    "l": Letter(0.45, 0.70,  350, 1350, 0.7,     0,   1, 0.00),
    "m": Letter(0.00, 0.45,  250, 1100, 0.7,     0,   1, 0.00),
    "n": Letter(0.25, 0.60,  260, 1600, 0.7,     0,   1, 0.00),
    "o": Letter(0.80, 0.25,  570,  840, 1.0,     0,   1, 0.00),
    "p": Letter(0.00, 0.55,    0,    0, 0.0,   550, 120, 0.50),
    "q": Letter(0.35, 0.20,    0,    0, 0.0,  1300, 120, 0.50),
    "r": Letter(0.40, 0.35,  490, 1200, 0.8,     0,   1, 0.00),
    "s": Letter(0.15, 0.80,    0,    0, 0.0,  3600, 250, 0.50),
    "t": Letter(0.20, 0.65,    0,    0, 0.0,  3200, 120, 0.50),
    "u": Letter(0.45, 0.10,  300,  870, 1.0,     0,   1, 0.00),
    "v": Letter(0.10, 0.60,  220, 1000, 0.5,  2000, 900, 0.30),
    "w": Letter(0.25, 0.05,  300,  590, 0.8,     0,   1, 0.00),
    "x": Letter(0.30, 0.75,    0,    0, 0.0,  1700, 300, 0.50),
    "y": Letter(0.30, 0.90,  290, 2600, 0.8,     0,   1, 0.00),
    "z": Letter(0.15, 0.70,  220, 1400, 0.5,  3700, 250, 0.30),
    " ": Letter(0.00, 0.50,    0,    0, 0.0,     0,   1, 0.00),
}  # fmt: skip
LETTERS = np.array([LETTER_TABLE[letter] for letter in ALPHABET])  # (27, 8)
MOUTH = LETTERS[:, :2].astype(np.float32)  # (27, 2), opening and width of the mouth

UNITS = 64  # the side of the picture
EYE_Y, MOUTH_Y = -3, 10  # measured from the head's centre
TURN = 6.3  # one turn, in radians
WHITE, PUPIL, GLASSES = (0.97, 0.97, 0.97), (0.05, 0.05, 0.05), (0.12, 0.12, 0.12)
LIPS, THROAT = (0.75, 0.30, 0.30), (0.22, 0.05, 0.08)


class Identity(NamedTuple):
    """How a person looks and sounds. Colours are float32 RGB (3,) in 0..1."""

    skin: ndarray
    hair: ndarray
    eyes: ndarray
    cloth: ndarray
    background: ndarray  # (2, 3), the colours of its top and of its bottom
    face_width: float  # 0..1; it sets the pitch too: a wide face has a low voice
    fringe: float  # how far the hair hangs into the face, 0..1
    glasses: bool
    hat: bool
    tilt: float  # how much weaker the voice's high frequencies are, 0..1
    texture: ndarray  # (6,) in 0..1, for the patterns of cloth (three numbers) and hair (three)
    character: int  # index into NAMES; len(NAMES): an unknown person


def hsv(hue: float, saturation: float, value: float) -> ndarray:
    """A colour by hue, saturation and value in 0..1 -> float32 RGB (3,) in 0..1."""
    return np.array(colorsys.hsv_to_rgb(hue, saturation, value), np.float32)


def draw_identity(rng: Generator) -> Identity:
    """A random person; half are named characters, with fixed hair, hat, glasses, face and pitch."""
    character, fixed = len(NAMES), rng
    if rng.random() < 0.5:
        character = int(rng.integers(len(NAMES)))
        fixed = default_rng(1000 + character)
    light = rng.random()
    skin = (1 - light) * np.array([0.58, 0.38, 0.28]) + light * np.array([0.97, 0.80, 0.68])
    top = hsv(rng.random(), rng.uniform(0.15, 0.6), rng.uniform(0.5, 0.95))
    return Identity(  # the order of these lines is the order of the random draws
        skin=skin.astype(np.float32),
        eyes=hsv(rng.random(), 0.7, 0.55),
        cloth=hsv(rng.random(), rng.uniform(0.3, 0.8), rng.uniform(0.4, 0.9)),
        background=np.stack([top, top * rng.uniform(0.6, 0.9)]).astype(np.float32),
        texture=rng.random(6),
        tilt=rng.random(),
        hair=hsv(fixed.random(), fixed.uniform(0.2, 0.8), fixed.uniform(0.15, 0.75)),
        face_width=fixed.random(),
        fringe=fixed.random(),
        glasses=bool(fixed.random() < 0.3),
        hat=bool(fixed.random() < 0.3),
        character=character,
    )


def draw_symbols(rng: Generator, frames: int) -> ndarray:
    """A random transcript, int (F,): words of 2 to 6 letters of 2 to 4 frames, and pauses."""
    symbols = [SILENCE] * int(rng.integers(0, 5))
    letter = SILENCE
    while len(symbols) < frames:
        for _ in range(rng.integers(2, 7)):
            # A letter never follows itself: its second beginning could not be heard.
            letter = int(rng.choice([other for other in range(SILENCE) if other != letter]))
            symbols += [letter] * int(rng.integers(2, 5))
        symbols += [SILENCE] * int(rng.integers(2, 7))
    return np.array(symbols[:frames])


def letter_weights(symbols: ndarray) -> ndarray:
    """Symbols (F,) -> the weight of each symbol at quarters of frames, float32 (4 F + 1, 27)."""
    quarters = np.concatenate([[SILENCE] * 2, np.repeat(symbols, 4), np.repeat(symbols[-1:], 2)])
    one_hot = np.eye(len(ALPHABET), dtype=np.float32)[quarters]  # (4 F + 4, 27)
    times = len(quarters) - 3
    kernel = (0.125, 0.375, 0.375, 0.125)  # symbols blend over a frame, about 60 ms
    return sum(share * one_hot[i : i + times] for i, share in enumerate(kernel))


def mouth_of(symbols: ndarray) -> ndarray:
    """Symbols (F,) -> opening and width of the mouth at the middle of frames, float32 (F, 2)."""
    weights = letter_weights(symbols)
    return (weights[1:-1:4] + 2 * weights[2::4] + weights[3::4]) / 4 @ MOUTH


def pitch_of(who: Identity) -> int:
    """The pitch in units of sample_rate / hop (32 Hz): 7 for the narrowest face, 3: widest."""
    return 7 - int(who.face_width * 4.999)


def timbre(voice_hz: ndarray, noise_hz: ndarray, tilt: float) -> tuple[ndarray, ndarray]:
    """Amplitudes of each symbol: voice (27, n) at voice_hz (n,), noise (27, m) at noise_hz (m,)."""
    letters = Letter(*LETTERS.T[:, :, None])  # each field (27, 1)
    peak_1 = np.exp(-(((voice_hz - letters.formant_1) / 130) ** 2))
    peak_2 = np.exp(-(((voice_hz - letters.formant_2) / 180) ** 2))
    peaks = (peak_1 + 0.7 * peak_2 + 0.01) * 10 ** (-0.3 * tilt * voice_hz / 4000)
    voiced = 0.16 * letters.voice * peaks / np.sqrt((peaks**2).sum(1, keepdims=True))
    band = np.exp(-(((noise_hz - letters.centre) / letters.bandwidth) ** 2))
    noisy = 26 * letters.noise * band / np.sqrt((band**2).sum(1, keepdims=True) + 1e-9)
    return voiced, noisy


def voice(rng: Generator, who: Identity, symbols: ndarray, cfg: Config) -> ndarray:
    """The sound of symbols (F,): float32 samples (F sample_rate / fps,), about -1..1.

    A hop must last half a frame. A steady vowel repeats after each hop, because the
    pitch is a multiple of sample_rate / hop: so its spectra, as the audio codec makes
    them, are steady too.
    """
    hop, rate, pitch = cfg.hop, cfg.sample_rate, pitch_of(who)
    weights = letter_weights(symbols)[::2]  # (2 F + 1, 27), at the borders between hops
    count = int(0.95 * rate / 2 / (pitch * rate / hop))  # of harmonics: up to 95 % of rate / 2
    harmonics = np.arange(1, count + 1) * pitch
    noise_hz = np.arange(hop + 1) * rate / (2 * hop)
    voiced, noisy = timbre(harmonics * rate / hop, noise_hz, who.tilt)

    # The voice: one hop of sound for each border, repeated, and faded into the next border's.
    phases = np.pi * harmonics**2 / harmonics[-1]  # spread out, so that peaks do not add up
    angles = 2 * np.pi * np.outer(harmonics, np.arange(hop)) / hop + phases[:, None]
    amplitudes = (weights @ voiced).astype(np.float32)
    periods = amplitudes @ np.sin(angles).astype(np.float32)  # (2 F + 1, hop)
    fade = np.linspace(0, 1, hop, endpoint=False, dtype=np.float32)
    sound = (1 - fade) * periods[:-1] + fade * periods[1:]  # (2 F, hop)

    # The noise: two hops around each border, under a sine window; neighbours overlap by a hop.
    size = (len(weights), hop + 1)
    spectra = rng.standard_normal(size) + 1j * rng.standard_normal(size)
    window = np.sin(np.pi * np.arange(2 * hop) / (2 * hop))
    noise = np.fft.irfft(spectra * (weights @ noisy), axis=1) * window  # (2 F + 1, 2 hop)
    return (sound + noise[:-1, hop:] + noise[1:, :hop]).reshape(-1).astype(np.float32)


def ellipse(y: ndarray, x: ndarray, centre_y, centre_x, radius_y, radius_x) -> ndarray:
    """How much of the pixels at (y, x) an ellipse covers, float32 0..1; its rim is a unit wide."""
    distance = np.sqrt(((y - centre_y) / radius_y) ** 2 + ((x - centre_x) / radius_x) ** 2)
    cover = 0.5 + (1 - distance) * np.minimum(radius_y, radius_x)
    return np.clip(cover, 0, 1).astype(np.float32)


def paint(canvas: ndarray, cover: ndarray, colour, shade: ndarray | None = None) -> None:
    """Blend colour (3,) times shade (..., h, w) into canvas (..., 3, h, w) by cover (..., h, w)."""
    colour = np.asarray(colour, np.float32)[:, None, None]
    if shade is not None:
        colour = colour * shade[..., None, :, :]
    canvas += cover[..., None, :, :] * (colour - canvas)


def wander(rng: Generator, frames: int, fps: int, size: float) -> ndarray:
    """A slow random curve within +-size, float32 (F,): the mean of two sine waves below 0.6 Hz."""
    seconds = np.arange(frames)[:, None] / fps
    waves = np.sin(2 * np.pi * (rng.uniform(0.1, 0.6, 2) * seconds + rng.random(2)))
    return (size * waves.mean(1)).astype(np.float32)


def draw_moves(rng: Generator, frames: int, fps: int) -> dict[str, ndarray]:
    """Random moves of head and eyes, float32: on average a blink in 2.5 s, a new gaze in 1 s."""
    lids = np.zeros(frames + 2, np.float32)  # 0: open, 1: shut; a blink takes three frames
    gaze = np.zeros((frames, 2), np.float32)  # to the right and down, -1..1
    for f in range(frames):
        if rng.random() < 1 / (2.5 * fps):
            lids[f : f + 3] = np.maximum(lids[f : f + 3], (0.6, 1.0, 0.5))
        if f == 0 or rng.random() < 1 / fps:
            gaze[f:] = rng.uniform(-1, 1, 2)
    sway = wander(rng, frames, fps, 2.5)  # of the head, to the right
    nod = wander(rng, frames, fps, 2.0)  # of the head, down
    return {"sway": sway, "nod": nod, "lids": lids[:frames], "gaze": gaze}


def draw_still(who: Identity, size: int) -> ndarray:
    """What does not move: background, neck and clothes, float32 (3, size, size) in 0..1."""
    y, x = np.mgrid[:size, :size].astype(np.float32) * (UNITS / size)
    top, bottom = who.background[:, :, None, None]
    canvas = (1 - y / UNITS) * top + y / UNITS * bottom
    paint(canvas, ellipse(y, x, 50, 32, 12, 6.5), 0.85 * who.skin)
    angle = int(4 * who.texture[0]) * np.pi / 4  # 0, 45, 90 or 135 degrees
    across = (np.cos(angle) * x + np.sin(angle) * y) / (6 + 5 * who.texture[1])
    stripes = 0.8 + 0.2 * np.sin(TURN * (across + who.texture[2]))
    paint(canvas, ellipse(y, x, 72, 32, 16, 25), who.cloth, stripes.astype(np.float32))
    return canvas


def head_box(film: ndarray, moves: dict, top: int, bottom: int, left: int, right: int) -> tuple:
    """A part of a film (F, 3, h, w), a view, and its y and x from the head's centre (F, h, w)."""
    size = film.shape[-1]
    unit = UNITS / size  # the side of a pixel
    rows = slice(int(top / unit), int(bottom / unit))
    columns = slice(int(left / unit), int(right / unit))
    y, x = np.mgrid[:size, :size].astype(np.float32)[:, rows, columns] * unit
    head_y, head_x = 29 + moves["nod"][:, None, None], 32 + moves["sway"][:, None, None]
    return film[:, :, rows, columns], y - head_y, x - head_x


def draw_eyes(box: tuple, who: Identity, moves: dict, apart: float) -> None:
    """Paint eyes with lids and gaze, glasses, and the nose into what head_box() returns."""
    pixels, y, x = box
    lids = moves["lids"][:, None, None]
    gaze_x = 1.3 * moves["gaze"][:, 0, None, None]
    iris_y = EYE_Y + 0.7 * moves["gaze"][:, 1, None, None]
    for eye_x in (-apart, apart):
        eye = ellipse(y, x, EYE_Y, eye_x, 2.6 * (1 - lids) + 0.3, 3.4)
        eye = eye * np.minimum(1, 2.5 * (1 - lids))
        paint(pixels, eye, WHITE)
        paint(pixels, eye * ellipse(y, x, iris_y, eye_x + gaze_x, 1.9, 1.9), who.eyes)
        paint(pixels, eye * ellipse(y, x, iris_y, eye_x + gaze_x, 0.8, 0.8), PUPIL)
        paint(pixels, lids * ellipse(y, x, -2.6, eye_x, 0.6, 3.4), 0.6 * who.skin)
        if who.glasses:
            outside = ellipse(y, x, EYE_Y, eye_x, 4.6, 5.0)
            paint(pixels, outside - ellipse(y, x, EYE_Y, eye_x, 3.7, 4.1), GLASSES)
    paint(pixels, ellipse(y, x, 3.5, 0, 1.6, 1.8), 0.9 * who.skin)


def draw_frames(who: Identity, moves: dict[str, ndarray], mouth: ndarray, size: int) -> ndarray:
    """A talker's frames, uint8 (F, size, size, 3); mouth (F, 2): its opening and width, 0..1."""
    film = np.repeat(draw_still(who, size)[None], len(mouth), axis=0)
    radius = 13 + 4 * who.face_width  # half of the face's width

    # Each part is drawn in a rectangle that it cannot leave, the furthest first: hair, then face.
    pixels, y, x = head_box(film, moves, 4, 54, 8, 56)
    coarse, phase, fringe_phase = who.texture[3:]
    strands = 0.8 + 0.2 * np.sin(TURN * ((x + 0.25 * y) / (6 + 4 * coarse) + phase))
    paint(pixels, ellipse(y, x, -3, 0, 20, radius + 3.5), who.hair, strands)
    fringe = 6.5 + 5 * who.fringe - 2 * np.sin(0.35 * x + TURN * fringe_phase)
    paint(pixels, ellipse(y, x, 0, 0, 19, radius) * np.clip(fringe + y, 0, 1), who.skin)

    if who.hat:  # a cap with a dark band
        pixels, y, x = head_box(film, moves, 2, 24, 6, 58)
        cap = np.clip(-10 - y, 0, 1) * np.clip(radius + 4.5 - abs(x), 0, 1) * np.clip(y + 24, 0, 1)
        paint(pixels, cap, 0.6 * who.cloth)
        paint(pixels, cap * np.clip(y + 13, 0, 1), 0.35 * who.cloth)

    # Eyes and nose, then the lips, then the inside of the mouth.
    draw_eyes(head_box(film, moves, 19, 38, 14, 50), who, moves, 0.45 * radius)
    pixels, y, x = head_box(film, moves, 31, 50, 20, 44)
    opening, width = mouth[:, :1, None], mouth[:, 1:, None]  # (F, 1, 1)
    high, wide = 0.3 + 4.7 * opening, 3.0 + 4.0 * width
    paint(pixels, ellipse(y, x, MOUTH_Y, 0, high + 1.4, wide + 1.4), LIPS)
    paint(pixels, ellipse(y, x, MOUTH_Y, 0, high, wide) * np.minimum(1, 4 * opening), THROAT)
    return (np.clip(film, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(0, 2, 3, 1)


def talk(cfg: Config, rng: Generator, frames: int) -> Film:
    """A film of a random person who talks; a generator in the same state makes the same film.

    Raises UserError for sizes that the talker does not have.
    """
    sizes = (cfg.silence, len(cfg.characters), 2 * cfg.hop * cfg.fps)
    if sizes != (SILENCE, len(NAMES), cfg.sample_rate):
        raise UserError("the talker has 27 symbols, 8 characters, and 2 hops of sound a frame")
    who = draw_identity(rng)
    symbols = draw_symbols(rng, frames + cfg.margin)
    heard = symbols[:frames]  # the rest follows after the film
    pictures = draw_frames(who, draw_moves(rng, frames, cfg.fps), mouth_of(heard), cfg.image)
    symbols = np.pad(symbols, (cfg.margin, 0), constant_values=cfg.silence)
    return Film(pictures, voice(rng, who, heard, cfg), symbols, who.character)
