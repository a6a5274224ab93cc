"""Mutual Forcing (arXiv 2604.25819) in one file: a causal audio-video transformer that streams a
talking character, picture and sound together, in 4 or 8 network evaluations per chunk (and one
that writes the finished chunk into the cache).
Read it from top to bottom: each part uses only what stands above it.

The paper in six sentences. A transformer with an audio and a video branch, joined by one
self-attention, generates a film chunk by chunk and keeps what it generated in a KV cache. One set
of weights serves two modes. The multi-step mode predicts the instantaneous velocity of a flow from
noise to data, and takes about 50 small steps; the few-step mode predicts the average velocity over
an interval, and takes 4 or 8 large steps. Stage 1 trains each branch alone, and stage 2 couples
them on real history. In stage 3, Mutual Forcing, the few-step mode generates its own history, and
the multi-step mode learns the real chunk that follows it. Then the multi-step mode teaches the
few-step mode, by ShortCut and DMD.

The three stages in code (train.py adds batches, optimizers and the EMA copy of the model):

    # Stage 1: one branch alone; stage 2: both. The history is the real clip x itself.
    loss, logs = flow_matching_loss(model, x, x, controls, branches=("video",))
    loss, logs = flow_matching_loss(model, x, x, controls)
    # Stage 3. Its steps 1 to 4 are numbered in mutual_forcing_loss():
    #   1. history = rollout(model, x, ...)               the few-step mode generates; no gradient
    #   2. flow_matching_loss(model, x, history)          the multi-step mode learns the real chunk
    #   3. shortcut_loss(model, x, history, teacher=ema)  the few-step mode learns large steps
    #   4. dmd_loss(model, its films, real=ema, fake=fake); flow_matching_loss(fake, its films)
    losses, logs = mutual_forcing_loss(model, x, controls, teacher=ema, real=ema, fake=fake)
    # Self-Forcing, for comparison: DMD alone, toward a bidirectional teacher (stage 2 with
    # history None and a chunk as long as the clip).
    options = {"real": bidirectional, "fake": its_copy, "score_chunk": S, "weights": {"dmd": 1}}
    losses, logs = mutual_forcing_loss(model, x, controls, teacher=ema, **options)

Axes                                       Symbols
  B  films in a batch                        x       clean latents
  F  frames of the picture                   x_t     noised latents, (1 - t) noise + t x
  S  latent frames (cfg.step_frames frames)  t       time: 0 is noise, 1 is data
  N  tokens of one branch, one latent frame  d       step size; 0 selects the multi-step mode
  D  width; H heads; P values of a head      v       velocity; of the data: x - noise
  E  values of a latent frame (video's,      x_pred  the network's output: where v leads to at t = 1
     then audio's)

The network predicts x_pred, so v = (x_pred - x_t) / (1 - t), and a denoising step is
x_{t+d} = x_t + d v. Flow matching compares velocities; ShortCut and DMD compare x_pred. A chunk is
cfg.chunk latent frames. Times and step sizes are (B, S, 2): one for video and one for audio.
Departures from the paper are marked "our choice"; docs/departures.md lists them.
"""

import functools
import hashlib
import io
import math
import pickle
import unicodedata
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

BRANCHES = ("video", "audio")
ALPHABET = "abcdefghijklmnopqrstuvwxyz "  # the symbols of a transcript; the last one is silence


class UserError(ValueError):
    """A wrong argument or an unusable file. The message is one line, which the scripts print."""


@dataclass(frozen=True)
class Config:
    """Every size of a model and of its latents. The values are our choice: they fit a laptop.

    An int is taken for a float and a list for a tuple. Raises UserError with the name of the field
    that is wrong, and why.
    """

    width: int = 192  # D, values of a token
    layers: int = 6  # blocks; each has a video and an audio side
    heads: int = 3  # H, heads of the joint self-attention
    image: int = 64  # height and width of the picture in pixels
    fps: int = 16  # frames per second
    step_frames: int = 2  # frames of one latent frame
    patch: int = 16  # height and width of a video token in pixels
    sample_rate: int = 8000  # samples per second
    motion: float = 2.5  # gain of the video codec on the change between two frames
    seam: float = 4.0  # gain of the video codec on differences across a border of patches
    step_sounds: int = 4  # hops of sound in one latent frame
    bands: int = 2  # audio tokens of one hop: the low and the high half of its spectrum
    compand: float = 0.35  # exponent of the audio codec, which reduces the peaks of a spectrum
    sound_scale: float = 6.4  # gain of the audio codec, to about unit variance
    video_channels: int = 0  # values of a video token of another codec; 0: of VideoCodec
    audio_channels: int = 0  # values of an audio token of another codec; 0: of AudioCodec
    chunk: int = 4  # latent frames generated at a time: half a second
    window: int = 2  # chunks of history that a chunk sees, beside the first frame and the sink
    symbols: int = 27  # symbols of a transcript; the last one is silence
    margin: int = 4  # frames of transcript that a chunk sees before its start and after its end
    characters: tuple = ("ada", "bruno", "chen", "dora", "emil", "farah", "goro", "hana")
    clock: int = 16  # seconds after which the rotary phases of time repeat
    video_shift: float = 12.0  # shift of warp() for video
    audio_shift: float = 4.0  # shift of warp() for audio
    late: float = 0.99  # progress at which the last quarter of video's 4 or 8 steps begins

    def __post_init__(self):
        for field in fields(self):
            self._check_type(field.name, type(field.default))
        hop_is_whole = self.hop * self.step_sounds * self.fps == self.sample_rate * self.step_frames
        visible_frames = (self.window + 1) * self.chunk_frames
        for wrong, why in (
            (not 0.75 <= self.late < 1, "late must be between 0.75 and 1"),
            (self.motion < 1, "motion must be at least 1"),
            (self.layers > 999, "layers must be below 1000"),
            (self.clock_ticks >= 1e6, "clock is too long"),
            (self.image % self.patch, "patch must divide image"),
            (not hop_is_whole, "step_sounds must divide the samples of a latent frame"),
            (self.sample_rate % self.fps, "sample_rate must be a multiple of fps"),
            (self.hop % self.bands, "bands must divide the samples of a hop"),
            (self.width % (8 * self.heads), "width must be a multiple of 8 heads"),
            (
                2 * visible_frames > self.clock * self.fps,
                "clock must be twice as long as the window",
            ),
        ):
            if wrong:
                raise UserError(f"Config: {why}")

    def _check_type(self, name: str, kind: type):
        value = getattr(self, name)
        if kind is float and type(value) is int:
            object.__setattr__(self, name, float(value))
        elif kind is tuple and type(value) is list:
            object.__setattr__(self, name, tuple(value))
        elif type(value) is not kind:
            raise UserError(f"Config.{name} must be {kind.__name__}, not {type(value).__name__}")
        if kind is tuple and not all(type(item) is str for item in getattr(self, name)):
            raise UserError(f"Config.{name} must be strings")
        least = 0 if name.endswith("_channels") else 1e-9
        if kind is not tuple and not least <= value < 2**20:
            raise UserError(f"Config.{name} = {value} is out of range")

    def same_format(self, other: "Config") -> bool:
        """Whether models of both sizes make films of one format, from the same controls."""
        own = {name: getattr(self, name) for name in ("width", "layers", "heads", "window")}
        return replace(other, **own) == self

    @property
    def head_dim(self) -> int:  # P
        return self.width // self.heads

    @property
    def grid(self) -> int:  # video tokens along one side of the picture
        return self.image // self.patch

    @property
    def video_tokens(self) -> int:  # N of the video branch
        return self.grid**2

    @property
    def video_dim(self) -> int:  # values of a video token
        return self.video_channels or self.step_frames * self.patch**2 * 3

    @property
    def hop(self) -> int:  # samples between two spectra
        return self.sample_rate * self.step_frames // (self.fps * self.step_sounds)

    @property
    def audio_tokens(self) -> int:  # N of the audio branch
        return self.step_sounds * self.bands

    @property
    def audio_dim(self) -> int:  # values of an audio token
        return self.audio_channels or self.hop // self.bands

    @property
    def video_values(self) -> int:  # of a latent frame
        return self.video_tokens * self.video_dim

    @property
    def audio_values(self) -> int:  # of a latent frame
        return self.audio_tokens * self.audio_dim

    @property
    def latent_values(self) -> int:  # E
        return self.video_values + self.audio_values

    @property
    def shifts(self) -> Tensor:  # of warp(), (2,)
        return torch.tensor([self.video_shift, self.audio_shift], dtype=torch.float32)

    @property
    def clock_ticks(self) -> int:  # period of the rotary phases, in hops
        return self.clock * self.fps * self.step_sounds // self.step_frames

    @property
    def chunk_frames(self) -> int:
        return self.chunk * self.step_frames

    @property
    def chunk_seconds(self) -> float:
        return self.chunk_frames / self.fps

    @property
    def silence(self) -> int:  # the symbol of a pause
        return self.symbols - 1

    @property
    def unknown(self) -> int:  # the symbol of a frame whose transcript is not given
        return self.symbols


