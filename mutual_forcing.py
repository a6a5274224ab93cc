"""Mutual Forcing (arXiv 2604.25819) in one file: a causal audio-video transformer that streams a talking
character, picture and sound together, in 4 or 8 network evaluations per chunk. Read it leaf to root.

The paper in five sentences. A transformer of an audio and a video branch, joined by one self-attention, makes
a film chunk by chunk and keeps the chunks already made in a cache. One set of weights serves two modes: the
*multi-step* mode predicts the instantaneous velocity of a flow from noise to data (many small steps), the
*few-step* mode the average velocity over an interval (4 or 8 large steps). Stage 1 trains each branch alone,
stage 2 couples them on real history. In each step of stage 3, Mutual Forcing, the few-step mode rolls out a
history, and the multi-step mode learns the real chunk given that history. Then the multi-step mode, without
gradient, teaches the few-step mode: ShortCut (a step lands where smaller ones do) and DMD (scores match).

Axes                                          Symbols
  B  films in a batch    F  frames              x    clean latents          x_t  noised latents
  S  latent steps (1/8 s each)                  t    0 = noise, 1 = data    d    step size (0: multi-step)
  C  chunks (cfg.chunk latent steps; W: seen)    u    velocity (the data's: x - noise)
  N  tokens of one branch in one latent step    x_hat  the network's output: where u leads to at t = 1
  D  width    H  heads    P  values of a head    E  values of a latent step (video's, then audio's)

x_t = (1 - t) noise + t x. The network predicts x_hat (data, if d = 0): u = (x_hat - x_t) / (1 - t), and a
step is x_{t+d} = x_t + d u. Flow matching compares u, the other objectives x_hat.
"""
import functools
import hashlib
import io
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BRANCHES = ("video", "audio")
ALPHABET, SILENCE = "abcdefghijklmnopqrstuvwxyz ", 26                 # the symbols of a transcript, 0 to 26


