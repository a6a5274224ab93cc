"""Films, and the two codecs that turn them into latents and back. A fork replaces the codecs: see
make_codecs.

Letters as in mutual_forcing.py: B films, F frames, S latent frames, N tokens of one branch in a
latent frame.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mutual_forcing import Codecs, Config, Controls, check_latents, join


class Film(NamedTuple):
    """A film with its transcript, as the talker or a folder of clips gives it."""

    frames: np.ndarray  # uint8 (F, image, image, 3)
    samples: np.ndarray  # float32 (F sample_rate / fps,)
    symbols: np.ndarray  # int (margin + F + margin,): what is said before, during and after
    character: int  # index into cfg.characters; their number stands for an unknown person


class VideoCodec:
    """Frames to patch tokens and back, exactly (the paper has a video VAE).

    The eye sees errors as flicker and as seams between patches. So the tokens hold the change
    between two frames, and the difference of two pixels across a border of patches, both enlarged;
    decoding shrinks them again, and with them the model's errors in them. The enlargement across
    borders is the prefilter of a lapped transform: along each axis a pixel and its mirror image
    across the border are pushed apart, by cfg.seam at the border and less further away.
    """

    def __init__(self, cfg: Config, device="cpu"):
        self.cfg = cfg
        lap = torch.eye(cfg.image, dtype=torch.float32)
        for border in range(cfg.patch, cfg.image, cfg.patch):
            for k in range(cfg.patch // 2):
                pair = torch.tensor([border + k, border - k - 1])
                gain = max(1.0, cfg.seam / (k + 1))
                lap[pair] += (gain - 1) / 2 * (lap[pair] - lap[pair.flip(0)])
        self.lap = lap.to(device)  # (image, image), applied to rows and to columns
        self.unlap = lap.inverse().to(device)

    def encode(self, frames: Tensor) -> Tensor:
        """A whole film, uint8 (B, F, image, image, 3) -> latents (B, S, N, video_dim)."""
        cfg = self.cfg
        x = torch.einsum("yh,bfhwc,xw->bfyxc", self.lap, frames.float() / 127.5 - 1, self.lap)
        x = x + (cfg.motion - 1) * x.diff(dim=1, prepend=x[:, :1])
        x = x.reshape(len(x), -1, cfg.step_frames, cfg.grid, cfg.patch, cfg.grid, cfg.patch, 3)
        return x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4).flatten(2, 3)

    def decode(self, latents: Tensor) -> Tensor:
        """Inverse of encode(), clipped to 0..255."""
        return self.decode_next(latents)[0]

    def decode_next(self, latents: Tensor, last: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The next latent frames (B, S, N, video_dim) of a film -> their uint8 frames, and the
        state.

        The state is the last frame, unrounded; it is passed to the next call (None at a film's
        start).
        """
        cfg = self.cfg
        x = latents.to(self.unlap)
        x = x.reshape(len(x), -1, cfg.grid, cfg.grid, cfg.step_frames, cfg.patch, cfg.patch, 3)
        x = x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(len(x), -1, cfg.image, cfg.image, 3)
        frames = []
        for frame in torch.einsum("yh,bfhwc,xw->bfyxc", self.unlap, x, self.unlap).unbind(1):
            last = frame if last is None else last.lerp(frame, 1 / cfg.motion)
            frames.append(last)
        pixels = ((torch.stack(frames, 1) + 1) * 127.5).round().clamp(0, 255)
        return pixels.to(torch.uint8), last


class AudioCodec:
    """Samples to companded MDCT spectra and back, exactly (the paper has an audio VAE).

    Spectrum k covers samples [(k - 1) hop, (k + 1) hop) under a sine window; the aliases of
    neighbours cancel. A coefficient c becomes sign(c) |c|^compand: otherwise a few peaks own the
    whole loss.
    """

    def __init__(self, cfg: Config, device="cpu"):
        self.cfg = cfg
        m = cfg.hop
        n = torch.arange(2 * m, dtype=torch.float64)[:, None]
        k = torch.arange(m, dtype=torch.float64)
        window = torch.sin(math.pi / (2 * m) * (n + 0.5))
        cosines = torch.cos(math.pi / m * (n + 0.5 + m / 2) * (k + 0.5))
        self.basis = (window * math.sqrt(2 / m) * cosines).float().to(device)  # (2 hop, hop)

    def encode(self, samples: Tensor) -> Tensor:
        """A whole film (B, n) in [-1, 1], n in whole latent frames -> (B, S, N, audio_dim)."""
        cfg = self.cfg
        hops = F.pad(samples, (cfg.hop, 0)).unflatten(1, (-1, cfg.hop))
        spectrum = torch.cat([hops[:, :-1], hops[:, 1:]], -1) @ self.basis
        companded = spectrum.sign() * spectrum.abs() ** cfg.compand * cfg.sound_scale
        return companded.reshape(len(samples), -1, cfg.audio_tokens, cfg.audio_dim)

    def decode(self, latents: Tensor) -> Tensor:
        """Inverse of encode(); the last hop fades out."""
        return torch.cat(self.decode_next(latents), 1)

    def decode_next(self, latents: Tensor, tail: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The next latent frames (B, S, N, audio_dim) of a film -> its next samples, and the state.

        The state is the samples (B, hop) that are still due: the next call adds to them, and at the
        end of a film they are its last. So the first call of a film (tail None) returns one hop
        less.
        """
        m = self.cfg.hop
        latents = latents.to(self.basis)
        spectrum = latents.sign() * (latents.abs() / self.cfg.sound_scale) ** (1 / self.cfg.compand)
        halves = spectrum.reshape(len(latents), -1, m) @ self.basis.T  # (B, hops, 2 hop)
        samples = halves[:, :-1, m:] + halves[:, 1:, :m]
        if tail is not None:
            samples = torch.cat([(tail + halves[:, 0, :m])[:, None], samples], 1)
        return samples.flatten(1), halves[:, -1, m:].clone()


def make_codecs(cfg: Config, device="cpu") -> Codecs:
    """The codecs of train.py, sample.py and lab/. A fork passes a function like this one to their
    main()."""
    return Codecs(VideoCodec(cfg, device), AudioCodec(cfg, device))


def stack(films: list[Film]) -> Film:
    """Films of equal length -> one Film of tensors, each with a first axis B."""
    frames, samples, symbols, characters = zip(*films)
    return Film(
        frames=torch.from_numpy(np.stack(frames)),
        samples=torch.from_numpy(np.stack(samples)),
        symbols=torch.from_numpy(np.stack(symbols)),
        character=torch.tensor(characters),
    )


def encode_films(cfg: Config, codecs: Codecs, films: Film) -> tuple[Tensor, Controls]:
    """Stacked films -> latents (B, S, E) and their controls, none of them dropped; on the films'
    device."""
    still = films.frames[:, :1].expand(-1, cfg.step_frames, -1, -1, -1)
    controls = Controls(
        symbols=films.symbols,
        character=films.character,
        first_frame=check_latents(cfg, codecs.video.encode(still)),
        has_first_frame=torch.ones_like(films.character).bool(),
    )
    return join(codecs.video.encode(films.frames), codecs.audio.encode(films.samples)), controls
