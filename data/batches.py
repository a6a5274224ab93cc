"""Batches for training: films drawn by seed, encoded once, with some of their controls dropped."""

import numpy as np
import torch

from data.codecs import Codecs, Film, encode_films, stack
from mutual_forcing import Config, Controls

KEPT = 4000  # passes of a stage; their latents take 1.6 GB
DROPPED = {"transcript": 0.6, "character": 0.3, "first frame": 0.5}  # shares of the films


def frames_of(cfg: Config, seconds: float) -> int:
    """Frames of a clip of about this length, in whole chunks."""
    return max(1, round(seconds / cfg.chunk_seconds)) * cfg.chunk_frames


class Batches:
    """What each pass (turn) of a training stage gets: a function of seed and turn alone.

    So a run can go on from anywhere. draw(cfg, rng, frames) -> Film; seconds: lengths,
    in turn from step to step; batch: films in a pass of the first length; passes of longer
    films have fewer, at equal cost. passes: of a step; kept: passes whose latents are kept
    in memory.
    """

    def __init__(self, cfg: Config, draw, seed, seconds, batch: int, passes=1, kept=KEPT):
        self.cfg, self.draw, self.seed = cfg, draw, seed
        self.seconds, self.batch, self.passes = seconds, batch, passes
        self.kept, self.encoded = kept, {}

    def films(self, turn: int) -> Film:
        """New films, stacked."""
        seconds = self.seconds[turn // self.passes % len(self.seconds)]
        batch = max(1, round(self.batch * self.seconds[0] / seconds))
        frames = frames_of(self.cfg, seconds)
        rng = np.random.default_rng([*self.seed, turn])
        return stack([self.draw(self.cfg, rng, frames) for _ in range(batch)])

    def latents(self, turn: int, codecs: Codecs, device) -> tuple[torch.Tensor, Controls]:
        """Latents (B, S, E) and controls. The films of the first passes serve later ones, too.

        To draw and encode films takes nearly as long as to learn from them. Each time
        other controls are dropped, by chance: guidance and films without transcript
        need it.
        """
        key = turn % self.kept
        if key not in self.encoded:
            films = Film(*[part.to(device) for part in self.films(key)])
            x, controls = encode_films(self.cfg, codecs, films)
            small = controls._replace(first_frame=controls.first_frame.half())
            self.encoded[key] = [part.cpu() for part in (x.half(), *small)]
        x, *parts = [part.to(device) for part in self.encoded[key]]
        controls, null = Controls(*parts), Controls(*parts).dropped(self.cfg)
        shares = np.array(list(DROPPED.values()))[:, None]
        chance = np.random.default_rng([*self.seed, turn, 1]).random((3, len(x)))
        given = torch.from_numpy(chance > shares).to(device)
        has_transcript, has_character, has_first_frame = given
        return x.float(), Controls(
            symbols=torch.where(has_transcript[:, None], controls.symbols, null.symbols),
            character=torch.where(has_character, controls.character, null.character),
            first_frame=controls.first_frame.float(),
            has_first_frame=has_first_frame,
        )
