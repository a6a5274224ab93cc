"""Controls of films from text, names and pictures; and films of such controls."""

import unicodedata
from itertools import chain, islice, repeat

import numpy as np
import torch

import mutual_forcing as mf
from mutual_forcing import Config, Controls, UserError

ALPHABET = "abcdefghijklmnopqrstuvwxyz "  # the symbols of a transcript; the last one is silence


def spell(text: str, frames: int = 3) -> list[int]:
    """Text -> a symbol per frame: letters a to z last so many frames, all else is a pause.

    Accents are dropped: an e with an accent is an e.
    """
    symbols = []
    for letter in unicodedata.normalize("NFKD", text).lower():
        if not unicodedata.combining(letter):
            symbols += [ALPHABET.index(letter if letter in ALPHABET else " ")] * frames
    return symbols


def film_controls(model, codecs, transcript=None, character=None, first_frame=None):
    """Yield the controls of each chunk of one film, without end. Raises UserError.

    transcript: text (3 frames a letter), or any iterable of a symbol for each frame
    (cfg.unknown where it is not known), which may come while the film runs: it is read
    only to the end of the chunk and cfg.margin frames on. Silence follows it. None: no
    transcript, and the character babbles. character: a name, its index, or None.
    first_frame: a picture uint8 (image, image, 3).
    """
    cfg: Config = model.cfg
    if isinstance(transcript, str) and cfg.symbols != len(ALPHABET):
        raise UserError("this model's symbols are not letters: give a symbol for each frame")
    names = (*cfg.characters, None)
    if character not in names and character not in range(len(names)):
        raise UserError(f"no character {character!r}; there are {', '.join(cfg.characters)}")
    index = names.index(character) if character in names else int(character)
    shape = (cfg.image, cfg.image, 3)
    frame = torch.zeros(shape, dtype=torch.uint8)
    if first_frame is not None:
        frame = torch.tensor(np.array(first_frame))  # a copy, whatever its strides
    if frame.shape != shape or frame.dtype != torch.uint8:
        raise UserError(f"the first frame must be uint8, {cfg.image} x {cfg.image} x 3")
    still = frame.expand(1, cfg.step_frames, -1, -1, -1).to(model.device)
    rest = [
        torch.tensor([index]),
        codecs.video.encode(still),
        torch.tensor([first_frame is not None]),
    ]
    rest = [tensor.to(model.device) for tensor in rest]

    symbols, otherwise = transcript, cfg.silence
    if transcript is None:
        symbols, otherwise = [], cfg.unknown
    elif isinstance(transcript, str):
        symbols = spell(transcript)
    symbols = chain(symbols, repeat(otherwise))
    visible = [otherwise] * cfg.margin + list(islice(symbols, cfg.margin))
    while True:
        visible += islice(symbols, cfg.chunk_frames)
        if min(visible) < 0 or max(visible) > cfg.unknown:
            raise UserError(f"symbols of a transcript are between 0 and {cfg.unknown}")
        yield Controls(torch.tensor([visible], device=model.device), *rest)
        visible = visible[cfg.chunk_frames :]


def stream_film(model, codecs, *, transcript=None, character=None, first_frame=None, **options):
    """mutual_forcing.stream() with controls as film_controls() takes them. Raises UserError."""
    seconds, guidance, seed = options["seconds"], options.get("guidance", 1), options.get("seed", 0)
    if not 1 / model.cfg.fps <= seconds <= 24 * 3600:
        raise UserError(f"seconds must be between 1/{model.cfg.fps} and 86400, not {seconds}")
    if not 0 <= guidance <= 1000 or not 0 <= seed < 2**63:
        raise UserError("guidance is between 0 and 1000, seed between 0 and 2^63")
    controls = film_controls(model, codecs, transcript, character, first_frame)
    return mf.stream(model, codecs, controls, **options)