class Codecs(NamedTuple):
    """The two codecs of a model (data/codecs.py; the paper: two VAEs), both on the model's device.

    Each has encode(film) -> latents, decode(latents) -> film, and decode_next(latents, state) ->
    (part of the film, state), which decodes a film chunk by chunk: state is None for the first
    chunk, and then what the last call returned. Latents have about unit variance, and N and their
    sizes are those of Config. video: uint8 frames (B, F, image, image, 3) and latents
    (B, S, N, video_dim); its state may be anything.
    audio: float32 samples (B, n) and latents (B, S, N, audio_dim); its state is samples (B, m)
    still due (m may be 0), which end the film.
    """

    video: object
    audio: object


class Controls(NamedTuple):
    """What steers a film. Each control has a value that means "not given"; see dropped()."""

    symbols: Tensor  # (B, margin + F + margin) long, a symbol per frame; cfg.unknown: not given
    character: Tensor  # (B,) long, index into cfg.characters; their number: not given
    first_frame: Tensor  # (B, 1, N, video_dim), a picture as one latent frame
    has_first_frame: Tensor  # (B,) bool

    def map(self, function) -> "Controls":
        """Apply a function of one tensor to each of them."""
        return Controls(*[function(tensor) for tensor in self])

    def chunk(self, cfg: Config, index: int) -> "Controls":
        """The controls that chunk `index` sees: the transcript of its frames and the margins."""
        start = index * cfg.chunk_frames
        stop = start + cfg.chunk_frames + 2 * cfg.margin
        return self._replace(symbols=self.symbols[:, start:stop])

    def dropped(self, cfg: Config) -> "Controls":
        """The same films with nothing given: the null controls of guidance."""
        return self._replace(
            symbols=torch.full_like(self.symbols, cfg.unknown),
            character=torch.full_like(self.character, len(cfg.characters)),
            has_first_frame=torch.zeros_like(self.has_first_frame),
        )


