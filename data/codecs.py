"""Films, and the two codecs that turn them into latents and back; a fork passes other codecs.

Letters as in mutual_forcing.py: B films, F frames, S latent frames, N tokens of one branch in a
latent frame.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mutual_forcing import Config, Controls, UserError, join


class Film(NamedTuple):
    """A film with its transcript, as the talker or a folder of clips gives it."""

    frames: np.ndarray  # uint8 (F, image, image, 3)
    samples: np.ndarray  # float32 (F sample_rate / fps,)
    symbols: np.ndarray  # int (margin + F + margin,): what is said before, during and after
    character: int  # index into cfg.characters; len(cfg.characters): an unknown person


class Codecs(nn.Module):
    """The two codecs of a model (the paper: two VAEs).

    Both are modules with encode(film) -> latents, and decode_next(latents, state) -> (part of the
    film, state), which decodes a film chunk by chunk: state is None for the first chunk, and then
    what the last call returned. Latents have about unit variance. video: uint8 frames (B, F, image,
    image, 3) and latents (B, S, N, video_dim). audio: float32 samples (B, n) and latents (B, S, N,
    audio_dim); its state is samples (B, m) that are not returned yet; the last ones end the film.
    """

    def __init__(self, video: nn.Module, audio: nn.Module):
        super().__init__()
        self.video, self.audio = video, audio


CELLS = 4  # cells of the video codec along one side of a token
CHANGE = 4.0  # gain of the video codec on the change between the frames of a latent frame


class ResidualBlock(nn.Module):
    """Two convolutions, added to what they read; it starts as the identity."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(self.norm(x)))))


