"""A picture file -> the first frame of a film, as a viewer shows the picture."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray
from PIL import Image, ImageOps

from mutual_forcing import UserError

# What Pillow raises for a damaged file, for one that holds no picture, and for a giant
# one.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
WHITES = (1, 2**8 - 1, 2**16 - 1, 2**31 - 1, 2**32 - 1)  # of fractions; of whole numbers by bits


def grey_pixels(picture: Image.Image) -> tuple[ndarray, float]:
    """A grey picture of 16 or 32 bits -> uint8 (h, w, 3), and which value is taken for white.

    It is the largest value of 16 bits; of 32 bits, of the smallest kind of number that
    holds all.
    """
    values = np.asarray(picture)
    if picture.mode == "I" and values.min() < 0:
        values = values.view(np.uint32)  # Pillow has no mode for it
    values = np.nan_to_num(values.astype(np.float64), posinf=0, neginf=0)
    largest = {"F": values.max(), "I": max(2, values.max())}.get(picture.mode, WHITES[2])
    white = next((white for white in WHITES if largest <= white), largest)
    grey = (values * 255 / white).round().clip(0, 255).astype(np.uint8)
    return np.stack([grey] * 3, -1), white


def read_pixels(path: Path, report: Callable[[str], None]) -> ndarray:
    """A picture file, turned as its camera says -> uint8 (h, w, 3)."""
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
        if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
            pixels, white = grey_pixels(picture)
            report(f"{path}: of more than 8 bits; {white:g} is taken for white")
            return pixels
        if picture.getbands()[-1] in "Aa" or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            if picture.getextrema()[-1][0] < 255:
                report(f"{path}: what is transparent is shown on white")
                white = Image.new("RGBA", picture.size, "white")
                picture = Image.alpha_composite(white, picture)
        return np.array(picture.convert("RGB"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except DAMAGED as error:
        raise UserError(f"{path}: not a readable picture") from error


def read_picture(path: Path, size: int, report: Callable[[str], None]) -> ndarray:
    """A picture file -> its central square, uint8 (size, size, 3).

    report(line) is called for each change. Raises UserError for a file that holds no
    whole picture.
    """
    pixels = read_pixels(path, report)
    h, w = pixels.shape[:2]
    if (h, w) == (size, size):
        return pixels
    report(f"{path}: {w} x {h} cropped and resized to {size} x {size}")
    side = min(h, w)
    square = pixels[(h - side) // 2 :, (w - side) // 2 :][:side, :side]
    x = torch.from_numpy(square.copy()).permute(2, 0, 1)[None].float()
    x = torch.nn.functional.interpolate(x, (size, size), mode="bilinear", antialias=True)
    return x[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).numpy()