def split(cfg: Config, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Latents (B, S, E) -> tokens of video (B, S, N, video_dim), of audio (B, S, N, audio_dim)."""
    video, audio = latents.split([cfg.video_values, cfg.audio_values], -1)
    return video.unflatten(-1, (-1, cfg.video_dim)), audio.unflatten(-1, (-1, cfg.audio_dim))


def check_latents(cfg: Config, latents: Tensor) -> Tensor:
    """Video latents (B, S, N, video_dim), as they are. Raises UserError for those of other sizes."""
    sizes, expected = tuple(latents.shape[2:]), (cfg.video_tokens, cfg.video_dim)
    if sizes != expected:
        raise UserError(f"the codec makes latents of {sizes}, the model has {expected}: see Codecs")
    return latents


def join(video: Tensor, audio: Tensor) -> Tensor:
    """Inverse of split()."""
    return torch.cat([video.flatten(2), audio.flatten(2)], -1)


# ---- Noise schedules -----------------------------------------------------------------------------
# One warp maps even progress u in 0..1 to time t, for the times of training and for all sampling
# grids.


def warp(u, shift):
    """Progress u in 0..1 -> time t in 0..1, moved toward noise by a shift above 1.

    Our choice: tokens are redundant, so most of a picture is visible early, at t = 0.25.
    """
    return u / (u + shift * (1 - u))


def time_grid(cfg: Config, steps: int) -> Tensor:
    """Times from 0 to 1 of a sampler with so many steps, for video and audio: (steps + 1, 1, 1, 2).

    The times of 4 steps are every other time of 8. Raises UserError for steps that are not 1 to 1000.
    """
    if not 1 <= steps <= 1000:
        raise UserError(f"steps must be between 1 and 1000, not {steps}")
    return warp(progress(cfg, steps), cfg.shifts)[:, None, None]


def progress(cfg: Config, steps: int) -> Tensor:
    """The grid before the warp (steps + 1, 2): even, but for the end of video's 4 or 8 steps.

    Our choice: their last quarter begins late (cfg.late), because its coarse steps make static
    regions flicker. Grids of more steps stay even: training hardly ever draws such late times.
    """
    u = torch.linspace(0, 1, steps + 1, dtype=torch.float32)
    late = cfg.late if steps <= 8 else 0.75
    video = torch.minimum(u * late / 0.75, 1 - (1 - u) * (1 - late) / 0.25)
    return torch.stack([video, u], -1)


def draw_times(cfg: Config, x: Tensor, chunk: int) -> Tensor:
    """Times to train clips x (B, S, E) at, one for each chunk and branch: (B, S, 2).

    Progress is logit-normal, then warped like the sampling grids. Our choice: in half of the chunks
    both branches have the same progress, and in the others the less noised one leads.
    """
    u = torch.sigmoid(1.2 * torch.randn((len(x), x.shape[1] // chunk, 2)))
    same = torch.rand(u.shape[:2]) < 0.5
    u[..., 1] = torch.where(same, u[..., 0], u[..., 1])
    return warp(u, cfg.shifts).repeat_interleave(chunk, 1).to(x)


def each_value(cfg: Config, pair: Tensor) -> Tensor:
    """A number for video and one for audio (..., 2) -> the number of each value (..., E)."""
    is_video = torch.arange(cfg.latent_values, device=pair.device) < cfg.video_values
    return torch.where(is_video, pair[..., :1], pair[..., 1:])


def add_noise(cfg: Config, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) noise + t x, for x and noise (B, S, E) and t (B or 1, S or 1, 2)."""
    return torch.lerp(noise, x, each_value(cfg, t))


def velocity(cfg: Config, x_pred: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """v = (x_pred - x_t) / (1 - t), as flow matching weighs it.

    Our choice: 1 - t is at least 0.2 here, so that an error of x_pred weighs at most 25 times as
    much as at t = 0. Samplers take the exact velocity: see denoise().
    """
    return (x_pred - x_t) / each_value(cfg, (1 - t).clamp(min=0.2))


# ---- The transformer: two branches, one joint self-attention (section 3.1) -----------------------


def sinusoid(x: Tensor, dim: int = 64) -> Tensor:
    """Numbers in 0..1 (...,) -> cosines and sines of dim / 2 frequencies (..., dim)."""
    index = torch.arange(dim // 2, device=x.device, dtype=torch.float32)
    frequencies = 10000 ** (index * -2 / dim)
    angles = 1000 * x[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


def uniform_embedding(count: int, width: int) -> nn.Embedding:
    """An embedding whose rows start uniform in +-1.7 (unit variance)."""
    return nn.Embedding.from_pretrained(torch.empty(count, width).uniform_(-1.7, 1.7), freeze=False)


class StepEmbedding(nn.Module):
    """Time t, step size d and the character -> the vector that modulates a latent frame's tokens.

    Our choice: d enters as f(d) - f(0), and the last layer of f starts at zero. So f adds nothing
    at d = 0, and gets no gradient before stage 3: until then the two modes are the same.
    """

    def __init__(self, width: int, characters: int):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.size = nn.Sequential(
            nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width, bias=False)
        )
        self.character = uniform_embedding(characters, width)

    def forward(self, t: Tensor, d: Tensor, character: Tensor) -> Tensor:
        """t, d (B, S) and character (B,) -> (B, S, D)."""
        like = self.character.weight
        t, d, zero = (
            sinusoid(t).to(like),
            sinusoid(d).to(like),
            sinusoid(torch.zeros_like(d)).to(like),
        )
        change = self.size[2](self.size[:2](d) - self.size[:2](zero))
        return F.silu(self.time(t) + change + self.character(character)[:, None])


class TextEmbedding(nn.Module):
    """The timed transcript -> what is added to the tokens of the same instant.

    Our choice: added, where the paper uses cross-attention. A frame sees the symbols of cfg.margin
    frames before and after it, because a mouth moves before its letter sounds.
    """

    def __init__(self, cfg: Config, tokens: int, instants: int):
        super().__init__()
        self.frames = cfg.step_frames
        self.instants = instants  # of a latent frame: 1 for video, the hops for audio
        self.tokens = tokens
        self.embed = uniform_embedding(cfg.symbols + 1, 64)
        self.near = nn.Conv1d(64, cfg.width, 2 * cfg.margin + 1)
        self.out = nn.Linear(cfg.step_frames * cfg.width, instants * cfg.width)

    def forward(self, symbols: Tensor) -> Tensor:
        """(B, margin + F + margin) -> (B, S, N, D); the tokens of an instant share theirs."""
        x = self.embed(symbols).transpose(1, 2)
        x = F.silu(self.near(x)).transpose(1, 2)  # (B, F, D)
        x = self.out(x.unflatten(1, (-1, self.frames)).flatten(2))  # (B, S, instants D)
        x = x.unflatten(-1, (self.instants, -1))
        return x.repeat_interleave(self.tokens // self.instants, 2)


@functools.cache
def rotary_table(cfg: Config, device: torch.device) -> tuple[Tensor, Tensor]:
    """The 3-D rotary embedding: cosines and sines of time and of place.

    Time is (clock_ticks, P / 4, 2), place (N, P / 4, 2). Half of the pairs of a head turn with
    time, in hops of sound, and half with the place in the picture. Our choice: each frequency makes
    a whole number of turns in cfg.clock seconds, so that positions stay bounded however long the
    film is.
    """
    pairs = cfg.head_dim // 4
    ticks = torch.arange(cfg.clock_ticks)
    turns = torch.logspace(1, math.log2(cfg.clock_ticks / 4), pairs, base=2, dtype=torch.float64)
    time = 2 * math.pi / cfg.clock_ticks * (ticks[:, None] * turns.round() % cfg.clock_ticks)
    rates = torch.logspace(0, -1, pairs // 2, dtype=torch.float64)
    row_and_column = torch.cartesian_prod(torch.arange(cfg.grid), torch.arange(cfg.grid))  # (N, 2)
    place = (row_and_column[..., None] * rates).flatten(1)
    time = torch.stack([time.cos(), time.sin()], -1).float()
    place = torch.stack([place.cos(), place.sin()], -1).float()
    return time.to(device), place.to(device)


def without_time(k: Tensor) -> Tensor:
    """Keys (..., P) with zeros in the half that turns with time: the same from any distance."""
    half = k.shape[-1] // 2
    return torch.cat([torch.zeros_like(k[..., :half]), k[..., half:]], -1)


def normalise(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm, modulated: tokens x (B, S, N, D), shift and scale (about 1) (B, S or 1, 1, D)."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:]), scale)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention: q (B, H, n, P), k and v (B, H, m, P), mask (n, m) bool -> (B, n, H P)."""
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":
        # On a CPU, PyTorch's fused attention takes three times as long in bf16 as these three
        # lines.
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if mask is not None:
            scores = scores.masked_fill(~mask, -1e9)
        out = scores.softmax(-1) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


class Side(nn.Module):
    """One branch's half of a block: its own projections, feed-forward and modulation."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.heads = cfg.heads
        self.qkv = nn.Linear(cfg.width, 3 * cfg.width, bias=False)
        self.out = nn.Linear(cfg.width, cfg.width, bias=False)
        self.feed = nn.Sequential(
            nn.Linear(cfg.width, 4 * cfg.width), nn.GELU(), nn.Linear(4 * cfg.width, cfg.width)
        )
        self.q_gain = nn.Parameter(torch.ones(cfg.head_dim))
        self.k_gain = nn.Parameter(torch.ones(cfg.head_dim))
        self.offset = nn.Parameter(torch.zeros(6, 1, cfg.width))  # of this block's modulation

    def modulate(self, shared: Tensor) -> tuple[Tensor, ...]:
        """Shared modulation (B, S, 1, 6 D) -> shift, scale, gate of attention, of feed-forward."""
        six = shared.unflatten(-1, (6, -1)) + self.offset[:, 0]
        shift1, scale1, gate1, shift2, scale2, gate2 = six.unbind(-2)
        return shift1, scale1 + 1, gate1, shift2, scale2 + 1, gate2  # each (B, S, 1, D)

    def project(self, x: Tensor, modulation) -> tuple[Tensor, Tensor]:
        """Tokens (B, S, N, D) -> q, k, v (B, S N, 3, H, P) and gains of q and k (S N, 2, P)."""
        shift, scale = modulation[:2]
        qkv = self.qkv(normalise(x, shift, scale)).flatten(1, 2)
        gain = torch.stack([self.q_gain, self.k_gain]).expand(qkv.shape[1], -1, -1)
        return qkv.unflatten(-1, (3, self.heads, -1)), gain

    def finish(self, x: Tensor, attended: Tensor, modulation) -> Tensor:
        """Tokens (B, S, N, D) and attention's output (B, S N, D) -> tokens after the block."""
        _, _, gate1, shift2, scale2, gate2 = modulation
        x = torch.addcmul(x, gate1, self.out(attended.reshape(x.shape)))
        return torch.addcmul(x, gate2, self.feed(normalise(x, shift2, scale2)))


class Branch(nn.Module):
    """All that belongs to one modality: embedding, side of every block, output, modulation."""

    def __init__(self, cfg: Config, tokens: int, values: int, instants: int, gain: bool):
        super().__init__()
        width = cfg.width
        self.embed = nn.Linear(values, width)
        self.text = TextEmbedding(cfg, tokens, instants)
        self.place = nn.Parameter(torch.empty(tokens, width).uniform_(-0.03, 0.03))
        self.step = StepEmbedding(width, len(cfg.characters) + 1)
        self.modulation = nn.Linear(width, 6 * width)  # shared by the blocks
        self.sides = nn.ModuleList(Side(cfg) for _ in range(cfg.layers))
        self.head_modulation = nn.Linear(width, 2 * width)
        self.head = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, values)
        )
        self.gain = nn.Linear(width, values) if gain else None  # see read_out()
        # Blocks start as the identity, outputs at zero, and d without effect.
        zero = [self.modulation, self.head_modulation, self.head[-1], self.step.size[-1]]
        for layer in zero + ([self.gain] if gain else []):
            for weight in layer.parameters():
                nn.init.zeros_(weight)

    def modulate(self, t: Tensor, d: Tensor, character: Tensor) -> list[tuple[Tensor, ...]]:
        """t, d (B, S), character (B,) -> modulation of each block, shift and scale of output."""
        conditioning = self.step(t, d, character)[:, :, None]
        shared = self.modulation(conditioning)
        shift, scale = self.head_modulation(conditioning).chunk(2, -1)
        return [side.modulate(shared) for side in self.sides] + [(shift, scale + 1)]

    def read_out(self, tokens: Tensor, modulation, x_t: Tensor) -> Tensor:
        """Tokens (B, S, N, D) and their noised latents x_t (B, S, N, values) -> x_pred, like x_t.

        Our choice: sound has a gain on x_t. Early in noise a token loses the faint trace of x_t
        that tells a sound from silence.
        """
        x = normalise(tokens, *modulation[-1])
        x_pred = self.head(x).float()
        if self.gain is None:
            return x_pred
        return x_pred + self.gain(x).float() * x_t


class Tokens(NamedTuple):
    """Some tokens of one branch on their way through the blocks."""

    branch: Branch
    x: Tensor  # (B, S, N, D)
    modulation: list  # of Branch.modulate()
    phases: Tensor  # (S N, P / 2, 2), cosine and sine: the rotary phases


class ParallelAttention:
    """Who attends to whom in the parallel form: rows see columns (here with a window of 1):

                    columns:  first  sink   history   noised
                                             0 1 2    0 1 2
        rows:  first            x
               history 0        x            x
               history 1        x     x      x x
               history 2        x     x        x x
               noised 0         x                     x
               noised 1         x     x      x          x
               noised 2         x     x        x          x

    The sink is chunk 0 of the history once more, so that a chunk sees who speaks however short the
    window is. The sink and the first frame have no time: the half of their keys that turns with
    time is zero. So a film of any length has no position that
    training never saw (our choice).
    """

    def __init__(self, parts, first, chunks: int, window: int, has_history: bool):
        """parts: tokens of [history and] noised latents; first: [those of the first frame]."""
        self.num_first = sum(len(tokens.phases) for tokens in first)
        chunk_of = []  # the chunk of each token, for one kind (history or noised)
        for tokens in parts[: len(parts) // (2 if has_history else 1)]:
            size = len(tokens.phases) // chunks
            chunk_of.append(torch.arange(chunks).repeat_interleave(size))
        row, column = torch.cat(chunk_of)[:, None], torch.cat(chunk_of)[None]
        num_history = len(row) if has_history else 0
        self.history = slice(self.num_first, self.num_first + num_history)
        same = row == column
        mask = same
        if has_history:
            before = (row - window <= column) & (column < row)
            sink = (row > 0).expand(-1, int((column == 0).sum()))
            history_rows = torch.cat([sink, before | same, torch.zeros_like(same)], 1)
            noised_rows = torch.cat([sink, before, same], 1)
            mask = torch.cat([history_rows, noised_rows])
        device = parts[0].x.device
        self.mask = F.pad(mask, (self.num_first, 0), value=True).to(
            device
        )  # all see the first frame
        self.is_sink = (column[0] == 0)[:num_history].to(device)  # the tokens that the sink repeats

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (B, H, n, P) of [first | history | noised] -> what each saw (B, n, H P)."""
        n = self.num_first
        seen_by_first = attention(q[:, :, :n], k[:, :, :n], v[:, :, :n])
        sink_k = without_time(k[:, :, self.history][:, :, self.is_sink])
        sink_v = v[:, :, self.history][:, :, self.is_sink]
        k = torch.cat([k[:, :, :n], sink_k, k[:, :, n:]], 2)
        v = torch.cat([v[:, :, :n], sink_v, v[:, :, n:]], 2)
        return torch.cat([seen_by_first, attention(q[:, :, n:], k, v, self.mask)], 1)


class KVCache:
    """Keys and values of the chunks already generated: the streaming context buffer (section 3.1).

    Of each layer: [ current | first frame | sink | ring of `window` chunks ]. Each evaluation
    writes the keys and values of the current chunk, and attends to all that is visible. A commit,
    at t = 1 and d = 0, also writes them into the oldest place of the ring, and those of chunk 0
    into the sink. Keys are stored after their rotation, because the rotary phases are periodic.
    Raises UserError for a window that training never saw.
    """

    def __init__(self, cfg: Config, batch: int, window: int | None = None):
        self.window = cfg.window if window is None else window
        if not 1 <= self.window <= cfg.window:
            raise UserError(
                f"window must be between 1 and {cfg.window} chunks, the most seen in training"
            )
        self.count = 0  # chunks committed
        self.size = cfg.chunk * (cfg.video_tokens + cfg.audio_tokens)  # tokens of a chunk
        self.sink_start = self.size + cfg.video_tokens
        self.ring_start = self.sink_start + self.size
        places = self.ring_start + self.window * self.size
        self.shape = (cfg.layers, batch, cfg.heads, places, cfg.head_dim)
        self.k = self.v = torch.empty(0)  # allocated by write_first_frame()

    def write_first_frame(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The first frame sees itself alone, and stays."""
        if layer == 0:
            self.k, self.v = k.new_zeros(self.shape), k.new_zeros(self.shape)
        self.k[layer, :, :, self.size : self.sink_start] = k
        self.v[layer, :, :, self.size : self.sink_start] = v
        return attention(q, k, v)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The current chunk (B, H, n, P) sees itself and all that is kept."""
        self.k[layer, :, :, : self.size] = k
        self.v[layer, :, :, : self.size] = v
        stop = self.sink_start
        if self.count:
            stop = self.ring_start + min(self.count, self.window) * self.size
        return attention(q, self.k[layer, :, :, :stop], self.v[layer, :, :, :stop])

    def commit(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """attend(), and keep the current chunk; the oldest one is evicted."""
        attended = self.attend(layer, q, k, v)
        place = self.ring_start + self.count % self.window * self.size
        self.k[layer, :, :, place : place + self.size] = k
        self.v[layer, :, :, place : place + self.size] = v
        if self.count == 0:
            self.k[layer, :, :, self.sink_start : self.ring_start] = without_time(k)
            self.v[layer, :, :, self.sink_start : self.ring_start] = v
        return attended


class AudioVideoTransformer(nn.Module):
    """Two branches and one joint self-attention: noised latents in, clean ones out.

    forward() is the parallel form, for training: all chunks of a clip at once, under a mask.
    step() is the streaming form, for sampling: one chunk at a time, with a KVCache. They agree.
    """

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.video = Branch(cfg, cfg.video_tokens, cfg.video_dim, 1, gain=False)
        self.audio = Branch(cfg, cfg.audio_tokens, cfg.audio_dim, cfg.step_sounds, gain=True)
        # Stands in for the first frame of a film that is not given one.
        self.no_first = nn.Parameter(torch.empty(cfg.video_tokens, cfg.width).uniform_(-0.03, 0.03))

    @property
    def device(self) -> torch.device:
        return self.no_first.device

    def phases(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Positions of latent frames (S,) -> rotary phases of their video and audio tokens."""
        cfg = self.cfg
        time, place = rotary_table(cfg, positions.device)
        hops = torch.arange(cfg.step_sounds, device=positions.device)
        ticks = cfg.step_sounds * positions[:, None] + hops
        time = time[ticks % cfg.clock_ticks]  # (S, hops, P / 4, 2)
        place = place.expand(len(positions), -1, -1, -1)
        no_place = time.new_tensor([1.0, 0.0]).expand_as(
            time
        )  # sound has no place, and is not turned
        video = torch.cat([time[:, :1].expand_as(place), place], 2)
        audio = torch.cat([time, no_place], 2).repeat_interleave(cfg.bands, 1)
        return video.flatten(0, 1), audio.flatten(0, 1)  # (S N, P / 2, 2)

    def embed(self, x_t, t, d, controls, positions, branches=BRANCHES) -> dict[str, Tokens]:
        """Latents (B, S, E), t, d (B, S, 2), positions (S,) of latent frames -> tokens."""
        parts = {}
        latents = split(self.cfg, x_t.to(self.no_first))
        for i, (name, phases) in enumerate(zip(BRANCHES, self.phases(positions))):
            if name in branches:
                branch = getattr(self, name)
                x = branch.embed(latents[i].contiguous()) + (
                    branch.text(controls.symbols) + branch.place
                )
                modulation = branch.modulate(t[..., i], d[..., i], controls.character)
                parts[name] = Tokens(branch, x, modulation, phases)
        return parts

    def embed_first_frame(self, controls: Controls) -> Tokens:
        """The first frame, or what stands in for it: one clean latent frame of video.

        It has no rotary time: cosine and sine are zero, which erases that half of its keys.
        """
        given = self.video.embed(controls.first_frame.to(self.no_first))
        x = torch.where(controls.has_first_frame[:, None, None, None], given, self.no_first)
        t = x.new_ones((len(x), 1)).float()
        modulation = self.video.modulate(t, 0 * t, controls.character)
        place = rotary_table(self.cfg, x.device)[1]
        phases = torch.cat([torch.zeros_like(place), place], 1)  # no time
        return Tokens(self.video, x + self.video.place, modulation, phases)

    def blocks(self, parts: list[Tokens], attend) -> list[Tensor]:
        """Pass tokens through all blocks; attend(layer, q, k, v) is what the two forms differ in.

        q, k, v are (B, H, n, P), over the tokens of all parts. Returns the parts' tokens (B, S, N,
        D).
        """
        tokens = [part.x for part in parts]
        sizes = [len(part.phases) for part in parts]
        phases = torch.cat([part.phases for part in parts])
        for layer in range(self.cfg.layers):
            qkv, gain = [], []
            for part, x in zip(parts, tokens):
                projected = part.branch.sides[layer].project(x, part.modulation[layer])
                qkv.append(projected[0])
                gain.append(projected[1])
            q, k, v = self.rotate(torch.cat(qkv, 1), torch.cat(gain), phases)
            attended = attend(layer, q, k, v).split(sizes, 1)
            for i, part in enumerate(parts):
                side = part.branch.sides[layer]
                tokens[i] = side.finish(tokens[i], attended[i], part.modulation[layer])
        return tokens

    def rotate(self, qkv: Tensor, gain: Tensor, phases: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """qkv (B, n, 3, H, P), gain (n, 2, P), phases (n, P / 2, 2) -> q, k, v, each (B, H, n, P).

        Queries and keys are normalised (QK-norm), and their pairs are turned by the rotary phases.
        """
        x = F.normalize(qkv[:, :, :2].float(), dim=-1) * (gain[:, :, None] * self.cfg.head_dim**0.5)
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = phases[:, None, None].unbind(-1)
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1)
        q, k = turned.flatten(-2).to(qkv).unbind(2)
        return q.transpose(1, 2), k.transpose(1, 2), qkv[:, :, 2].transpose(1, 2)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        d: Tensor,
        controls: Controls,
        history: Tensor | None = None,
        chunk: int | None = None,
        branches=BRANCHES,
        window: int | None = None,
    ) -> Tensor:
        """Parallel form: every chunk of a clip at once, each given the history before it.

        x_t (B, S, E) noised latents; t, d (B or 1, S or 1, 2), the same within a chunk; history (B,
        S, E) clean latents, or None if a chunk sees only the first frame and itself. chunk: its
        length in latent frames (default cfg.chunk; S makes a bidirectional model). branches: one of
        the two for the unimodal models of stage 1. window: chunks of history, at most cfg.window
        (the default). Returns x_pred (B, S, E); of a branch that is left out, its x_t.
        """
        b, s = x_t.shape[:2]
        chunk = chunk or self.cfg.chunk
        assert s % chunk == 0, f"{s} latent frames are not a whole number of chunks of {chunk}"
        assert t.shape[-1] == d.shape[-1] == 2, (
            "t and d have one number for video and one for audio"
        )
        t, d = t.expand(b, s, 2), d.expand(b, s, 2)
        positions = torch.arange(s, device=x_t.device)
        noised = self.embed(x_t, t, d, controls, positions, branches)
        parts = list(noised.values())
        if history is not None:
            clean = self.embed(history, torch.ones_like(t), 0 * d, controls, positions, branches)
            parts = list(clean.values()) + parts
        window = self.cfg.window if window is None else window
        assert 1 <= window <= self.cfg.window, f"window {window} is not in 1..{self.cfg.window}"
        first = [self.embed_first_frame(controls)] if "video" in branches else []
        attend = ParallelAttention(parts, first, s // chunk, window, history is not None)
        tokens = self.blocks(first + parts, attend)
        out = dict(zip(BRANCHES, split(self.cfg, x_t)))
        for (name, part), x in zip(noised.items(), tokens[-len(noised) :]):
            out[name] = part.branch.read_out(x, part.modulation, out[name])
        return join(*out.values())

    @torch.no_grad()
    def start(self, controls: Controls, window: int | None = None) -> KVCache:
        """A cache that holds the first frame (or what stands in for it), and no chunk yet."""
        cache = KVCache(self.cfg, len(controls.character), window)
        self.blocks([self.embed_first_frame(controls)], cache.write_first_frame)
        return cache

    @torch.no_grad()
    def step(self, x_t, t, d, controls: Controls, cache: KVCache, commit: bool = False) -> Tensor:
        """Streaming form: one evaluation of the chunk that follows those in the cache.

        x_t (B, S, E), t and d (B or 1, 1, 2), the controls of the whole film -> x_pred (B, S, E).
        commit: also keep the chunk's keys and values; x_t is then the finished chunk, t = 1 and d =
        0.
        """
        cfg = self.cfg
        b, s = x_t.shape[:2]
        positions = cache.count * cfg.chunk + torch.arange(s, device=x_t.device)
        visible = controls.chunk(cfg, cache.count)
        parts = self.embed(x_t, t.expand(b, s, 2), d.expand(b, s, 2), visible, positions)
        tokens = self.blocks(list(parts.values()), cache.commit if commit else cache.attend)
        cache.count += int(commit)
        out = []
        for part, x, latents in zip(parts.values(), tokens, split(cfg, x_t)):
            out.append(part.branch.read_out(x, part.modulation, latents))
        return join(*out)


# ---- The denoising loop and the streaming sampler ------------------------------------------------


def denoise(cfg: Config, predict, x: Tensor, times: Tensor) -> list[Tensor]:
    """The one denoising loop: from x at times[0] to times[-1]. Returns the state at every time.

    predict(x_t, k) -> x_pred at times[k]. times (K + 1, B or 1, S or 1, 2) never fall, and only the
    last may be 1; where two are equal, the step between them changes nothing.
    """
    states = [x]
    for k in range(len(times) - 1):
        t, d = times[k], times[k + 1] - times[k]
        # x + d v with v = (x_pred - x) / (1 - t); a last step, d = 1 - t, ends on x_pred itself.
        x = x.lerp(predict(x, k), each_value(cfg, d / (1 - t)))
        states.append(x)
    return states


def generate(
    model: AudioVideoTransformer,
    controls: Controls,
    chunks: int,
    times: Tensor,
    *,
    few: bool = True,
    guidance: float = 1.0,
    window: int | None = None,
    generator: torch.Generator | None = None,
    clips: Tensor | None = None,
    num_real_chunks: int = 0,
    teacher_forcing: bool = False,
):
    """Generate films through the cache; yields the states of each chunk (see denoise).

    times (K + 1, B or 1, 1, 2). few: tell the network the step size d, or 0 (multi-step mode). A
    guidance other than 1 doubles the batch by films without controls. Training (see rollout) gives
    real clips (B, S, E): the first num_real_chunks stand as they are; each other chunk starts from
    its real one, plus the mean error of the chunk before, noised to times[0]. So errors add up, but
    the content stays the clip's (our choice). teacher_forcing: the cache keeps the real chunks.
    """
    cfg, device = model.cfg, model.device
    times = times.to(device)
    sizes = times.diff(dim=0) * few
    copies = 1 if guidance == 1 else 2
    b = len(controls.character)
    if copies == 2:
        null = controls.dropped(cfg)
        controls = Controls(*[torch.cat(pair) for pair in zip(controls, null)])
    cache = model.start(controls, window)
    clean, zero = torch.ones_like(times[-1]), torch.zeros_like(times[-1])
    error = 0

    def per_copy(x):  # (B or 1, ...) -> (copies B or 1, ...)
        return x.repeat(copies, 1, 1) if len(x) > 1 else x

    def predict(x_t, k):
        doubled = x_t.repeat(copies, 1, 1)
        x_pred = model.step(doubled, per_copy(times[k]), per_copy(sizes[k]), controls, cache)
        if copies == 1:
            return x_pred
        x_pred, x_null = x_pred.chunk(2)
        return torch.lerp(x_null, x_pred, guidance)

    for index in range(chunks):
        # A CPU generator's noise is the same on every device.
        noise_device = generator.device if generator else device
        shape = (b, cfg.chunk, cfg.latent_values)
        x = torch.randn(shape, generator=generator, device=noise_device, dtype=times.dtype)
        x = x.to(device)
        if clips is not None:
            real = clips[:, index * cfg.chunk : (index + 1) * cfg.chunk]
            x = add_noise(cfg, real + error, x, times[0])
        if index < num_real_chunks:
            states = [real] * len(times)
        else:
            states = denoise(cfg, predict, x, times)
        yield states
        if clips is not None and not teacher_forcing:
            error = (states[-1] - real).mean(1, keepdim=True)
        if index < chunks - 1:  # nobody reads what the last chunk would commit
            finished = (real if teacher_forcing else states[-1]).repeat(copies, 1, 1)
            model.step(finished, per_copy(clean), per_copy(zero), controls, cache, commit=True)


def spell(text: str, frames: int = 3) -> list[int]:
    """Text -> a symbol per frame: letters a to z last so many frames, all else is a pause.

    Accents are dropped: an e with an accent is an e.
    """
    symbols = []
    for character in unicodedata.normalize("NFKD", text.lower()):
        if not unicodedata.combining(character):
            letter = character if character in ALPHABET else " "
            symbols += [ALPHABET.index(letter)] * frames
    return symbols


def film_controls(
    cfg: Config,
    codecs: Codecs,
    chunks: int,
    transcript=None,
    character=None,
    first_frame=None,
    device="cpu",
) -> Controls:
    """Controls of one film on the device of the codecs; see stream(). Raises UserError."""
    frames = chunks * cfg.chunk_frames
    symbols = torch.full((1, frames + 2 * cfg.margin), cfg.unknown)
    if transcript is not None:
        if isinstance(transcript, str) and cfg.symbols != len(ALPHABET):
            raise UserError("this model's symbols are not letters: give a symbol for each frame")
        said = spell(transcript) if isinstance(transcript, str) else list(transcript)
        said = torch.tensor(said).long()
        if ((said < 0) | (said > cfg.unknown)).any():
            raise UserError(f"symbols of a transcript are between 0 and {cfg.unknown}")
        symbols[:] = cfg.silence
        symbols[0, cfg.margin : cfg.margin + len(said)] = said[: frames + cfg.margin]
    names = (*cfg.characters, None)
    if character not in names and character not in range(len(names)):
        raise UserError(f"no character {character!r}; there are {', '.join(cfg.characters)}")
    index = names.index(character) if character in names else character
    shape = (cfg.image, cfg.image, 3)
    frame = torch.zeros(shape, dtype=torch.uint8)
    if first_frame is not None:
        frame = torch.tensor(np.array(first_frame))  # a copy, whatever its strides
    if frame.shape != shape or frame.dtype != torch.uint8:
        raise UserError(f"the first frame must be uint8, {cfg.image} x {cfg.image} x 3")
    still = frame.expand(1, cfg.step_frames, -1, -1, -1).to(device)
    given = torch.tensor([first_frame is not None])
    latent = check_latents(cfg, codecs.video.encode(still))
    controls = Controls(symbols, torch.tensor([index]), latent, given)
    return controls.map(lambda tensor: tensor.to(device))


def num_frames(cfg: Config, seconds: float) -> int:
    """Frames of a film. Raises UserError for less than one frame or more than a day."""
    if not 1 / cfg.fps <= seconds <= 24 * 3600:
        raise UserError(f"seconds must be between 1/{cfg.fps} and 86400, not {seconds}")
    return round(seconds * cfg.fps)


DEFAULT_STEPS = {"few": 4, "multi": 50}  # evaluations of a chunk in each mode


@torch.inference_mode()
def stream(
    model: AudioVideoTransformer,
    codecs: Codecs,
    *,
    seconds: float,
    transcript=None,
    character=None,
    first_frame=None,
    mode: str = "few",
    steps: int | None = None,
    guidance: float = 1.0,
    window: int | None = None,
    seed: int = 0,
):
    """Stream one film, chunk by chunk: yields frames and samples.

    Frames are uint8 (F, image, image, 3), samples float32 (n,). transcript: text (3 frames a
    letter), or a symbol for each frame (cfg.unknown where it is not known), followed by silence;
    None: no transcript, and the character babbles. character: a name, its index, or None.
    first_frame: a picture like the frames that are yielded. mode: "few" takes large steps and
    "multi" small ones; steps: 4 by default, 50 in multi-step mode. guidance: 1 is none. window:
    chunks of history, 1 to cfg.window. Memory does not grow with the length. The sound of a chunk
    comes one hop late, and the last chunk brings the rest. The first next() raises UserError for
    wrong arguments.
    """
    cfg = model.cfg
    if mode not in DEFAULT_STEPS:
        raise UserError(f"mode must be few or multi, not {mode!r}")
    steps = DEFAULT_STEPS[mode] if steps is None else steps
    if torch.is_autocast_enabled(model.device.type):
        raise UserError("stream() works outside torch.autocast: the model's own dtype decides")
    if not 0 <= guidance <= 1000 or not 0 <= seed < 2**63:
        raise UserError("guidance is between 0 and 1000, seed between 0 and 2^63")
    frames_left = num_frames(cfg, seconds)
    samples_left = frames_left * cfg.sample_rate // cfg.fps
    chunks = math.ceil(frames_left / cfg.chunk_frames)
    given = {"transcript": transcript, "character": character, "first_frame": first_frame}
    controls = film_controls(cfg, codecs, chunks, **given, device=model.device)
    generated = generate(
        model,
        controls,
        chunks,
        time_grid(cfg, steps),
        few=mode == "few",
        guidance=guidance,
        window=window,
        generator=torch.Generator().manual_seed(seed),
    )
    video_state = audio_state = None
    for states in generated:
        video, audio = split(cfg, states[-1])
        frames, video_state = codecs.video.decode_next(video, video_state)
        samples, audio_state = codecs.audio.decode_next(audio, audio_state)
        frames = frames[0, :frames_left].cpu().numpy()
        frames_left -= len(frames)
        samples = samples[0] if frames_left else torch.cat([samples[0], audio_state[0]])
        samples = samples[:samples_left].cpu().numpy()
        samples_left -= len(samples)
        yield frames, samples


# ---- The objectives ------------------------------------------------------------------------------
# Each is a function that returns (loss, logs). Flow matching compares velocities, the others
# x_pred.


def mean_error(term: str, cfg: Config, error: Tensor, branches=BRANCHES, generated=None):
    """Squared errors (B, S, E) -> sum of branches' means over `generated` (bool (S,)); logs."""
    if generated is not None:
        error = error[:, generated]
    means = {}
    for name, values in zip(BRANCHES, split(cfg, error)):
        if name in branches:
            means[f"{term}_{name}"] = values.mean()
    return sum(means.values()), {name: mean.item() for name, mean in means.items()}


def guided(model, x_t, t, d, controls, history, guidance, chunk=None) -> Tensor:
    """x_pred, moved away from the one without controls; guidance: a number, or (B, S, 2)."""
    x_pred = model(x_t, t, d, controls, history, chunk)
    if not torch.is_tensor(guidance) and guidance == 1:
        return x_pred
    x_null = model(x_t, t, d, controls.dropped(model.cfg), history, chunk)
    if torch.is_tensor(guidance):
        guidance = each_value(model.cfg, guidance)
    return x_null + guidance * (x_pred - x_null)


def flow_matching_loss(
    model,
    x: Tensor,
    history: Tensor | None,
    controls: Controls,
    *,
    generated: Tensor | None = None,
    chunk: int | None = None,
    branches=BRANCHES,
    window: int | None = None,
) -> tuple[Tensor, dict]:
    """The multi-step mode learns the chunks of x (B, S, E), each at its own time, given a history.

    Section 3.2; in stage 3 the history is self-made. On generated films, over the latent frames
    (bool (S,)) that were generated, it trains DMD's fake score. chunk, branches, window: see
    forward().
    """
    cfg = model.cfg
    t = draw_times(cfg, x, chunk or cfg.chunk)
    x_t = add_noise(cfg, x, torch.randn_like(x), t)
    x_pred = model(x_t, t, torch.zeros_like(t), controls, history, chunk, branches, window)
    error = (velocity(cfg, x_pred, x_t, t) - velocity(cfg, x, x_t, t)).square()
    loss, logs = mean_error("flow", cfg, error, branches, generated)
    # The loss by noise level: 0 near noise, 3 near data.
    for i, (name, values) in enumerate(zip(BRANCHES, split(cfg, error.detach()))):
        if name in branches and generated is None:
            borders = warp(torch.tensor([0.25, 0.5, 0.75]), cfg.shifts[i]).to(t)
            level = torch.bucketize(t[..., i].contiguous(), borders, right=True)
            for number in level.unique().tolist():
                logs[f"flow_{name}_level{number}"] = values[level == number].mean().item()
    return loss, logs


def shortcut_loss(
    model, x: Tensor, history: Tensor, controls: Controls, *, teacher=None, guidance: float = 1.0
) -> tuple[Tensor, dict]:
    """A large step of the few-step mode must land where smaller steps land (ShortCut, section 3.3).

    The large steps are those of the sampler's grids of 4 and 8 steps (our choice: longer ones
    damage both modes). Each is halved before the warp. A step of 4 is taught by two half steps of
    the few-step mode. A step of 8 is taught by one whole step at the velocity that the multi-step
    mode has half way (our choice: plain Euler steps lose energy). The last step of a grid differs,
    because it removes the last noise: audio's is taught by two half steps (in the grid
    of 8 by the multi-step mode), and video's by one step of the multi-step mode from an earlier
    time (our choice: against flicker).
    """
    cfg = model.cfg
    b, s = x.shape[:2]
    teacher = teacher or model

    # 1. Draw a step of one of the grids for each chunk; as many of either grid.
    grid4, grid8 = progress(cfg, 4), progress(cfg, 8)  # (5, 2) and (9, 2)
    start = torch.cat([grid4[:-1], grid4[:-1], grid8[:-1]])
    stop = torch.cat([grid4[1:], grid4[1:], grid8[1:]])
    chosen = torch.randint(len(start), (b, s // cfg.chunk)).repeat_interleave(
        cfg.chunk, 1
    )  # (B, S)
    is_last_of_video = (stop == 1) & torch.tensor([True, False])  # (steps, 2)
    teacher_start = torch.where(is_last_of_video, start.clamp(max=0.9), start)
    half = (teacher_start + stop) / 2
    # Video's last step is not halved: its first half has no length.
    middle = torch.where(is_last_of_video, teacher_start, half)
    corners = torch.stack([start, teacher_start, middle, stop])[:, chosen]  # (4, B, S, 2)
    t, t_begin, t_middle, t_end = warp(corners, cfg.shifts).to(x)

    # 2. Who teaches: the few-step mode (1) the steps of 4, the multi-step mode (0) all others. Only
    #    the multi-step mode is guided: the few-step mode has learned guidance already.
    is_of_grid4 = (chosen < len(start) - len(grid8[:-1]))[..., None]
    few = (is_of_grid4 & ~is_last_of_video[chosen]).to(x)  # (B, S, 2)
    scale = 1.0 if guidance == 1 else guidance + (1 - guidance) * few
    # 1: two half steps, one after the other. 0: one whole step at the velocity half way.
    two_halves = few.maximum((t_end == 1).to(x))

    # 3. Without gradient, the teacher goes from x_t at t_begin to t_end.
    noise = torch.randn_like(x)
    times = torch.stack([t_begin, t_middle, t_end])

    def predict(state, k):
        d = (times[k + 1] - times[k]) * few
        return guided(teacher, state, times[k], d, controls, history, scale)

    with torch.no_grad():
        x_begin = add_noise(cfg, x, noise, t_begin)
        x_middle = denoise(cfg, predict, x_begin, times[:2])[-1]
        v_middle = (predict(x_middle, 1) - x_middle) / each_value(cfg, 1 - t_middle)
        x_from = x_begin.lerp(x_middle, each_value(cfg, two_halves))
        t_from = t_begin.lerp(t_middle, two_halves)
        x_end = x_from + each_value(cfg, t_end - t_from) * v_middle
        # 4. The x_pred with which one step from x_t at t lands on x_end.
        x_t, d = add_noise(cfg, x, noise, t), t_end - t
        target = x_t + (x_end - x_t) * each_value(cfg, (1 - t) / d)
    error = model(x_t, t, d, controls, history) - target
    return mean_error("shortcut", cfg, error.square())


def dmd_loss(
    model,
    states: list[Tensor],
    history: Tensor,
    controls: Controls,
    *,
    real,
    fake,
    times: Tensor,
    generated: Tensor,
    guidance: float = 1.0,
    chunk: int | None = None,
) -> tuple[Tensor, dict]:
    """Move the few-step mode's films toward the real score, away from their own (DMD, 3.3).

    states: all states of the sampler on `times`, generated on this history without gradient;
    generated: bool (S,), the latent frames that it generated. One denoising step k is taken again
    with gradient (our choice). chunk: None, or the length of a clip, for bidirectional scores
    (Self-Forcing's teacher).
    """
    cfg = model.cfg
    score_history = history if chunk is None else None
    chunk = chunk or cfg.chunk

    # 1. Take step k again: the value is that of the film, the gradient that of this step. Our
    #    choice: video's gradient is scaled by the root of d / (1 - t), the share of x_pred that
    #    enters the state; audio's is not, for clearer letters.
    k = int(torch.randint(len(times) - 1, ()))
    t, d = times[k].to(states[0]), (times[k + 1] - times[k]).to(states[0])
    power = torch.tensor([0.5, 0.0]).to(t)
    share = each_value(cfg, (d / (1 - t)) ** power)
    x_pred = model(states[k], t, d, controls, history)
    x_own = states[-1] + share * (x_pred - x_pred.detach())

    # 2. Noise the film again; the gradient is the difference of the two scores there.
    with torch.no_grad():
        t = draw_times(cfg, x_own, chunk)
        x_t = add_noise(cfg, x_own, torch.randn_like(x_own), t)
        zero = torch.zeros_like(t)
        x_real = guided(real, x_t, t, zero, controls, score_history, guidance, chunk)
        x_fake = fake(x_t, t, zero, controls, score_history, chunk)
        # Divided by the mean error of the real score, for each chunk and branch, and at least 0.2.
        errors = [part.abs().mean((2, 3)) for part in split(cfg, x_own - x_real)]
        scale = torch.stack(errors, -1).unflatten(1, (-1, chunk)).mean(2).clamp(min=0.2)
        scale = each_value(cfg, scale.repeat_interleave(chunk, 1))
        target = x_own - (x_fake - x_real) / scale
    return mean_error("dmd", cfg, 0.5 * (x_own - target).square(), generated=generated)


@torch.no_grad()
def rollout(model, x: Tensor, controls: Controls, times: Tensor, history: str):
    """The few-step mode's own films of the clips x (B, S, E), through the streaming cache.

    history: "few" continues its own films after one real chunk (in clips of four chunks or more,
    one or two at random); "real" (teacher forcing) generates every chunk on real history. Returns
    all states of the sampler (see generate), and bool (S,): the latent frames that were generated.
    """
    chunk = model.cfg.chunk
    chunks = x.shape[1] // chunk
    num_real = 1 if history == "few" else 0
    films = generate(
        model,
        controls,
        chunks,
        times,
        clips=x,
        num_real_chunks=num_real,
        teacher_forcing=history == "real",
    )
    states = [torch.cat(parts, 1) for parts in zip(*films)]
    return states, torch.arange(x.shape[1], device=x.device) >= num_real * chunk


def deal_rows(b: int, weights: dict) -> dict[str, Tensor]:
    """Deal the b rows of a batch in turn to the terms that weigh something: {term: its rows}."""
    terms = [term for term, weight in weights.items() if weight]
    rows = {}
    for i, term in enumerate(terms):
        rows[term] = torch.arange(i, max(b, i + 1), len(terms)) % b  # too few rows serve twice
    return rows


WEIGHTS = {"flow": 0.3, "shortcut": 2 / 3, "dmd": 1 / 3}  # the paper's, but for flow: see below


def mutual_forcing_loss(
    model,
    x: Tensor,
    controls: Controls,
    *,
    teacher,
    real,
    fake,
    weights: dict = WEIGHTS,
    extra: dict | None = None,
    history: str = "few",
    steps: int = 4,
    guidance: float = 1.0,
    score_chunk: int | None = None,
) -> tuple[dict, dict]:
    """One training step of stage 3 on real clips x (B, S, E) (section 3.3): ({term: loss}, logs).

    teacher: the model's EMA copy, whose two modes teach (our choice). real: DMD's real score, the
    teacher or another model (Self-Forcing's, whose chunk is score_chunk). fake: the online
    fake-score model, or None if DMD weighs 0. weights: {term: weight}; a term of weight 0 is not
    computed. extra: a fork's own objectives, {term: (weight, loss)} with loss(model, x, history,
    controls) -> (loss, logs). history: "few" is self-made, "real" is teacher forcing. steps: of the
    rollout and of DMD. Our choice: the rows of the batch are dealt to the terms in turn, so that
    each costs a third of it, and flow matching weighs less, because its gradient is noisier.
    Raises UserError for clips of fewer than two chunks, an unknown history or an unknown term.
    """
    cfg = model.cfg
    if x.shape[1] < 2 * cfg.chunk:
        raise UserError("clips must be at least two chunks long: one real, one to generate")
    if history not in ("few", "real"):
        raise UserError(f"history must be few or real, not {history!r}")
    if weights.keys() - WEIGHTS or (extra or {}).keys() & {*WEIGHTS, "fake"}:
        raise UserError(f"weights are of {', '.join(WEIGHTS)}; extra objectives have other names")
    b, times, extra = len(x), time_grid(cfg, steps).to(x), extra or {}
    weights = weights | {term: weight for term, (weight, _) in extra.items()}
    rows, losses, logs = deal_rows(b, weights), {}, {}

    # 1. The few-step mode generates the history, without gradient. DMD's films begin from noise,
    # the others from the real chunk, noised to a time in the later half of the grid (our choice: a
    # film that has left its clip makes the real next chunk an impossible target).
    states, generated, past = None, None, x
    if history == "few" or "dmd" in rows:
        begin = times[torch.randint(steps // 2, steps, (b,))].squeeze(1)  # (B, 1, 2)
        begin[rows.get("dmd", [])] = 0
        states, generated = rollout(model, x, controls, torch.maximum(times, begin), history)
        past = states[-1] if history == "few" else x

    def given(term):  # the term's rows of clips, history and controls
        return x[rows[term]], past[rows[term]], controls.map(lambda c: c[rows[term]])

    # 2. The multi-step mode learns the real chunk, given that history.
    if "flow" in rows:
        losses["flow"], new = flow_matching_loss(model, *given("flow"))
        logs |= new

    # 3. The EMA copy teaches the few-step mode to take large steps.
    if "shortcut" in rows:
        options = {"teacher": teacher, "guidance": guidance}
        losses["shortcut"], new = shortcut_loss(model, *given("shortcut"), **options)
        logs |= new

    # 4. The few-step mode's films move toward the real score, and the fake score follows the films.
    if "dmd" in rows:
        _, own_history, own_controls = given("dmd")
        own = [state[rows["dmd"]] for state in states]
        options = {"real": real, "fake": fake, "guidance": guidance, "chunk": score_chunk}
        options |= {"times": times, "generated": generated}
        losses["dmd"], new = dmd_loss(model, own, own_history, own_controls, **options)
        score_history = own_history if score_chunk is None else None
        losses["fake"], fake_logs = flow_matching_loss(
            fake, own[-1], score_history, own_controls, generated=generated, chunk=score_chunk
        )
        logs |= new | {f"fake_{name}": fake_logs[f"flow_{name}"] for name in BRANCHES}

    # 5. A fork's own objectives.
    for term, (_, loss) in extra.items():
        if term in rows:
            losses[term], new = loss(model, *given(term))
            logs |= new
    return {term: weights.get(term, 1) * loss for term, loss in losses.items()}, logs


# ---- Checkpoints: one dict of tensors and plain types, followed by its SHA-256 -------------------

FORMAT = "mutual-forcing-4"


class CheckpointError(UserError):
    """A checkpoint cannot be used; the message says why, in one line."""


def replace_file(path, data: bytes) -> None:
    """Write a file so that path holds the old bytes or the new ones, never a half."""
    part = Path(f"{path}.unfinished")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def save_file(path, content: dict) -> None:
    """Write a dict of tensors and plain types, with its checksum."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    data = buffer.getvalue()
    replace_file(path, data + hashlib.sha256(data).digest())


def load_file(path) -> dict:
    """Read what save_file() wrote; runs no code from it. Raises CheckpointError."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    if hashlib.sha256(data[:-32]).digest() != data[-32:]:
        raise CheckpointError(f"{path}: not a checkpoint of this project, or a damaged one")
    try:
        content = torch.load(io.BytesIO(data[:-32]), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not a checkpoint of this project") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of this version ({FORMAT})")
    return content


def save_checkpoint(path, model: AudioVideoTransformer, extra: dict | None = None) -> None:
    """Store a model's config and its weights in half precision, with extra plain values.

    Raises CheckpointError, and writes nothing, for weights that are not finite in half precision.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    weights = {name: x.half() for name, x in model.state_dict().items()}
    for name, x in weights.items():
        if not x.isfinite().all():
            raise CheckpointError(f"{name} is not finite in half precision; {path} is not written")
    config = asdict(model.cfg)
    save_file(path, {"format": FORMAT, "config": config, "extra": extra or {}, "weights": weights})


def load_checkpoint(path) -> tuple[AudioVideoTransformer, dict]:
    """(model in fp32 on the CPU, ready for sampling; extra). Raises CheckpointError."""
    content = load_file(path)
    config, weights = content.get("config"), content.get("weights")
    if not isinstance(config, dict) or not isinstance(weights, dict):
        raise CheckpointError(f"{path}: holds no model")
    unknown = sorted(config.keys() - {field.name for field in fields(Config)})
    if unknown:
        raise CheckpointError(f"{path}: its config has unknown sizes {unknown}")
    try:
        cfg = Config(**config)
    except UserError as error:
        raise CheckpointError(f"{path}: {error}") from error
    with torch.device("meta"):
        model = AudioVideoTransformer(cfg)
    expected = model.state_dict()
    missing, unexpected = sorted(expected.keys() - weights), sorted(weights.keys() - expected)
    if missing or unexpected:
        raise CheckpointError(f"{path}: missing weights {missing}, unexpected weights {unexpected}")
    for name, x in weights.items():
        if not torch.is_tensor(x) or x.shape != expected[name].shape:
            sizes = tuple(expected[name].shape)
            raise CheckpointError(f"{path}: {name} is not a tensor of {sizes}")
        if not x.isfinite().all():
            raise CheckpointError(f"{path}: {name} is not finite")
    model.load_state_dict({name: x.float() for name, x in weights.items()}, assign=True)
    return model.eval().requires_grad_(False), content.get("extra", {})


# ---- The machine ---------------------------------------------------------------------------------


def find_device(name: str | None) -> torch.device:
    """The device of this name; None: cuda, else mps, else cpu. Raises UserError."""
    if name is None:
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        zero = torch.zeros(1, device=name)
        zero.item()
        return zero.device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: PyTorch cannot use it here") from error


def native_precision(device) -> torch.dtype:
    """bf16 where the device multiplies it natively, else fp32: a rule, no measurement."""
    native = False
    if torch.device(device).type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif torch.device(device).type == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if native else torch.float32