@dataclass(frozen=True)
class Config:
    """Every size, our choice: for a laptop (the paper: 7B a branch). Raises ValueError if they do not fit."""
    width: int = 192             # D, values of a token
    layers: int = 6              # blocks, each with a video and an audio side
    heads: int = 3               # H, heads of the joint self-attention
    image: int = 64              # height and width of the picture in pixels
    fps: int = 16                # frames per second
    step_frames: int = 2         # frames of one latent step
    patch: int = 16              # height and width of a video token in pixels
    sample_rate: int = 8000      # samples per second
    motion: float = 2.5          # gain on how a frame differs from the one before
    seam: float = 4.0            # gain (from 1) on how two pixels differ across a border of patches
    step_sounds: int = 4         # hops of sound in one latent step
    bands: int = 2               # audio tokens of one hop: low and high half of its spectrum
    compand: float = 0.35        # exponent that tames the peaks of the sound's spectrum
    sound_scale: float = 6.4     # brings the companded spectrum to about unit variance
    chunk: int = 4               # latent steps made at a time: half a second
    window: int = 2              # W, chunks of history seen beside the sink (see Band): errors grow with W
    symbols: int = 27            # letters of the transcript and silence; one more stands for "unknown"
    margin: int = 4              # frames of transcript seen before and after a chunk
    characters: tuple = ("ada", "bruno", "chen", "dora", "emil", "farah", "goro", "hana")   # one more: anyone
    clock: int = 16              # seconds after which every rotary phase in time has come round
    video_shift: float = 12.0    # of warp(): how far times are pushed toward noise; more for the picture, as
    audio_shift: float = 4.0     # its codec enlarges mouths: at equal progress both have chosen a letter
    late: float = 0.99           # progress where the picture's last quarter of few steps begins (t = 0.89)

    def __post_init__(self):
        odd = [name for name, x in asdict(self).items() if type(x) is not type(getattr(Config, name))
               or name != "characters" and not 0 < x < 2 ** 20]
        if odd or not 0.75 <= self.late < 1 <= self.motion or self.layers > 999 or self.clock_ticks >= 1e6:
            raise ValueError(f"{', '.join(odd) or 'motion, late, layers or clock'}: beyond all use")
        whole = self.hop * self.step_sounds * self.fps == self.sample_rate * self.step_frames
        if self.image % self.patch or self.hop % self.bands or not whole:
            raise ValueError("patches must tile the picture and audio tokens must tile a latent step")
        if self.width % (8 * self.heads):
            raise ValueError("width / heads must be a multiple of 8 (three axes share the rotary pairs)")
        if 2 * (self.window + 1) * self.chunk * self.step_frames > self.clock * self.fps:
            raise ValueError("the rotary clock must be at least twice as long as the window")

    head_dim = property(lambda c: c.width // c.heads)
    grid = property(lambda c: c.image // c.patch)                          # video tokens along one side
    video_tokens = property(lambda c: c.grid ** 2)                         # N of the video branch
    video_dim = property(lambda c: c.step_frames * c.patch ** 2 * 3)       # values of a video token
    hop = property(lambda c: c.sample_rate * c.step_frames // (c.fps * c.step_sounds))   # samples
    audio_tokens = property(lambda c: c.step_sounds * c.bands)             # N of the audio branch
    audio_dim = property(lambda c: c.hop // c.bands)                       # values of an audio token
    video_values = property(lambda c: c.video_tokens * c.video_dim)        # of a latent step
    audio_values = property(lambda c: c.audio_tokens * c.audio_dim)        # of a latent step
    step_values = property(lambda c: c.video_values + c.audio_values)      # E
    shifts = property(lambda c: torch.tensor([c.video_shift, c.audio_shift]))      # of warp()
    clock_ticks = property(lambda c: c.clock * c.fps * c.step_sounds // c.step_frames)
    chunk_frames = property(lambda c: c.chunk * c.step_frames)
    chunk_seconds = property(lambda c: c.chunk_frames / c.fps)


# ---- Codecs: fixed, exact, streamable. A fork puts pretrained VAEs here, as the paper has. -----------------

class VideoCodec:
    """Frames to patch tokens and back, exactly (our choice; the paper has a video VAE). How frames change and
    how patches differ at their border is little, but there the eye sees errors, as flicker and seams: tokens
    hold both enlarged, and decoding shrinks errors in them (not what lasts, as a wrong colour does)."""

    def __init__(self, cfg: Config, device="cpu"):
        self.cfg, self.lap = cfg, torch.eye(cfg.image)     # prefilter of a lapped transform, of one axis
        for border in range(cfg.patch, cfg.image, cfg.patch):
            for k in range(cfg.patch // 2):                # mirrored pixels differ seam / (k + 1) times
                pair, more = torch.tensor([border + k, border - k - 1]), max(0, cfg.seam / (k + 1) - 1) / 2
                self.lap[pair] += more * (self.lap[pair] - self.lap[pair.flip(0)])
        self.lap, self.unlap = self.lap.to(device), self.lap.inverse().to(device)

    def encode(self, frames: Tensor) -> Tensor:
        """A whole film, uint8 (B, F, image, image, 3), F in whole latent steps -> (B, S, N, video_dim)."""
        cfg, b, lap = self.cfg, len(frames), self.lap
        x = torch.einsum("yh,bfhwc,xw->bfyxc", lap, frames / 127.5 - 1, lap)
        x = x + (cfg.motion - 1) * x.diff(dim=1, prepend=x[:, :1])
        x = x.reshape(b, -1, cfg.step_frames, cfg.grid, cfg.patch, cfg.grid, cfg.patch, 3)
        return x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4).flatten(2, 3)

    def decode(self, x: Tensor) -> Tensor:
        """Inverse of encode, clipped: a whole film (B, S, N, video_dim) -> uint8 (B, F, image, image, 3)."""
        return self.decode_next(x)[0]

    def decode_next(self, x: Tensor, last: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, S, N, video_dim) -> uint8 frames, and the last, unrounded, for the next call (None: start)."""
        cfg, b, frames, lap = self.cfg, len(x), [], self.unlap
        x = x.to(lap).reshape(b, -1, cfg.grid, cfg.grid, cfg.step_frames, cfg.patch, cfg.patch, 3)
        x = x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(b, -1, cfg.image, cfg.image, 3)
        for frame in torch.einsum("yh,bfhwc,xw->bfyxc", lap, x, lap).unbind(1):
            frames.append(last := frame if last is None else last.lerp(frame, 1 / cfg.motion))
        return ((torch.stack(frames, 1) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8), last


class AudioCodec:
    """Samples to MDCT spectra, companded, sign(c) |c|^p, or peaks own the loss (our choice; paper: a VAE).
    Spectrum k covers samples [(k - 1) hop, (k + 1) hop) under a sine window; neighbours' aliases cancel."""

    def __init__(self, cfg: Config, device="cpu"):
        self.cfg, m = cfg, cfg.hop
        n, k = torch.arange(2 * m, dtype=torch.float64)[:, None], torch.arange(m, dtype=torch.float64)
        window = torch.sin(math.pi / (2 * m) * (n + 0.5))
        basis = window * math.sqrt(2 / m) * torch.cos(math.pi / m * (n + 0.5 + m / 2) * (k + 0.5))
        self.basis = basis.float().to(device)                          # (2 hop, hop)

    def encode(self, samples: Tensor) -> Tensor:
        """A whole film (B, n) in [-1, 1], n in whole latent steps -> (B, S, N, audio_dim)."""
        cfg, hops = self.cfg, F.pad(samples, (self.cfg.hop, 0)).unflatten(1, (-1, self.cfg.hop))
        c = torch.cat([hops[:, :-1], hops[:, 1:]], -1) @ self.basis    # the spectrum
        c = c.sign() * c.abs() ** cfg.compand * cfg.sound_scale        # about unit variance, few peaks
        return c.reshape(len(samples), -1, cfg.audio_tokens, cfg.audio_dim)

    def decode(self, x: Tensor) -> Tensor:
        """Inverse of encode: a whole film (B, S, N, audio_dim) -> (B, n), whose last hop fades."""
        return torch.cat(self.decode_next(x), 1)

    def decode_next(self, x: Tensor, tail: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, S, N, audio_dim) -> samples (B, n), at first a hop short; and (B, hop) for the next to take."""
        m = self.cfg.hop
        c = x.sign() * (x.abs() / self.cfg.sound_scale) ** (1 / self.cfg.compand)
        halves = c.reshape(len(x), -1, m) @ self.basis.T               # (B, hops, 2 hop)
        samples = halves[:, :-1, m:] + halves[:, 1:, :m]
        if tail is not None:
            samples = torch.cat([(tail + halves[:, 0, :m])[:, None], samples], 1)
        return samples.flatten(1), halves[:, -1, m:].clone()


def cut_branches(cfg: Config, z: Tensor) -> tuple[Tensor, Tensor]:
    """Latent steps (B, S, E) -> the values of video (B, S, N video_dim) and of audio (B, S, N audio_dim)."""
    return z.split([cfg.video_values, cfg.audio_values], -1)


def split(cfg: Config, z: Tensor) -> tuple[Tensor, Tensor]:
    """Latent steps (B, S, E) -> video tokens (B, S, N, video_dim) and audio tokens (B, S, N, audio_dim)."""
    video, audio = cut_branches(cfg, z)
    return video.unflatten(-1, (-1, cfg.video_dim)), audio.unflatten(-1, (-1, cfg.audio_dim))


def join(video: Tensor, audio: Tensor) -> Tensor:
    """Inverse of split: a chunk is the same whole number of latent steps in both modalities."""
    return torch.cat([video.flatten(2), audio.flatten(2)], -1)


# ---- Noise schedules: one warp of even progress (here u) to time, for the training density and all grids. --

MIN_REST = 0.2    # the one clamp on 1 - t: near data the weight of an error in x_hat stops growing at 25


def warp(u, shift=Config.audio_shift):
    """Even progress u in 0..1 (number or tensor) -> time t in 0..1, pushed toward noise (our choice): tokens
    are redundant, a pixel patch gives itself away at t = 0.25, and all that is global is decided before."""
    return u / (u + shift * (1 - u))


def progress(cfg: Config, steps: int) -> Tensor:
    """A sampler's grid as u of warp() (steps + 1, 2). Those of 4 and 8 nest; the picture's last quarter (our
    choice) begins late, or draws anew what stands still. More steps go evenly: late, training is too rare."""
    u, late = torch.linspace(0, 1, steps + 1), cfg.late if steps <= 8 else 0.75
    return torch.stack([torch.minimum(u * late / 0.75, 1 - (1 - u) * (1 - late) / 0.25), u], -1)


def each_value(cfg: Config, x: Tensor) -> Tensor:
    """A number for video and one for audio (..., 2) -> repeated for each value of a latent step (..., E)."""
    return torch.where(torch.arange(cfg.step_values, device=x.device) < cfg.video_values, *x.split(1, -1))


def time_grid(cfg: Config, steps: int) -> Tensor:
    """Times from 0 to 1 of a sampler of either mode, (steps + 1, 1, 1, E). ValueError below 1 step."""
    if steps < 1:
        raise ValueError(f"a sampler needs at least 1 step, not {steps}")
    return each_value(cfg, warp(progress(cfg, steps), cfg.shifts))[:, None, None]


def draw_times(cfg: Config, x: Tensor, chunk: int) -> Tensor:
    """Times of each value of x (B, S, E), one a chunk and branch: logit-normal, and warped like the grids. In
    half of the chunks both have the same u; in the others either learns to follow the other (our choice)."""
    u = torch.sigmoid(1.2 * torch.randn((len(x), x.shape[1] // chunk, 2)))
    u[..., 1] = torch.where(torch.rand(u.shape[:2]) < 0.5, *u.unbind(-1))
    return each_value(cfg, warp(u, cfg.shifts).repeat_interleave(chunk, 1).to(x))


def add_noise(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) noise + t x, for x, noise (B, S, E) and t (B, S, E or 1)."""
    return torch.lerp(noise, x, t)


def velocity(x_hat: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """u = (x_hat - x_t) / (1 - t), as flow matching weighs it: clamped (a sampler's steps are not)."""
    return (x_hat - x_t) / (1 - t).clamp(min=MIN_REST)


# ---- The transformer: two branches, one joint self-attention. ----------------------------------------------

class Controls(NamedTuple):
    """What steers a film. A dropped control has its "unknown" value; all dropped is the null of guidance."""
    symbols: Tensor       # (B, margin + F + margin) long, a symbol per frame; cfg.symbols = unknown
    character: Tensor     # (B,) long, index into cfg.characters; their number = anyone
    first: Tensor         # (B, 1, N, video_dim), the first frame as a latent step
    has_first: Tensor     # (B,) bool

    def each(self, change) -> "Controls":
        """A function of one tensor, applied to all of them."""
        return Controls(*map(change, self))

    def chunk(self, cfg: Config, index: int) -> "Controls":
        """The controls as chunk number index sees them: its own frames of transcript and the margins."""
        start = index * cfg.chunk_frames
        return self._replace(symbols=self.symbols[:, start:start + cfg.chunk_frames + 2 * cfg.margin])

    def dropped(self, cfg: Config) -> "Controls":
        """The null controls."""
        return self._replace(symbols=torch.full_like(self.symbols, cfg.symbols),
                             character=torch.full_like(self.character, len(cfg.characters)),
                             has_first=torch.zeros_like(self.has_first))


def sinusoid(x: Tensor, dim: int = 64) -> Tensor:
    """Numbers in 0..1 (...,) -> cosines and sines of dim / 2 frequencies (..., dim)."""
    angles = 1000 * x[..., None] * 10000 ** (torch.arange(dim // 2, device=x.device) * -2 / dim)
    return torch.cat([angles.cos(), angles.sin()], -1)


class StepEmbedding(nn.Module):
    """Time t, step size d and the character -> the vector that modulates a latent step's tokens. d enters as
    f(d) - f(0), with a last layer that starts at zero: few-step mode starts as plain Euler (our choice)."""

    def __init__(self, width: int, count: int):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.size = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width, bias=False))
        self.character = nn.Embedding.from_pretrained(torch.empty(count, width).uniform_(-1.7, 1.7), False)

    def forward(self, t: Tensor, d: Tensor, character: Tensor) -> Tensor:
        """t, d (B, S) and character (B,) -> (B, S, D)."""
        t, d, zero = (sinusoid(x).to(self.character.weight) for x in (t, d, torch.zeros_like(d)))
        change = self.size[2](self.size[:2](d) - self.size[:2](zero))  # of equal shapes: they round alike
        return F.silu(self.time(t) + change + self.character(character)[:, None])


class TextEmbedding(nn.Module):
    """The timed transcript, added to the tokens of its instant (our choice; the paper uses cross-attention).
    A frame sees the symbols of cfg.margin frames before and after it: mouths move before a letter sounds."""

    def __init__(self, cfg: Config, tokens: int, instants: int):
        super().__init__()
        self.frames, self.instants, self.tokens = cfg.step_frames, instants, tokens    # of a latent step
        self.embed = nn.Embedding.from_pretrained(torch.empty(cfg.symbols + 1, 64).uniform_(-1.7, 1.7), False)
        self.near = nn.Conv1d(64, cfg.width, 2 * cfg.margin + 1)
        self.out = nn.Linear(cfg.step_frames * cfg.width, instants * cfg.width)

    def forward(self, symbols: Tensor) -> Tensor:
        """(B, margin + F + margin) -> (B, S, N, D); the tokens of an instant share theirs."""
        x = F.silu(self.near(self.embed(symbols).transpose(1, 2))).transpose(1, 2)            # (B, F, D)
        x = self.out(x.unflatten(1, (-1, self.frames)).flatten(2)).unflatten(-1, (self.instants, -1))
        return x.repeat_interleave(self.tokens // self.instants, 2)


@functools.cache
def rotary_table(cfg: Config, device: torch.device) -> tuple[Tensor, Tensor]:
    """The 3-D rotary embedding: time (clock_ticks, head_dim / 4) and place (N, head_dim / 4), complex phases.
    The unit of time is a hop of sound. Every frequency is a whole number of turns a period (our choice), so
    that positions stay bounded. Half of a head's pairs turn with time, half with place (a sound has none)."""
    pairs = cfg.head_dim // 4
    turns = torch.logspace(1, math.log2(cfg.clock_ticks / 4), pairs, base=2, dtype=torch.float64).round()
    time = 2 * math.pi / cfg.clock_ticks * (torch.arange(cfg.clock_ticks)[:, None] * turns % cfg.clock_ticks)
    rates = torch.logspace(0, -1, pairs // 2, dtype=torch.float64)
    place = (torch.cartesian_prod(*2 * [torch.arange(cfg.grid)])[..., None] * rates).flatten(1)
    return tuple(torch.polar(torch.ones_like(x), x).cfloat().to(device) for x in (time, place))


def joint_qkv(parts, chunks: int) -> tuple[Tensor, Tensor, Tensor]:
    """What Side.project() made of each branch -> queries, keys and values of all tokens, chunk by chunk, each
    (B, H, C, n, P); queries and keys with QK-norm, then rotated. From here on the branches are one."""
    x, gain, phases = (torch.cat([y.unflatten(1, (chunks, -1)) for y in each], 2) for each in zip(*parts))
    x_n = F.normalize(x[:, :, :, :2].float(), dim=-1) * (gain[..., None, :] * x.shape[-1] ** 0.5)
    pairs = torch.view_as_complex(x_n.unflatten(-1, (-1, 2))) * phases[:, :, :, None, None]
    q, k = torch.view_as_real(pairs).flatten(-2).to(x).unbind(3)
    return tuple(rows.permute(0, 3, 1, 2, 4) for rows in (q, k, x[:, :, :, 2]))


def normalise(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm, modulated: tokens x (B, S, N, D), shift and scale (about 1) (B, S or 1, 1, D)."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:]), scale)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention: q (B, H, .., n, P), k, v (B, H, .., m, P) and mask (.., n, m) -> (B, .., n, H P)."""
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":           # 3 times faster than PyTorch's fused
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if mask is not None:
            scores += torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -1e9)
        out = scores.softmax(-1) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.movedim(1, -2).flatten(-2)


class Side(nn.Module):
    """One branch's half of a block: its own projections, feed-forward and modulation (section 3.1)."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.heads, d = cfg.heads, cfg.width
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.out = nn.Linear(d, d, bias=False)
        self.feed = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))
        self.q_gain, self.k_gain = (nn.Parameter(torch.ones(cfg.head_dim)) for _ in range(2))
        self.offset = nn.Parameter(torch.zeros(6, 1, d))   # its own; of 3 axes, so train.py's Muon lets it be

    def modulate(self, shared: Tensor) -> tuple[Tensor, ...]:
        """What all blocks share (B, S, 1, 6 D) -> this block's six, each (B, S, 1, D)."""
        return (shared.unflatten(-1, (6, -1)) + self.offset[:, 0]).unbind(-2)

    def project(self, x: Tensor, change, phases: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens x (B, S, N, D) -> q, k, v (B, S N, 3, H, P), gain (1, S N, 2, P) and phases (1, S N, ..)."""
        x = self.qkv(normalise(x, *change[:2])).flatten(1, 2).unflatten(-1, (3, self.heads, -1))
        return x, torch.stack([self.q_gain, self.k_gain]).expand(1, len(phases), -1, -1), phases[None]

    def finish(self, x: Tensor, seen: Tensor, change) -> Tensor:
        """Tokens x (B, S, N, D), what they saw (B, S N, D), modulate()'s six -> tokens after this block."""
        x = torch.addcmul(x, change[2], self.out(seen.reshape(x.shape)))
        return torch.addcmul(x, change[5], self.feed(normalise(x, *change[3:5])))


class Branch(nn.Module):
    """All that belongs to one modality: embedding, its side of every block, head and modulation."""

    def __init__(self, cfg: Config, tokens: int, values: int, instants: int, gain: bool = False):
        super().__init__()
        d = cfg.width
        self.embed = nn.Linear(values, d)
        self.text = TextEmbedding(cfg, tokens, instants)
        self.place = nn.Parameter(torch.empty(tokens, d).uniform_(-0.03, 0.03))
        self.step = StepEmbedding(d, len(cfg.characters) + 1)
        self.modulation = nn.Linear(d, 6 * d)                          # shared by the blocks
        self.sides = nn.ModuleList(Side(cfg) for _ in range(cfg.layers))
        self.head_modulation = nn.Linear(d, 2 * d)
        self.head = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, values))
        self.gain = nn.Linear(d, values) if gain else None             # the sound's: see read_out()
        zero = (self.modulation, self.head_modulation, self.head[-1], self.step.size[-1], self.gain)
        for weight in nn.ModuleList(filter(None, zero)).parameters():
            nn.init.zeros_(weight)                                     # blocks start as identity, d as unfelt

    def modulate(self, t: Tensor, d: Tensor, character: Tensor) -> list[list[Tensor]]:
        """t, d (B, S), character (B,) -> for each block the shift, scale and gate of attention and those of
        the feed-forward; last the shift and scale of the head. Each (B, S, 1, D); scales are about 1."""
        condition = self.step(t, d, character)[:, :, None]
        shared, head = self.modulation(condition), self.head_modulation(condition).chunk(2, -1)
        return [[x + int(i % 3 == 1) for i, x in enumerate(change)]
                for change in (*(side.modulate(shared) for side in self.sides), head)]


class Part(NamedTuple):
    """Tokens of one branch on their way through the trunk."""
    branch: Branch
    tokens: Tensor        # (B, S, N, D)
    changes: list         # what Branch.modulate() made of t, d and the character
    phases: Tensor        # (S N, head_dim / 2), rotary


class AudioVideoTransformer(nn.Module):
    """Two branches and one joint self-attention (section 3.1): noised latent steps in, clean ones out.
    forward() is the parallel form for training, step() the streaming form with a KVCache; the two agree."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.video = Branch(cfg, cfg.video_tokens, cfg.video_dim, 1)
        self.audio = Branch(cfg, cfg.audio_tokens, cfg.audio_dim, cfg.step_sounds, gain=True)
        self.no_first = nn.Parameter(torch.empty(cfg.video_tokens, cfg.width).uniform_(-0.03, 0.03))

    def codecs(self) -> tuple[VideoCodec, AudioCodec]:
        """What its latent steps were made by, on its device."""
        return tuple(codec(self.cfg, self.no_first.device) for codec in (VideoCodec, AudioCodec))

    def phases(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary phases of latent steps (S,), video's and audio's: equal instants, equal phases in time."""
        ticks = torch.arange(n := self.cfg.step_sounds, device=steps.device) + n * steps[:, None]
        time, place = rotary_table(self.cfg, steps.device)
        time, place = time[ticks % self.cfg.clock_ticks], place.expand(len(steps), -1, -1)   # (S, .., pairs)
        audio = torch.cat([time, torch.ones_like(time)], -1).repeat_interleave(self.cfg.bands, 1)
        return torch.cat([time[:, :1].expand_as(place), place], -1).flatten(0, 1), audio.flatten(0, 1)

    def modulate(self, t: Tensor, d: Tensor, controls: Controls, branches=BRANCHES) -> dict:
        """What t, d (B, S, E or 1; first value video's, last audio's) and the character decide, by branch."""
        return {n: getattr(self, n).modulate(t[..., i], d[..., i], controls.character)
                for n, i in zip(BRANCHES, (0, -1)) if n in branches}

    def script(self, controls: Controls, steps: Tensor, branches=BRANCHES) -> dict:
        """All that the transcript and the latent steps (S,) in the film decide, by branch; the same for all
        evaluations of a chunk: what is added to the tokens (B, S, N, D), and rotary phases (S N, P / 2)."""
        return {n: (getattr(self, n).text(controls.symbols) + getattr(self, n).place, phases)
                for n, phases in zip(BRANCHES, self.phases(steps)) if n in branches}

    def parts(self, z: Tensor, changes: dict, scripts: list[dict]) -> dict[str, Part]:
        """Latent steps z (B, S, E), their modulation, and the scripts of their stretches of film in turn."""
        parts = {}
        for n, values in zip(BRANCHES, split(self.cfg, z.to(self.no_first))):
            if n in scripts[0]:
                branch, (text, phases) = getattr(self, n), zip(*(script[n] for script in scripts))
                tokens = branch.embed(values.contiguous()) + torch.cat(text, 1)    # else: weights are copied
                parts[n] = Part(branch, tokens, changes[n], torch.cat(phases))
        return parts

    def first(self, controls: Controls) -> Part:
        """The first frame, or what stands in for it: one clean, timeless latent step of video."""
        first = self.video.embed(controls.first.to(self.no_first))
        tokens = torch.where(controls.has_first[:, None, None, None], first, self.no_first) + self.video.place
        t, place = tokens.new_ones((len(tokens), 1)).float(), rotary_table(self.cfg, tokens.device)[1]
        changes = self.video.modulate(t, 0 * t, controls.character)
        return Part(self.video, tokens, changes, torch.cat([0 * place, place], -1))

    def trunk(self, parts: dict[str, Part], attend) -> dict[str, Tensor]:
        """All blocks. attend(layer, {name: project()'s}) -> {name: seen} is what the two forms differ in."""
        tokens = {n: part.tokens for n, part in parts.items()}
        for layer in range(self.cfg.layers):
            sides = {n: (part.branch.sides[layer], part.changes[layer]) for n, part in parts.items()}
            seen = attend(layer, {n: side.project(tokens[n], change, parts[n].phases)
                                  for n, (side, change) in sides.items()})
            tokens = {n: side.finish(tokens[n], seen[n], change) for n, (side, change) in sides.items()}
        return tokens

    def read_out(self, parts: dict[str, Part], tokens: dict[str, Tensor], x_t: Tensor) -> Tensor:
        """The last S steps of tokens -> x_hat (B, S, E); an absent branch's x_t. Sound has a gain of
        x_t (our choice): a token loses the faint trace that tells, early in noise, a sound from silence."""
        out, s = dict(zip(BRANCHES, split(self.cfg, x_t))), x_t.shape[1]
        for n, part in ((n, parts[n]) for n in BRANCHES if n in parts):
            x = normalise(tokens[n][:, -s:], *(change[:, -s:] for change in part.changes[-1]))
            x_hat, gain = part.branch.head(x).float(), part.branch.gain
            out[n] = x_hat + gain(x).float() * out[n] if gain else x_hat
        return join(*out.values())

    def forward(self, x_t: Tensor, t: Tensor, d: Tensor, controls: Controls, history: Tensor | None = None,
                chunk: int | None = None, branches=BRANCHES, window: int | None = None) -> Tensor:
        """Parallel form: every chunk of a clip at once, each given the history before it.
        x_t (B, S, E) with t, d (B, S, E or 1) and clean history (B, S, E), or None if a chunk sees only the
        first frame and itself -> x_hat (B, S, E). chunk: its length in latent steps (default cfg.chunk; S: a
        bidirectional model). branches: one: stage 1's unimodal model. window: 1 to cfg.window (default)."""
        cfg, (b, s), chunk = self.cfg, x_t.shape[:2], chunk or self.cfg.chunk
        assert s % chunk == 0, f"{s} latent steps are not a whole number of chunks of {chunk}"
        t, d = t.expand(b, s, -1), d.expand(b, s, -1)
        z, scripts = x_t, [self.script(controls, torch.arange(s, device=x_t.device), branches)]
        if history is not None:                                        # [history at t = 1, d = 0 | noisy]
            z, t = torch.cat([history, z], 1), torch.cat([torch.ones_like(t), t], 1)
            d, scripts = torch.cat([torch.zeros_like(d), d], 1), scripts * 2
        parts = self.parts(z, self.modulate(t, d, controls, branches), scripts)
        if "video" in branches:
            parts["first"] = self.first(controls)
        band = Band((window or cfg.window) if history is not None else 0, s // chunk, parts, x_t.device)
        return self.read_out(parts, self.trunk(parts, band), x_t)

    @torch.no_grad()
    def step(self, z: Tensor, changes: dict, scripts: list[dict], cache: "KVCache", done: int = 0) -> Tensor:
        """Streaming form: chunks that follow those in the cache, z (B, S, E), with what modulate() made, and
        script() of each -> x_hat of the last. The cache takes the first `done`: finished, at t = 1, d = 0."""
        tokens = self.trunk(parts := self.parts(z, changes, scripts), functools.partial(cache.attend, done))
        cache.count += done
        return self.read_out(parts, tokens, z[:, -self.cfg.chunk:])

    @torch.no_grad()
    def start(self, controls: Controls, window: int | None = None) -> "KVCache":
        """A cache that holds the first frame (or what stands in for it), and no chunk yet."""
        cache = KVCache(self.cfg, len(controls.character), window)
        self.trunk({"first": self.first(controls)}, cache.attend_first)
        return cache


class Band:
    """Who sees whom in the parallel form: a chunk-causal band.

                    columns:  first  sink   history   noisy          (W = 1 chunk of history)
                                             0 1 2    0 1 2
        rows:  first            x
               history 0        x            x
               history 1        x     x      x x
               history 2        x     x        x x
               noisy 0          x                     x
               noisy 1          x     x      x          x
               noisy 2          x     x        x          x

    The sink is chunk 0 once more. It and the first frame (or what stands in for it) are timeless: the half
    of their keys that turns with time is zero, so they look the same from any distance, and a stream of any
    length has no position that training never saw (our choice). Only the band is computed: a chunk's rows of
    both kinds together read [first | sink | W chunks before | its history rows | its noisy rows]."""

    def __init__(self, window: int, chunks: int, parts: dict[str, Part], device):   # window 0: no history
        self.window, self.chunks, self.kinds = window, chunks, 2 if window else 1
        self.names = [name for name in BRANCHES if name in parts]
        self.sizes = [parts[n].phases.shape[0] // (self.kinds * chunks) for n in self.names]
        own, first = sum(self.sizes), parts["first"].phases.shape[0] if "first" in parts else 0
        at = torch.arange(chunks)[:, None]
        before = (at - window + torch.arange(window) >= 0).repeat_interleave(own, 1)
        seen = torch.cat([at.new_ones(chunks, first), (at > 0).expand(-1, own if window else 0), before], 1)
        itself = torch.eye(self.kinds).repeat_interleave(own, 0).repeat_interleave(own, 1)
        seen, itself = seen[:, None].expand(-1, self.kinds * own, -1), itself.expand(chunks, -1, -1)
        self.mask = torch.cat([seen, itself], 2).bool().to(device)     # (C, rows, columns)

    def columns(self, first: Tensor | None, rows: Tensor, to_sink) -> Tensor:
        """Keys or values (B, H, kinds, C, n, P) -> all that a chunk's rows read, (B, H, C, columns, P)."""
        history, spread = rows[:, :, 0], (-1, -1, self.chunks, -1, -1)
        columns = [] if first is None else [first[:, :, None].expand(spread)]
        if self.window:
            padded = torch.cat([torch.zeros_like(history[:, :, :1])] * self.window + [history], 2)
            before = [padded[:, :, i:i + self.chunks] for i in range(self.window)]
            columns += [to_sink(history[:, :, :1]).expand(spread), *before]
        return torch.cat([*columns, *rows.unbind(2)], 3)

    def __call__(self, layer: int, qkv: dict) -> dict[str, Tensor]:
        """Attend: {name: what Side.project() made} -> {name: what its tokens saw (B, tokens, D)}."""
        q0, k0, v0 = (x[:, :, 0] for x in joint_qkv([qkv["first"]], 1)) if "first" in qkv else 3 * [None]
        rows = joint_qkv([qkv[n] for n in self.names], self.kinds * self.chunks)
        q, k, v = (x.unflatten(2, (self.kinds, -1)) for x in rows)     # (B, H, kinds, C, rows, P)
        q = q.transpose(2, 3).flatten(3, 4)
        k, v = self.columns(k0, k, timeless), self.columns(v0, v, lambda x: x)
        seen = attention(q, k, v, self.mask).unflatten(2, (self.kinds, -1)).transpose(1, 2)
        seen = {n: x.flatten(1, 3) for n, x in zip(self.names, seen.split(self.sizes, 3))}
        return seen if q0 is None else seen | {"first": attention(q0, k0, v0)}


def timeless(k: Tensor) -> Tensor:
    """Keys (..., P) without the half that turns with time."""
    return torch.cat([torch.zeros_like(k[..., :k.shape[-1] // 2]), k[..., k.shape[-1] // 2:]], -1)


class KVCache:
    """Keys and values of the chunks already made: the streaming context buffer (section 3.1). Of a layer:
    [ desk | first | sink | ring of W chunks ]. The chunk at work lays its keys on the desk on every pass; the
    next one's first pass commits it, seen clean: to the ring's oldest place, chunk 0 to the sink too. Keys
    are stored turned, as phases are periodic. Raises ValueError for a window that training never saw."""

    def __init__(self, cfg: Config, batch: int, window: int | None = None):
        self.window, self.count = cfg.window if window is None else window, 0   # count: chunks committed
        if not 1 <= self.window <= cfg.window:
            raise ValueError(f"window must be between 1 and {cfg.window} chunks, the most seen in training")
        self.desk = desk = cfg.chunk * (cfg.video_tokens + cfg.audio_tokens)
        self.first = slice(desk, desk + cfg.video_tokens)
        self.sink = slice(self.first.stop, self.first.stop + desk)     # and then the ring
        self.shape = (2, cfg.layers, batch, cfg.heads, self.sink.stop + self.window * desk, cfg.head_dim)

    def attend(self, done: int, layer: int, qkv: dict) -> dict[str, Tensor]:
        """A chunk sees itself and all that is kept. The first `done` are, each before the next one looks."""
        (keys, values), seen = self.kv[:, layer], []
        chunks = sum(sizes := [part[0].shape[1] for part in qkv.values()]) // self.desk
        rows = zip(*(x.unbind(2) for x in joint_qkv(qkv.values(), chunks)))
        for count, (q, k, v) in enumerate(rows, self.count):
            keys[:, :, :self.desk], values[:, :, :self.desk] = k, v
            end = self.sink.stop + min(count, self.window) * self.desk if count else self.first.stop
            seen.append(attention(q, keys[:, :, :end], values[:, :, :end]))
            if len(seen) <= done:
                old = self.sink.stop + count % self.window * self.desk
                keys[:, :, old:old + self.desk], values[:, :, old:old + self.desk] = k, v
                if count == 0:
                    keys[:, :, self.sink], values[:, :, self.sink] = timeless(k), v
        seen = torch.stack(seen, 1).split([size // chunks for size in sizes], 2)       # (B, chunks, n, D)
        return {name: x.flatten(1, 2) for name, x in zip(qkv, seen)}

    def attend_first(self, layer: int, qkv: dict) -> dict[str, Tensor]:
        """The first frame sees only itself, and stays."""
        q, k, v = (x[:, :, 0] for x in joint_qkv(qkv.values(), 1))
        if layer == 0:
            self.k, self.v = self.kv = k.new_zeros(self.shape)         # on its device, in its precision
        self.k[layer, :, :, self.first], self.v[layer, :, :, self.first] = k, v
        return {"first": attention(q, k, v)}


# ---- The denoising loop and the streaming sampler. ---------------------------------------------------------

def denoise(predict, x: Tensor, times: Tensor) -> list[Tensor]:
    """The one denoising loop: from x at times[0] to times[-1]; returns the state at every time. predict(x_t,
    k) -> x_hat at times[k]; times (K + 1, 1 or B, 1 or S, 1 or E) never fall; only the last may be 1."""
    states = [x]
    for k, (t, d) in enumerate(zip(times, times.diff(dim=0))):         # x + d u, without velocity()'s clamp:
        states.append(x := x.lerp(predict(x, k), d / (1 - t)))         # a last step, d = 1 - t, ends on x_hat
    return states


def generate(model, controls: Controls, chunks: int, times: Tensor, *, few: bool = True,
             guidance: float = 1.0, window: int | None = None, generator: torch.Generator | None = None,
             clips: Tensor | None = None, given: int = 0, forced: bool = False):
    """Make a film through the cache; yields the states (see denoise) of each chunk. few: the net is told d,
    not 0. Guidance other than 1 doubles the batch, uncontrolled. Training gives clips (B, S, E): the first
    `given` chunks stand; each other begins from its own plus the mean error of the chunk before, noised to
    times[0]: errors add up, the content is the clips'. forced: they do not, and the cache keeps the clips."""
    cfg, b, device = model.cfg, len(controls.character), controls.first.device
    times, copies, error, pending = times.to(device), 1 if guidance == 1 else 2, 0, []
    controls = controls if guidance == 1 else Controls(*map(torch.cat, zip(controls, controls.dropped(cfg))))
    cache, steps = model.start(controls, window), torch.arange(cfg.chunk, device=device)
    sizes = times.diff(dim=0, append=times[-1:]) * few     # the last, of what is finished: d = 0 at t = 1
    @functools.cache
    def changes(k, done):                                  # of finished chunks, then of one at times[k]
        moment = (x[[-1] * done + [k]].expand(-1, -1, cfg.chunk, -1).transpose(0, 1) for x in (times, sizes))
        return model.modulate(*(x.flatten(1, 2) for x in moment), controls)
    for index in range(chunks):
        script = model.script(controls.chunk(cfg, index), index * cfg.chunk + steps)
        x = torch.randn((b, cfg.chunk, cfg.step_values), generator=generator,      # a CPU's: as on any device
                        device=generator.device if generator else device).to(device)
        if clips is not None:
            truth = clips.unflatten(1, (-1, cfg.chunk))[:, index]
            x = add_noise(truth + error, x, times[0])
        def predict(x_t, k):                               # a chunk's first pass commits those before, too
            z, scripts = zip(*pending, (x_t, script))
            z, done = torch.cat(z, 1).repeat(copies, 1, 1), len(pending)
            pending.clear()
            x_hat, *null = model.step(z, changes(k, done), scripts, cache, done).chunk(copies)
            return torch.lerp(null[0], x_hat, guidance) if null else x_hat
        yield (states := [truth] * len(times) if index < given else denoise(predict, x, times))
        error = 0 if clips is None or forced else (states[-1] - truth).mean(1, keepdim=True)
        pending.append((truth if forced else states[-1], script))


def spell(text: str, frames: int = 3) -> list[int]:
    """Text -> a symbol per frame: letters a-z last so many frames, whatever else is a pause (our choice)."""
    return [ALPHABET.find(c) if c in ALPHABET else SILENCE for c in text.lower() for _ in range(frames)]


def film_controls(cfg: Config, chunks: int, transcript=None, character=None, first_frame=None) -> Controls:
    """Controls of one film, see stream(). Raises ValueError for what the model does not know."""
    frames = chunks * cfg.chunk_frames
    symbols = torch.full((1, frames + 2 * cfg.margin), cfg.symbols)
    if transcript is not None:
        said = torch.tensor(spell(transcript) if isinstance(transcript, str) else list(transcript)).long()
        if ((said < 0) | (said > cfg.symbols)).any():
            raise ValueError(f"symbols of a transcript are between 0 and {cfg.symbols}")
        symbols[:] = SILENCE
        symbols[0, cfg.margin:cfg.margin + len(said)] = said[:frames + cfg.margin]
    names = (*cfg.characters, None)
    if character not in names and character not in range(len(names)):
        raise ValueError(f"no character {character!r}; there are {', '.join(cfg.characters)}")
    who = torch.tensor([names.index(character) if character in names else character])
    frame = torch.zeros(cfg.image, cfg.image, 3) if first_frame is None else torch.as_tensor(first_frame)
    if frame.shape != (cfg.image, cfg.image, 3) or first_frame is not None and frame.dtype != torch.uint8:
        raise ValueError(f"the first frame must be uint8, {cfg.image} x {cfg.image} x 3")
    first = VideoCodec(cfg).encode(frame.expand(1, cfg.step_frames, -1, -1, -1))
    return Controls(symbols, who, first, torch.tensor([first_frame is not None]))


@torch.inference_mode()
def stream(model, *, seconds: float, transcript=None, character=None, first_frame=None, mode: str = "few",
           steps: int = 4, guidance: float = 1.0, window: int | None = None, seed: int = 0):
    """Stream one film; yields (uint8 frames (F, image, image, 3), float32 samples (n,), about -1 to 1), chunk
    by chunk. transcript: text (3 frames a letter) or a symbol a frame (cfg.symbols = unknown), then silence;
    None: babble. character: a name, its index, or None for anyone. first_frame: like a yielded one. mode:
    "few" large steps (4 or 8) or "multi" small ones (about 50). guidance: 1 is none. window: 1 to cfg.window.
    The first sound is a hop short, the last brings it; memory does not grow. First next(): ValueErrors."""
    cfg, frames, device = model.cfg, round(seconds * model.cfg.fps), model.no_first.device
    if mode not in ("few", "multi"):
        raise ValueError(f"mode must be few or multi, not {mode!r}")
    if frames < 1:
        raise ValueError(f"a film must last at least one frame, 1/{cfg.fps} s")
    chunks, rest = math.ceil(frames / cfg.chunk_frames), frames * cfg.sample_rate // cfg.fps   # samples
    controls = film_controls(cfg, chunks, transcript, character, first_frame).each(lambda x: x.to(device))
    (video_codec, audio_codec), last, tail = model.codecs(), None, None
    for states in generate(model, controls, chunks, time_grid(cfg, steps), few=mode == "few",
                           guidance=guidance, window=window, generator=torch.Generator().manual_seed(seed)):
        video, audio = split(cfg, states[-1])
        samples, tail = audio_codec.decode_next(audio, tail)
        picture, last = video_codec.decode_next(video, last)
        frames -= len(picture := picture[0, :frames].cpu().numpy())
        rest -= len(samples := torch.cat([samples[0], tail[0, :0 if frames else None]])[:rest].cpu().numpy())
        yield picture, samples


# ---- The objectives: flow matching acts on velocity, ShortCut and DMD on x_hat. Each returns (loss, logs). -
# Their random numbers have the shape (rows, ...), or () for all rows: processes divide them (train.Share).

def mean_error(term: str, cfg: Config, error: Tensor, branches=BRANCHES, made=None) -> tuple[Tensor, dict]:
    """Squared errors (B, S, E) -> the sum over branches of their mean, over steps made (bool, S,); logs."""
    parts = zip(BRANCHES, cut_branches(cfg, error if made is None else error[:, made]))
    means = {f"{term}_{name}": part.mean() for name, part in parts if name in branches}
    return sum(means.values()), {name: mean.item() for name, mean in means.items()}


def guided(model, x_t: Tensor, t: Tensor, d: Tensor, controls: Controls, history: Tensor | None,
           guidance: Tensor | float, chunk: int | None = None) -> Tensor:
    """Parallel x_hat, away from the uncontrolled one; guidance: a number, or one a value (B, S, E)."""
    x_hat = model(x_t, t, d, controls, history, chunk)
    if not torch.is_tensor(guidance) and guidance == 1:
        return x_hat
    null = model(x_t, t, d, controls.dropped(model.cfg), history, chunk)
    return torch.lerp(null, x_hat, torch.as_tensor(guidance).to(x_t))


def flow_matching_loss(model, x: Tensor, history: Tensor | None, controls: Controls, *, made=None,
                       chunk: int | None = None, branches=BRANCHES, window=None) -> tuple[Tensor, dict]:
    """The multi-step mode learns the chunks of x (B, S, E), each at its own t, given a history (section 3.2).
    On self-made films, at the latent steps made (S,), it trains the fake score. logs: also by noise level."""
    cfg, t = model.cfg, draw_times(model.cfg, x, chunk or model.cfg.chunk)
    x_t = add_noise(x, torch.randn_like(x), t)
    x_hat = model(x_t, t, torch.zeros_like(t), controls, history, chunk, branches, window)
    error = (velocity(x_hat, x_t, t) - velocity(x, x_t, t)).square()
    loss, logs = mean_error("flow", cfg, error, branches, made)
    level = (t[..., None, [0, -1]] >= warp(torch.tensor([[0.25], [0.5], [0.75]]), cfg.shifts).to(t)).sum(-2)
    parts = zip(BRANCHES, cut_branches(cfg, error.detach()), level.unbind(-1))
    logs |= {f"flow_{name}_level{i}": part[at == i].mean().item()
             for name, part, at in parts if name in branches for i in at.unique().tolist()}
    return loss, logs


def shortcut_loss(model, x: Tensor, history: Tensor, controls: Controls, *, teacher=None,
                  guidance: float = 1.0, cuts=(4, 8)) -> tuple[Tensor, dict]:    # cuts: rising
    """A large step must land where smaller ones do (ShortCut, section 3.3): the steps of the sampler's grids
    of 4 and 8 (our choice: longer spans wreck both modes), halved before the warp. Of 4 two half steps of the
    few-step mode; of 8 one whole step, at the velocity that the multi-step mode, guided, has half way (our
    choice: Euler's steps lose energy). But the last denoises: the sound's by two half steps, the picture's by
    the multi-step mode's one, from an earlier time (our choice): what shows only later would flicker."""
    cfg, (b, s), teacher = model.cfg, x.shape[:2], teacher or model
    grids = [progress(cfg, cut) for cut in cuts for _ in range(max(cuts) // cut)]  # as many spans of each cut
    start, stop = torch.cat([p[:-1] for p in grids]), torch.cat([p[1:] for p in grids])        # (spans, 2)
    span = torch.randint(len(start), (b, s // cfg.chunk)).repeat_interleave(cfg.chunk, 1)     # (B, S)
    last = (stop == 1) & torch.tensor([True, False])       # (spans, 2): the picture's last is not halved, and
    early = torch.where(last, start.clamp(max=0.9), start) # is taught from where training still draws times
    p = torch.stack([start, early, early.lerp(stop, 0.5 * ~last), stop])[:, span]              # (4, B, S, 2)
    t, *times = each_value(cfg, warp(p, cfg.shifts).to(x))             # the student's, three of the teacher
    few = each_value(cfg, ((span < len(start) - max(cuts))[..., None] & ~last[span]).to(x))   # 1: it teaches
    scale = 1.0 if guidance == 1 else guidance + (1 - guidance) * few
    halves, noise, times = few.maximum((times[2] == 1).to(x)), torch.randn_like(x), torch.stack(times)
    def predict(z, k):
        return guided(teacher, z, times[k], times.diff(dim=0)[k] * few, controls, history, scale)
    with torch.no_grad():
        middle = denoise(predict, z := add_noise(x, noise, times[0]), times[:2])[-1]
        begin, since = z.lerp(middle, halves), times[0].lerp(times[1], halves)       # midpoint: from z
        end = begin + (predict(middle, 1) - middle) * ((times[2] - since) / (1 - times[1]))
        x_t, d = add_noise(x, noise, t), times[2] - t
        target = x_t + (end - x_t) * (1 - t) / d                      # the x_hat whose step d lands on end
    return mean_error("shortcut", cfg, (model(x_t, t, d, controls, history) - target).square())


def dmd_loss(model, states: list[Tensor], history: Tensor, controls: Controls, *, real, fake, times: Tensor,
             made: Tensor, guidance: float = 1.0, chunk: int | None = None) -> tuple[Tensor, dict]:
    """Move the few-step sampler's films toward the real score, away from their own (DMD, section 3.3).
    states: all states of the sampler on times, made on the history without gradient; made (S,): its own
    latent steps. One step k is taken again with gradient, at the sampler's own d_k (our choice). chunk:
    None, or the whole clip, of which bidirectional scores see no history (Self-Forcing's teacher)."""
    cfg, (chunk, seen) = model.cfg, (chunk, None) if chunk else (model.cfg.chunk, history)
    k, power = int(torch.randint(len(times) - 1, ())), each_value(cfg, torch.tensor([1 / 2, 0]))
    t, d, power = (x.to(states[0]) for x in (times[k], times[k + 1] - times[k], power))
    moved = model(states[k], t, d, controls, history) * (d / (1 - t)) ** power  # our choice: d / (1 - t)
    x_hat = states[-1] + moved - moved.detach()            # of it enters the state; later steps leave about
    with torch.no_grad():                                  # the root; the sound's counts whole, for letters
        t = draw_times(cfg, x_hat, chunk)
        x_t = add_noise(x_hat, torch.randn_like(x_hat), t)
        x_real = guided(real, x_t, t, torch.zeros_like(t), controls, seen, guidance, chunk)
        x_fake = fake(x_t, t, torch.zeros_like(t), controls, seen, chunk)
        gap = torch.stack([part.abs().mean(-1) for part in cut_branches(cfg, x_hat - x_real)], -1)
        gap = gap.unflatten(1, (-1, chunk)).mean(2).repeat_interleave(chunk, 1)        # by chunk and branch
        target = x_hat - (x_fake - x_real) / each_value(cfg, gap.clamp(min=0.2))       # our choice: 5 at most
    return mean_error("dmd", cfg, 0.5 * (x_hat - target).square(), made=made)


@torch.no_grad()
def rollout(model, x: Tensor, controls: Controls, times: Tensor, history: str):
    """The few-step mode's own films of clips x (B, S, E), made through the streaming cache: all states of its
    sampler (see generate), and bool (S,), the latent steps that it made. history: "real" is teacher forcing;
    "few" its own, after one real chunk, or, of four or more, two at random (our choice; a lone one stays)."""
    c, chunks = model.cfg.chunk, x.shape[1] // model.cfg.chunk
    given = max(1, min(int(torch.randint(1, 3, ())), chunks - 2)) if history == "few" else 0
    films = generate(model, controls, chunks, times, clips=x, given=given, forced=history == "real")
    made = torch.arange(x.shape[1], device=x.device) >= given * c
    return [torch.cat(state, 1) for state in zip(*films)], made


def mutual_forcing_loss(model, x: Tensor, controls: Controls, *, teacher, real, fake, history: str = "few",
                        flow: float = 0.3, shortcut: float = 2 / 3, dmd: float = 1 / 3, steps: int = 4,
                        guidance: float = 1.0, score_chunk: int | None = None) -> tuple[dict, dict]:
    """Dual-mode self-evolution on real clips x (B, S, E) (section 3.3). teacher: the model's slow copy, whose
    two modes teach (our choice: EMA weights). real: DMD's real score, the teacher or Self-Forcing's, whose
    chunk is then score_chunk. fake: the online fake-score model. history: "few" is self-made, "real" is
    teacher forcing. steps: of rollout and DMD. Our choice: rows are dealt to the objectives in turn (too few
    serve twice), and flow weighs less (at 1 its noise drowns the others). Returns {term: loss}, and logs."""
    b, times = len(x), time_grid(model.cfg, steps).to(x)
    weights = {name: w for name, w in (("flow", flow), ("shortcut", shortcut), ("dmd", dmd)) if w}
    rows = {n: torch.arange(i, max(b, i + 1), len(weights)) % b for i, n in enumerate(weights)}

    # 1. The few-step mode rolls out the history, without gradient: DMD's films from noise, others from the
    #    real chunks at late times of the grid (our choice: after one that wanders the real chunk is a jump).
    if history == "few" or dmd:
        begin = times[torch.randint(steps // 2, steps, (b,))].squeeze(1)   # (B, 1, E)
        begin[rows.get("dmd", [])] = 0
        states, made = rollout(model, x, controls, torch.maximum(times, begin), history)
    past = states[-1] if history == "few" else x
    clips = {n: (x[r], past[r], controls.each(lambda c: c[r])) for n, r in rows.items()}

    # 2. The multi-step mode learns the real chunk, given that history.
    losses, logs = {}, {}
    if flow:
        losses["flow"], logs = flow_matching_loss(model, *clips["flow"])

    # 3. The multi-step mode teaches the few-step mode its interval displacement.
    if shortcut:
        losses["shortcut"], new = shortcut_loss(model, *clips["shortcut"], teacher=teacher, guidance=guidance)
        logs |= new

    # 4. The few-step mode's own films move toward the real score; the fake score follows them.
    if dmd:
        own, (_, seen, said) = [state[rows["dmd"]] for state in states], clips["dmd"]
        losses["dmd"], new = dmd_loss(model, own, seen, said, real=real, fake=fake, times=times, made=made,
                                      guidance=guidance, chunk=score_chunk)
        losses["fake"], fakes = flow_matching_loss(fake, own[-1], seen if score_chunk is None else None, said,
                                                   made=made, chunk=score_chunk)
        logs |= new | {f"fake_{name}": fakes[f"flow_{name}"] for name in BRANCHES}
    return {name: weights.get(name, 1) * loss for name, loss in losses.items()}, logs


# ---- Checkpoints: a dict of tensors and plain types, then its SHA-256; renamed when whole, safe to read. ---

FORMAT = "mutual-forcing-4"


class CheckpointError(Exception):
    """A checkpoint cannot be used; the message says why, in one line."""


def replace_file(path, data: bytes) -> None:
    """Write a file: path holds the old bytes or the new, never a half."""
    part = Path(f"{path}.unfinished")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def save_file(path, content: dict) -> None:
    """Write a dict of tensors and plain types, with its checksum."""
    torch.save(content, data := io.BytesIO())
    replace_file(path, data.getvalue() + hashlib.sha256(data.getvalue()).digest())


def load_file(path) -> dict:
    """Read what save_file wrote. Raises CheckpointError for anything else; never runs code from the file."""
    try:
        data = Path(path).read_bytes()
        if hashlib.sha256(data[:-32]).digest() != data[-32:]:
            raise EOFError
        content = torch.load(io.BytesIO(data[:-32]), map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    except Exception:  # EOFError, RuntimeError, UnpicklingError, ...
        raise CheckpointError(f"{path}: not a checkpoint of this project, or a damaged one") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of this version ({FORMAT})")
    return content


def save_checkpoint(path, model, extra: dict | None = None) -> None:
    """Store a model's config and its weights in half precision, with extra plain figures."""
    save_file(path, {"format": FORMAT, "config": asdict(model.cfg), "extra": extra or {},
                     "weights": {name: x.half() for name, x in model.state_dict().items()}})


def load_checkpoint(path) -> tuple["AudioVideoTransformer", dict]:
    """(model in fp32, ready for sampling; extra). Raises CheckpointError, with one line that says why."""
    content = load_file(path)
    try:
        cfg, weights, extra = Config(**content["config"]), content["weights"], {**content["extra"]}
        values = sum(math.inf if x.is_complex() else x.numel() for x in weights.values())
        if values > Path(path).stat().st_size or not all(x.isfinite().all() for x in weights.values()):
            raise ValueError                                           # a small file may not cost much memory
        with torch.device("meta"):
            model = AudioVideoTransformer(cfg)
        model.load_state_dict({name: x.float() for name, x in weights.items()}, assign=True)
    except Exception:  # whatever a foreign configuration or foreign weights may raise
        raise CheckpointError(f"{path}: its sizes or weights do not fit this version, or are NaN") from None
    return model.eval().requires_grad_(False), extra
