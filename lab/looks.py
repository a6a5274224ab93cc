"""What can be measured of the picture of one film of the talker.

Letters: F frames; h, w height and width of a part of the picture. Positions are (y, x) in units of
1/64 of the picture's side, y down. Pictures are brought to 64 x 64 pixels first, so that a unit is
a pixel. Colours are RGB in 0..1.
"""

from typing import NamedTuple

import numpy as np

from data.talker import LIPS, MOUTH, MOUTH_Y, THROAT, UNITS, talk
from mutual_forcing import Config

HEAD = 29, 32  # where the head's centre is on average
REACH = 5  # how far two frames of a head can be apart
BLOCK = 256  # frames that are read at a time
HALF = 10  # columns to either side of a mouth's centre in its window
ABOVE, BELOW = 8, 9  # rows above and below
TEACHERS = 8  # films of 8 seconds from which mouths are learnt; no other film has their seeds
RIDGE = 0.002  # added to the variances of the mouths' pixels


class Look(NamedTuple):
    """What is read of every frame of a film. Colours are 0..1; grey levels count to 255."""

    head: np.ndarray  # (F, 2), position, from the position in the middle frame
    mouth: np.ndarray  # (F, 2), position of the mouth's centre
    mouths: np.ndarray  # (F, k), pictures of mouths for MouthReader
    asymmetry: np.ndarray  # (F,), of mouth and chin, in grey levels
    irises: np.ndarray  # (F, 2, 3), colours of the left and the right; NaN if the eye is not open


def to_units(frames: np.ndarray) -> np.ndarray:
    """Frames (F, image, image, 3) of any size -> (F, 64, 64, 3), the nearest pixels."""
    size = frames.shape[1]
    if size == UNITS:
        return frames
    nearest = ((np.arange(UNITS) + 0.5) * size / UNITS).astype(int)
    return frames[:, nearest][:, :, nearest]


def cut(pictures: np.ndarray, corner: np.ndarray, height: int, width: int) -> np.ndarray:
    """Windows (F, height, width, k) of pictures (F, h, w, k), with corners (F, 2) between pixels.

    Pixels are interpolated linearly. A window that leaves its picture is moved back into it.
    """
    limit = np.array(pictures.shape[1:3]) - (height + 1, width + 1)
    corner = np.clip(np.nan_to_num(corner), 0, limit)
    whole = np.minimum(corner.astype(int), limit)
    down, right = (corner - whole).T.astype(np.float32)[:, :, None, None, None]
    frame = np.arange(len(pictures))[:, None, None]
    rows = (whole[:, :1] + np.arange(height + 1))[:, :, None]
    columns = (whole[:, 1:] + np.arange(width + 1))[:, None, :]
    window = pictures[frame, rows, columns]
    window = window[:, :-1] + down * (window[:, 1:] - window[:, :-1])
    return window[:, :, :-1] + right * (window[:, :, 1:] - window[:, :, :-1])


def centroid(weights: np.ndarray) -> np.ndarray:
    """Centres of gravity (F, 2) of weights (F, h, w)."""
    y, x = np.arange(weights.shape[1]), np.arange(weights.shape[2])
    total = weights.sum((1, 2)) + 1e-6
    return np.stack([weights.sum(2) @ y / total, weights.sum(1) @ x / total], 1)


def edges_of(frames: np.ndarray) -> np.ndarray:
    """Frames (F, 64, 64, 3) -> their changes down and across above the eyes (F, 22, 64, 3, 2)."""
    top = frames[:, :22].astype(np.float32)
    edges = np.zeros((*top.shape, 2), np.float32)
    edges[:, 1:-1, ..., 0] = top[:, 2:] - top[:, :-2]
    edges[:, 1:-1, 1:-1, :, 1] = top[:, 1:-1, 2:] - top[:, 1:-1, :-2]
    return edges