class VideoCodec(nn.Module):
    """A small video VAE (the paper has Wan 2.2's): each frame alone becomes a grid of cells.

    A video token holds 4 x 4 cells of each frame of a latent frame. Our choice: frames are encoded
    one by one, because an encoder of pairs shares one mouth between its frames. Nothing is carried
    from one latent frame to the next, so a film is decoded as it comes. Latents are the encoder's
    means, normalised by running statistics of training. Our choice: of a latent frame's later
    frames they hold the change, enlarged, because neighbours are nearly alike.
    """

    def __init__(self, cfg: Config, fine: int = 48, coarse: int = 128):
        """fine, coarse: channels at half of a cell and at a cell."""
        super().__init__()
        self.cfg = cfg
        pixels, odd = divmod(cfg.image, 2 * CELLS * cfg.grid)  # along one side of half a cell
        channels, rest = divmod(cfg.video_dim, CELLS**2 * cfg.step_frames)
        if odd or rest or min(pixels, channels) < 1:
            sizes = f"{2 * CELLS * cfg.grid}, and video_dim of {CELLS**2 * cfg.step_frames}"
            raise UserError(f"VideoCodec: image must be a multiple of {sizes}")
        values = 3 * pixels**2
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(pixels),
            nn.Conv2d(values, fine, 3, padding=1),
            ResidualBlock(fine),
            nn.PixelUnshuffle(2),
            nn.Conv2d(4 * fine, coarse, 1),
            ResidualBlock(coarse),
            nn.Conv2d(coarse, 2 * channels, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(channels, coarse, 3, padding=1),
            ResidualBlock(coarse),
            ResidualBlock(coarse),
            nn.Conv2d(coarse, 4 * fine, 1),
            nn.PixelShuffle(2),
            ResidualBlock(fine),
            nn.Conv2d(fine, values, 3, padding=1),
            nn.PixelShuffle(pixels),
        )
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1))

    def distribution(self, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """uint8 (B, F, image, image, 3) -> pictures -1..1 (B F, 3, h, w); mean and log variance."""
        x = frames.flatten(0, 1).permute(0, 3, 1, 2).to(self.mean) / 127.5 - 1
        x = x.contiguous(memory_format=torch.channels_last)
        mean, log_variance = self.encoder(x).float().chunk(2, 1)
        return x, mean, log_variance.clamp(-20, 10)

    def loss(self, frames: Tensor, kl: float = 2e-5) -> tuple[Tensor, dict]:
        """Stage 0: frames as in distribution() -> (loss, logs); updates the running statistics."""
        x, mean, log_variance = self.distribution(frames)
        sample = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        error = self.decoder(sample).float() - x
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
        loss = error.square().mean() + 0.1 * error.abs().mean() + kl * divergence.mean()
        with torch.no_grad():
            self.mean.lerp_(mean.mean((0, 2, 3))[:, None, None], 0.01)
            variance = (mean - self.mean).square().mean((0, 2, 3))[:, None, None]
            self.std.copy_(self.std.square().lerp(variance, 0.01).sqrt())
        psnr = -10 * math.log10(error.square().mean().item() / 4)
        return loss, {"psnr": psnr, "kl": divergence.mean().item()}

    def encode(self, frames: Tensor) -> Tensor:
        """A whole film, uint8 (B, F, image, image, 3) -> latents (B, S, N, video_dim)."""
        _, mean, _ = self.distribution(frames)
        x = F.pixel_unshuffle((mean - self.mean) / self.std, CELLS)  # now a pixel is a token
        x = x.unflatten(0, (len(frames), -1, self.cfg.step_frames))  # (B, S, frames, C, grid, grid)
        x = torch.cat([x[:, :, :1], CHANGE * x.diff(dim=2)], 2)
        return x.flatten(4).flatten(2, 3).mT.contiguous()

    def decode_next(self, latents: Tensor, state=None) -> tuple[Tensor, None]:
        """The next latent frames (B, S, N, video_dim) of a film -> their uint8 frames, no state."""
        # (B, S, frames, C, grid, grid)
        x = latents.mT.unflatten(2, (self.cfg.step_frames, -1)).unflatten(4, (self.cfg.grid, -1))
        x = torch.cat([x[:, :, :1], x[:, :, 1:] / CHANGE], 2).cumsum(2)
        x = F.pixel_shuffle(x.flatten(0, 2), CELLS) * self.std + self.mean
        pixels = ((self.decoder(x.to(self.mean)) + 1) * 127.5).round().clamp(0, 255)
        pixels = pixels.to(torch.uint8).permute(0, 2, 3, 1)
        return pixels.unflatten(0, (len(latents), -1)), None


class AudioCodec(nn.Module):
    """Samples to companded MDCT spectra and back, exactly (the paper has an audio VAE).

    Spectrum k covers samples [(k - 1) hop, (k + 1) hop) under a sine window; the aliases of
    neighbours cancel. A coefficient c becomes sign(c) |c|^compand: otherwise a few peaks own the
    whole loss.
    """

    COMPAND, SCALE = 0.35, 6.4  # exponent; gain to about unit variance

    def __init__(self, cfg: Config):
        super().__init__()
        if cfg.audio_dim != cfg.hop:
            raise UserError(f"AudioCodec: audio_dim must be {cfg.hop}, the samples of a hop")
        self.cfg = cfg
        m = cfg.hop
        n = torch.arange(2 * m)[:, None]
        k = torch.arange(m)
        window = torch.sin(math.pi / (2 * m) * (n + 0.5))
        # The angle's turns are taken off in whole numbers: float32 is then exact enough.
        quarters = (2 * n + 1 + m) * (2 * k + 1) % (8 * m)
        cosines = torch.cos(math.pi / (4 * m) * quarters)
        self.register_buffer("basis", window * math.sqrt(2 / m) * cosines, persistent=False)

    def encode(self, samples: Tensor) -> Tensor:
        """A whole film (B, n) in [-1, 1], n in whole latent frames -> (B, S, N, audio_dim)."""
        cfg = self.cfg
        hops = F.pad(samples, (cfg.hop, 0)).unflatten(1, (-1, cfg.hop))
        with torch.autocast(samples.device.type, enabled=False):  # quiet sounds need all digits
            spectrum = torch.cat([hops[:, :-1], hops[:, 1:]], -1) @ self.basis
        companded = spectrum.sign() * spectrum.abs() ** self.COMPAND * self.SCALE
        return companded.unflatten(1, (-1, cfg.tokens))

    def decode_next(self, latents: Tensor, tail: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The next latent frames (B, S, N, audio_dim) of a film -> its next samples, and the state.

        The state is the samples (B, hop) that are still due: the next call adds to them, and at
        the end of a film they are its last. So the first call (tail None) returns one hop less.
        """
        m = self.cfg.hop
        latents = latents.to(self.basis)
        spectrum = latents.sign() * (latents.abs() / self.SCALE) ** (1 / self.COMPAND)
        halves = spectrum.reshape(len(latents), -1, m) @ self.basis.T  # (B, hops, 2 hop)
        samples = halves[:, :-1, m:] + halves[:, 1:, :m]
        if tail is not None:
            samples = torch.cat([(tail + halves[:, 0, :m])[:, None], samples], 1)
        return samples.flatten(1), halves[:, -1, m:].clone()


def make_codecs(cfg: Config) -> Codecs:
    """The codecs of train.py, sample.py and lab/. A fork passes its own to their main()."""
    return Codecs(VideoCodec(cfg), AudioCodec(cfg))


def stack(films: list[Film]) -> Film:
    """Films of equal length -> one Film of tensors, each with a first axis B."""
    return Film(*[torch.from_numpy(np.stack(part)) for part in zip(*films)])


def encode_films(cfg: Config, codecs: Codecs, films: Film) -> tuple[Tensor, Controls]:
    """Stacked films -> latents (B, S, E) and their controls, none of them dropped."""
    still = films.frames[:, :1].expand(-1, cfg.step_frames, -1, -1, -1)
    first_frame, expected = codecs.video.encode(still), (cfg.tokens, cfg.video_dim)
    if first_frame.shape[2:] != expected:
        sizes = tuple(first_frame.shape[2:])
        raise UserError(f"the codec makes latents of {sizes}, the model has {expected}: see Codecs")
    controls = Controls(
        symbols=films.symbols,
        character=films.character,
        first_frame=first_frame,
        has_first_frame=torch.ones_like(films.character).bool(),
    )
    return join(codecs.video.encode(films.frames), codecs.audio.encode(films.samples)), controls
