"""Batches for training: films drawn by seed, encoded, and with some of their controls dropped."""

import numpy as np
import torch
from torch.utils.data import Dataset

from data.codecs import Codecs, Film, encode_films, stack
from mutual_forcing import Config, Controls


def frames_of(cfg: Config, seconds: float) -> int:
    """Frames of a clip of about this length, in whole chunks."""
    return round(seconds / cfg.chunk_seconds) * cfg.chunk_frames


class Batches(Dataset):
    """The films of each pass of a training stage.

    Item `turn` is a function of seed and turn alone, so that a run can go on from
    anywhere: films (stacked, see data.codecs.stack) and numbers in 0..1 (3, B), by
    which film_batch() drops controls. draw(cfg, rng, frames) -> Film; seconds: lengths,
    in turn from step to step; batch: films of the first length, of longer ones so many
    fewer that a step costs the same.
    """

    def __init__(self, cfg: Config, draw, seed: list[int], seconds, batch: int, passes: int):
        self.cfg, self.draw, self.seed = cfg, draw, seed
        self.seconds, self.batch, self.passes = seconds, batch, passes

    def __getitem__(self, turn: int) -> tuple[Film, torch.Tensor]:
        seconds = self.seconds[turn // self.passes % len(self.seconds)]
        batch = max(1, round(self.batch * self.seconds[0] / seconds))
        rng = np.random.default_rng([*self.seed, turn])
        frames = frames_of(self.cfg, seconds)
        films = [self.draw(self.cfg, rng, frames) for _ in range(batch)]
        return stack(films), torch.from_numpy(rng.random((3, batch)))


def film_batch(model, codecs: Codecs, films: Film, chance: torch.Tensor, no_transcript: float):
    """Films -> latents (B, S, E) and controls on the model's device, some controls
    dropped by chance.

    Guidance and films without transcript need it. Dropped are the transcript in the
    share no_transcript of the films, the character in 0.3 and the first frame in 0.5.
    """
    films = Film(*[part.to(model.device) for part in films])
    x, controls = encode_films(model.cfg, codecs, films)
    limits = torch.tensor([[no_transcript], [0.3], [0.5]], dtype=chance.dtype)
    has_text, has_character, has_first_frame = (chance >= limits).to(model.device)
    null = controls.dropped(model.cfg)
    return x.to(model.place.dtype), Controls(
        symbols=torch.where(has_text[:, None], controls.symbols, null.symbols),
        character=torch.where(has_character, controls.character, null.character),
        first_frame=controls.first_frame,
        has_first_frame=has_first_frame,
    )