def head_moves(frames: np.ndarray, middle: np.ndarray) -> np.ndarray:
    """Where the head is (F, 2), from where it is in the frame middle, to about 0.1 units.

    The edges of hair and hat are compared with those of middle, moved by up to REACH.
    Everything above the eyes moves with the head or does not move.
    """
    edges = edges_of(frames)
    padded = np.pad(edges_of(middle[None])[0], [(REACH, REACH), (REACH, REACH), (0, 0), (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (22, UNITS), (0, 1))
    moved = np.moveaxis(windows[::-1, ::-1], (2, 3), (4, 5))  # (moves, moves, 22, 64, 3, 2)
    moved = moved.reshape((2 * REACH + 1) ** 2, -1)
    moved /= np.linalg.norm(moved, axis=1, keepdims=True) + 1e-6
    fit = (edges.reshape(len(edges), -1) @ moved.T).reshape(len(edges), 2 * REACH + 1, -1)
    return peak(fit) - REACH


def peak(fit: np.ndarray) -> np.ndarray:
    """Where each map (F, h, w) is highest, (F, 2): parabolas give the fraction."""
    frames, height, width = fit.shape
    y, x = np.divmod(fit.reshape(frames, -1).argmax(1), width)
    y, x, frame = np.clip(y, 1, height - 2), np.clip(x, 1, width - 2), np.arange(frames)
    before = np.stack([fit[frame, y - 1, x], fit[frame, y, x - 1]], 1)
    after = np.stack([fit[frame, y + 1, x], fit[frame, y, x + 1]], 1)
    bend = np.maximum(2 * fit[frame, y, x][:, None] - before - after, 1e-6)
    return np.stack([y, x], 1) + np.clip(0.5 * (after - before) / bend, -0.5, 0.5)


def unmix(pixels: np.ndarray, skin: np.ndarray) -> np.ndarray:
    """Pixels (..., 3) -> how much of each is lip and how much is throat, (..., 2); the rest: skin."""
    colours = np.stack([np.array(LIPS) - skin, np.array(THROAT) - skin]).astype(np.float32)
    return (pixels - skin) @ np.linalg.pinv(colours)


def find_mouth(frames: np.ndarray, skin: np.ndarray) -> np.ndarray:
    """Centres of mouths (F, 2): of gravity of all that is not skin, in a window that follows."""
    top, left = 28, 16
    box = frames[:, top:53, left:48].astype(np.float32) / 255
    cover = np.clip(unmix(box, skin).sum(-1) * 1.4 - 0.3, 0, 1)
    y, x = np.mgrid[: cover.shape[1], : cover.shape[2]]
    centre = np.tile(np.array([HEAD[0] + MOUTH_Y - top, HEAD[1] - left], float), (len(box), 1))
    for radius_y, radius_x in ((5, 7), (6, 8), (7, 9.5), (7, 9.5), (7, 9.5)):
        far_y = (y - centre[:, :1, None]) / radius_y
        far_x = (x - centre[:, 1:, None]) / radius_x
        inside = np.clip(3 * (1 - far_y**2 - far_x**2), 0, 1)
        found = inside * cover
        centre = np.where(found.sum((1, 2))[:, None] > 1, centroid(found), centre)
    return centre + (top, left)


def asymmetry_of(windows: np.ndarray) -> np.ndarray:
    """Windows around mouths (F, h, w, 3) -> mean difference of left and mirrored right half (F,)."""
    y = np.arange(-ABOVE, BELOW + 1) + MOUTH_Y
    wide = 13 * np.sqrt(np.maximum(1 - (y / 19) ** 2, 0)) - 1.5
    inside = np.abs(np.arange(-HALF, HALF + 1)) <= wide[:, None]
    inside[:4] = False  # the nose
    difference = np.abs(windows - windows[:, :, ::-1])[:, inside]
    return 255 * difference.mean((1, 2))


def find_irises(frames: np.ndarray, skin: np.ndarray) -> np.ndarray:
    """Colours (F, 2, 3) of the left and the right iris; NaN where the eye is not open.

    Whites give the eye's centre. From there a small window moves to the centre of what is dark.
    """
    band = frames[:, 18:35].astype(np.float32) / 255
    dark = 1 - band.mean(-1, keepdims=True)
    y, x = np.mgrid[-3:4, -3:4]
    near = np.clip(2.7 - np.sqrt(y**2 + x**2), 0, 1)
    irises = []
    for left in (18, 32):  # the first column of the eye's box
        pale = band[:, :, left : left + 14].min(-1)
        white = np.quantile(pale, 0.99)
        level = (skin.min() + white) / 2
        whites = np.clip((pale - level) / max(white - level, 1e-3), 0, 1)
        centre = centroid(whites) + (0, left)
        for _ in range(3):
            centre += centroid(cut(dark, centre - 3, 7, 7)[..., 0] ** 2 * near) - 3
        colour = np.einsum("fyxc,yx->fc", cut(band, centre - 2, 5, 5), IRIS)
        area = whites.sum((1, 2))
        is_open = area > 0.6 * np.quantile(area, 0.9)
        irises.append(np.where(is_open[:, None], colour, np.nan))
    return np.stack(irises, 1)


def iris_kernel() -> np.ndarray:
    """Weights (5, 5) by which the pixels around an iris' centre add up to the iris' colour.

    A pixel there is iris, pupil and white in known shares: a linear system for the three colours.
    """
    y, x = np.mgrid[-3:4, -3:4]
    radius = np.sqrt(y**2 + x**2)
    pupil, disc = (np.clip(0.5 + size - radius, 0, 1) for size in (0.8, 1.9))
    shares = np.stack([disc - pupil, pupil, 1 - disc])
    # cut() blurs: over all places between pixels, about a twelfth of a neighbour on either side.
    shares = (shares[:, :-2] + 10 * shares[:, 1:-1] + shares[:, 2:]) / 12
    shares = (shares[..., :-2] + 10 * shares[..., 1:-1] + shares[..., 2:]) / 12
    inside = radius[1:-1, 1:-1] < 2.5
    return np.linalg.pinv((shares * inside).reshape(3, -1))[:, 0].reshape(5, 5).astype(np.float32)


IRIS = iris_kernel()


def skin_of(frames: np.ndarray) -> np.ndarray:
    """Frames (F, 64, 64, 3) -> the most usual colour (3,) of the cheeks."""
    cheeks = np.concatenate([frames[:, 33:36, 24:28], frames[:, 33:36, 36:40]], 2)
    return np.median(cheeks.reshape(-1, 3), 0).astype(np.float32) / 255


def look(frames: np.ndarray, middle: np.ndarray, skin: np.ndarray) -> Look:
    """Frames uint8 (F, 64, 64, 3) -> what can be read of the face; middle: see head_moves()."""
    mouth = find_mouth(frames, skin)
    top, left = 28, 16
    face = frames[:, top:56, left:48].astype(np.float32) / 255
    corner = mouth - (ABOVE + top, HALF + left)
    windows = cut(face, corner, ABOVE + BELOW + 1, 2 * HALF + 1)
    mouths = unmix(windows[:, : 2 * ABOVE + 1], skin)
    mouths = np.clip((mouths + mouths[:, :, ::-1])[:, :, : HALF + 1] / 2, -0.5, 1.5)
    return Look(
        head=head_moves(frames, middle),
        mouth=mouth,
        mouths=mouths.reshape(len(frames), -1),
        asymmetry=asymmetry_of(windows),
        irises=find_irises(frames, skin),
    )


def look_at(film: np.ndarray) -> Look:
    """A film uint8 (F, 64, 64, 3) -> its Look, read in blocks of frames to save memory."""
    skin, middle = skin_of(film), film[len(film) // 2]
    blocks = np.array_split(film, -(-len(film) // BLOCK))
    looks = [look(block, middle, skin) for block in blocks]
    return Look(*[np.concatenate(part) for part in zip(*looks)])


def stills_of(film: np.ndarray, fps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A film uint8 (F, 64, 64, 3) -> flicker (F,) and grain (F,) of its background, and its
    clothes' mean brightness (seconds, h, w): all in grey levels."""
    sides = np.concatenate([film[:, 2:40, :6], film[:, 2:40, 58:]], 2).astype(np.int16)
    change = np.abs(np.diff(sides, axis=0, prepend=sides[:1])).mean((1, 2, 3))
    # Light changes evenly from the top to the bottom: a line is fitted to the rows' means.
    grey = sides.mean(-1)
    rows = np.stack([np.ones(38), np.linspace(-1, 1, 38)], 1)
    line = rows @ np.linalg.pinv(rows) @ grey.mean(2)[..., None]
    whole = film[: len(film) // fps * fps, 58:64, 21:43].mean(-1)
    clothes = whole.reshape(-1, fps, *whole.shape[1:]).mean(1)
    return change, (grey - line).std((1, 2)), clothes


def stripes_of(clothes: np.ndarray) -> np.ndarray:
    """Mean pictures of clothes (n, h, w) -> contrast of their stripes in percent (n,).

    It is the amplitude of a sine wave of the same variance, once a plane is subtracted.
    """
    y, x = np.mgrid[-1 : 1 : clothes.shape[1] * 1j, -1 : 1 : clothes.shape[2] * 1j]
    plane = np.stack([np.ones(y.size), y.ravel(), x.ravel()], 1)
    pixels = clothes.reshape(len(clothes), -1)
    rest = pixels - pixels @ (plane @ np.linalg.pinv(plane))
    return 100 * np.sqrt(2) * rest.std(1) / (pixels.mean(1) + 1e-6)


def letter_groups() -> np.ndarray:
    """The group of each symbol (27,): those whose mouths differ by less than half a unit."""
    groups, leaders = [], []
    for mouth in MOUTH * (4.7, 4.0):  # half of the height and of the width, in units
        near = [np.hypot(*(mouth - leader)) < 0.45 for leader in leaders]
        if not any(near):
            leaders.append(mouth)
            near.append(True)
        groups.append(near.index(True))
    return np.array(groups)


class MouthReader:
    """Reads the group of letters from a mouth's picture, by linear discriminant analysis."""

    def __init__(self, image: int):
        """Learn from pictures of this size, for a second."""
        self.groups, cfg = letter_groups(), Config(image=image)
        pictures, groups = [], []
        for i in range(TEACHERS):
            film = talk(cfg, np.random.default_rng([2**40, 2, i]), 8 * cfg.fps)
            pictures.append(look_at(to_units(film.frames)).mouths)
            groups.append(self.groups[film.symbols[cfg.margin : -cfg.margin]])
        pictures, groups = np.concatenate(pictures), np.concatenate(groups)
        means = [pictures[groups == group].mean(0) for group in range(groups.max() + 1)]
        means = np.stack(means).astype(np.float64)
        spread = np.cov((pictures - means[groups]).T) + RIDGE * np.eye(means.shape[1])
        self.weights = np.linalg.solve(spread, means.T)  # (k, groups)
        self.offset = (means.T * self.weights).sum(0) / 2

    def read(self, mouths: np.ndarray) -> np.ndarray:
        """Pictures of mouths (F, k), from look() -> groups (F,)."""
        return (mouths @ self.weights - self.offset).argmax(1)
