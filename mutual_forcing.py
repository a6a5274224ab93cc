"""Mutual Forcing (arXiv 2604.25819) in one file: a causal audio-video transformer that streams a
talking character, picture and sound together, in 4 or 8 denoising steps a chunk. Each part of the
file uses only what stands above it.

The paper. A transformer with a video and an audio branch, joined by self-attention, generates a
film chunk by chunk and keeps what it generated in a KV cache. One set of weights serves two modes:
the multi-step mode predicts the instantaneous velocity of a flow from noise to data, for about 50
small steps; the few-step mode predicts the average velocity over an interval, for 4 or 8 large
steps. Stage 1 trains both branches with no attention between them, and stage 2 couples them; in
both the history is real. In stage 3, Mutual Forcing, the few-step mode continues a real chunk with
a history of its own, and the multi-step mode learns the real chunks that follow. A slow copy of the
weights, their exponential moving average (EMA), then teaches the few-step mode by ShortCut and DMD.

The calls of train.py in each stage (stage 0 trains the video codec, data/codecs.py). A history is
a clean clip as long as x, of which a chunk sees only earlier chunks, see attention_mask().

    # Stage 1: uncoupled branches. Stage 2: coupled. The history is the real clip x itself.
    loss, logs = flow_matching_loss(model, x, x, controls, coupled=False)
    loss, logs = flow_matching_loss(model, x, x, controls)
    # Stage 3: rollout() makes the history that the three objectives use. The losses are added.
    nets = {"teacher": ema, "real_score": ema, "fake_score": fake_score}
    losses, logs = mutual_forcing_loss(model, x, controls, **nets)
    # Self-Forcing, for comparison: DMD alone; the scores were trained with history=None.
    losses, logs = mutual_forcing_loss(..., weights={"dmd": 1}, bidirectional=True)

Axes                                        Symbols
  B  clips or films in a batch                x    clean latents
  F  frames of video                          x_t  noised latents, (1 - t) noise + t x
  S  latent frames (cfg.step_frames frames)   t    time: 0 is noise, 1 is data
  N  tokens of a branch in a latent frame     d    size of a denoising step; in multi-step
  D  width; H heads; P values of a head            mode the network is told 0 in its place
  E  values of a latent frame: all of         v    velocity; at d = 0 its target is x - noise
     video, then all of audio

The network returns v, and a denoising step is x_{t+d} = x_t + d v. Losses compare velocities; DMD
compares clean latents x_t + (1 - t) v. A chunk is cfg.chunk latent frames. Times and step sizes of
a clip are (B, S, 1): both branches share them. Tokens are (2, B, S, N, D): video's, then audio's.

What we do differently                      Why (docs/departures.md: what each is worth)
  video's head predicts clean latents         D values can hardly carry the noise in v
  it copies from the film's first picture     clothes and background keep their look
  the transcript is added to the tokens       each symbol's time is known: no cross-attention
  a character is named, not described         our films have nothing else to describe
  video's VAE encodes frames one by one       two frames encoded at once share one mouth
  sound has an exact MDCT, not a VAE          a hiss is noise, which no small VAE keeps
  larger learning rate, smaller batches       the model is small, trained on two cores
Where the paper is silent, the code says "our choice". A user's mistake raises UserError.
"""

import functools
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DEFAULT_STEPS = {"few": 4, "multi": 50}  # denoising steps of a chunk in each mode
WEIGHTS = {"flow": 1.0, "shortcut": 2 / 3, "dmd": 1 / 3}  # of stage 3; the paper leaves flow's open


class UserError(ValueError):
    """A wrong argument or an unusable file. The message is one line, which the scripts print."""


@dataclass(frozen=True)
class Config:
    """Every size of a model and of its latents. The defaults fit a laptop."""

    width: int = 256  # D, values of a token
    layers: int = 3
    heads: int = 4  # H, heads of the joint self-attention
    image: int = 64  # height and width of the picture in pixels
    fps: int = 16  # frames per second
    step_frames: int = 2  # frames of one latent frame
    sample_rate: int = 8000  # samples per second
    tokens: int = 4  # N, a square number: patches of the picture, and as many hops of sound
    video_dim: int = 256  # values of a video token
    audio_dim: int = 250  # values of an audio token
    chunk: int = 4  # latent frames generated at a time: half a second
    window: int = 1  # chunks of history that a chunk sees, plus the sink and the first frame
    symbols: int = 27  # symbols of a transcript; the last one is silence
    margin: int = 4  # frames of transcript that a chunk sees before its start and after its end
    characters: tuple = ("ada", "bruno", "chen", "dora", "emil", "farah", "goro", "hana")
    clock: int = 16  # seconds after which the rotary phases of time repeat
    shift: float = 4.0  # of warp(): above 1, more of the times are near noise

    @property
    def grid(self) -> int:  # video tokens along one side of the picture
        return math.isqrt(self.tokens)

    @property
    def hop(self) -> int:  # samples of sound in the time of one audio token
        return self.sample_rate * self.step_frames // (self.fps * self.tokens)

    @property
    def latent_values(self) -> int:  # E
        return self.tokens * (self.video_dim + self.audio_dim)

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


class Controls(NamedTuple):
    """What steers films. Each control has a value that means "not given"."""

    symbols: Tensor  # (B, margin + F + margin) long, a symbol per frame; cfg.unknown: not given
    character: Tensor  # (B,) long, index into cfg.characters; len(cfg.characters): not given
    first_frame: Tensor  # (B, 1, N, video_dim), a picture as one latent frame
    has_first_frame: Tensor  # (B,) bool

    def chunks(self, cfg: Config) -> list["Controls"]:
        """The controls that each chunk sees: the transcript of its frames and of both margins."""
        windows = self.symbols.unfold(1, cfg.chunk_frames + 2 * cfg.margin, cfg.chunk_frames)
        return [self._replace(symbols=symbols) for symbols in windows.unbind(1)]

    def dropped(self, cfg: Config) -> "Controls":
        """The same films with nothing given: the null controls of guidance."""
        symbols = torch.full_like(self.symbols, cfg.unknown)
        character = torch.full_like(self.character, len(cfg.characters))
        has_first_frame = torch.zeros_like(self.has_first_frame)
        return Controls(symbols, character, self.first_frame, has_first_frame)

    def variants(self, cfg: Config, guidance: float) -> list["Controls"]:
        """What guidance compares: these controls and, unless guidance is 1, the null controls."""
        return [self] if guidance == 1 else [self, self.dropped(cfg)]


def split(cfg: Config, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Latents (B, S, E) -> tokens of video (B, S, N, video_dim), of audio (B, S, N, audio_dim)."""
    sizes = [cfg.tokens * cfg.video_dim, cfg.tokens * cfg.audio_dim]
    return tuple(part.unflatten(-1, (cfg.tokens, -1)) for part in latents.split(sizes, -1))


def join(video: Tensor, audio: Tensor) -> Tensor:
    """Inverse of split()."""
    return torch.cat([video.flatten(2), audio.flatten(2)], -1)


# ---- Noise schedules -----------------------------------------------------------------


def warp(u: Tensor, shift: float) -> Tensor:
    """Progress u in 0..1 -> time t in 0..1, in training and in sampling."""
    # Our choice: with a shift above 1, more times are near noise. Values of a film are strongly
    # correlated, so what it shows can be seen through much noise, and is decided there.
    return u / (u + shift * (1 - u))


def time_grid(cfg: Config, steps: int) -> Tensor:
    """Times of a sampler, from 0 to 1: (steps + 1, 1, 1, 1). Raises UserError."""
    if not 1 <= steps <= 1000:
        raise UserError(f"steps must be between 1 and 1000, not {steps}")
    return warp(torch.linspace(0, 1, steps + 1), cfg.shift)[:, None, None, None]


def each_latent_frame(per_chunk: Tensor, chunk: int) -> Tensor:
    """Repeat a value of each chunk (B, chunks) for its latent frames: (B, S, 1)."""
    return per_chunk.repeat_interleave(chunk, 1)[..., None]


def draw_times(cfg: Config, x: Tensor, chunk: int) -> Tensor:
    """A time for each chunk of clips x (B, S, E): logit-normal progress, warped -> (B, S, 1)."""
    u = torch.sigmoid(1.2 * torch.randn((len(x), x.shape[1] // chunk)))
    return each_latent_frame(warp(u, cfg.shift), chunk).to(x)


def add_noise(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) noise + t x, for x and noise (B, S, E) and t (B, S, 1)."""
    return torch.lerp(noise, x, t)


# ---- The transformer: two branches, one joint self-attention (section 3.1) -----------


class BranchLinear(nn.Module):
    """Two linear layers, one for each branch: (2, ..., inputs) -> (2, ..., outputs)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        bound = inputs**-0.5  # as in nn.Linear
        self.weight = nn.Parameter(torch.empty(2, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(2, 1, outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.baddbmm(self.bias, x.flatten(1, -2), self.weight)
        return y.unflatten(1, x.shape[1:-1])


def sinusoid(x: Tensor) -> Tensor:
    """Numbers in 0..1 (B, S, 1) -> cosines and sines of 32 frequencies (B, S, 64)."""
    index = torch.arange(32, device=x.device, dtype=torch.float32)
    angles = 1000 * x * 10000 ** (index * -2 / 64)
    return torch.cat([angles.cos(), angles.sin()], -1)


class Conditioning(nn.Module):
    """Time t, step size d and the character -> a vector for each latent frame."""

    def __init__(self, width: int, characters: int):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        # Our choice: the layers of d have no biases and read features that are zero at d = 0, so
        # there they add nothing and get no gradient. The last one starts at zero and therefore
        # stays zero until stage 3: until then the two modes are the same.
        layers = nn.Linear(64, width, bias=False), nn.SiLU(), nn.Linear(width, width, bias=False)
        self.size = nn.Sequential(*layers)  # of the step size
        self.character = nn.Embedding(characters, width)
        nn.init.zeros_(self.size[-1].weight)

    def forward(self, t: Tensor, d: Tensor, character: Tensor) -> Tensor:
        """t, d (B, S, 1) and character (B,) -> (B, S, 1, D)."""
        weight = self.character.weight
        from_t = self.time(sinusoid(t).to(weight))
        from_d = self.size((sinusoid(d) - sinusoid(0 * d)).to(weight))
        return F.silu(from_t + from_d + self.character(character)[:, None])[:, :, None]


class TextEmbedding(nn.Module):
    """The timed transcript -> what is added to the tokens of each latent frame."""

    def __init__(self, cfg: Config):
        super().__init__()
        # A latent frame sees cfg.margin frames on both sides: mouths move before a letter sounds.
        self.cfg, self.visible = cfg, cfg.step_frames + 2 * cfg.margin
        self.embed = nn.Embedding(cfg.symbols + 1, 64)
        self.hidden = nn.Linear(64 * self.visible, cfg.width)
        self.out = nn.Linear(cfg.width, 2 * cfg.tokens * cfg.width)

    def forward(self, symbols: Tensor) -> Tensor:
        """(B, margin + F + margin) -> (2, B, S, N, D)."""
        windows = symbols.unfold(1, self.visible, self.cfg.step_frames)  # (B, S, visible)
        x = F.silu(self.hidden(self.embed(windows).flatten(2)))
        return self.out(x).unflatten(-1, (2, self.cfg.tokens, -1)).movedim(2, 0)


def rotary_phases(cfg: Config, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of latent frames (S,) -> cosines and sines of their tokens, each (S 2 N, P / 2).

    The 3-D rotary embedding (3.1): of the pairs of a head, half rotate with time, in hops of sound,
    a quarter with the row in the picture and a quarter with the column. A position of -1 has no
    time: its cosines and sines are zero, and so is a key's time half. Our choice: each frequency
    of time makes whole rotations in cfg.clock seconds, so phases repeat in a film of any length.
    """
    period = cfg.clock * cfg.fps * cfg.tokens // cfg.step_frames  # in hops
    pairs = cfg.width // cfg.heads // 4
    # Whole rotations of each pair in a period: from 2 to (hops in a period) / 4.
    rotations = torch.logspace(1, math.log2(period / 4), pairs, base=2).round().long()
    hops = torch.arange(cfg.tokens)
    # Times of tokens, in hops: those of video lie at the start of their latent frame.
    times = torch.cat([0 * hops, hops]) + cfg.tokens * positions[:, None]  # (S, 2 N)
    # Whole numbers stay exact however long the film is.
    time = 2 * math.pi / period * (times[..., None] * rotations % period)  # (S, 2 N, P / 4)
    rates, patch = torch.logspace(0, -1, pairs // 2), torch.arange(cfg.tokens)[:, None]
    row_column = torch.cat([patch // cfg.grid * rates, patch % cfg.grid * rates], -1)
    place = F.pad(row_column, (0, 0, 0, cfg.tokens))  # (2 N, P / 4); sound is at 0
    has_time = (positions >= 0)[:, None, None]
    cos = [time.cos() * has_time, place.cos().expand_as(time)]
    sin = [time.sin() * has_time, place.sin().expand_as(time)]
    return torch.cat(cos, -1).flatten(0, 1), torch.cat(sin, -1).flatten(0, 1)


def rotate(x: Tensor, phases: tuple[Tensor, Tensor]) -> Tensor:
    """Queries or keys (..., S 2 N, P), rotated; pair i: the values i and i + P / 2."""
    cos, sin = phases
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x)


def without_time(k: Tensor) -> Tensor:
    """Keys (..., P) with the time half zeroed: the same at any distance in time."""
    time, place_1, _, place_2 = k.chunk(4, -1)  # first values of pairs, then second ones
    zero = torch.zeros_like(time)
    return torch.cat([zero, place_1, zero, place_2], -1)


def normalise(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: layer norm, scale, shift. Tokens x (2, B, S, N, D); shift, scale broadcast to it."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:]), 1 + scale)


class Block(nn.Module):
    """A transformer block: each branch has its own weights, and the attention is joint."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.heads = cfg.heads
        self.qkv = BranchLinear(cfg.width, 3 * cfg.width)
        self.out = BranchLinear(cfg.width, cfg.width)
        self.up = BranchLinear(cfg.width, 4 * cfg.width)
        self.down = BranchLinear(4 * cfg.width, cfg.width)
        self.offset = nn.Parameter(torch.zeros(2, 1, 1, 1, 6 * cfg.width))  # + modulation

    def forward(self, x: Tensor, modulation: Tensor, phases, attend) -> Tensor:
        """Tokens x (2, B, S, N, D) and modulation (B, S, 1, 6 D) -> tokens after this block."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (modulation + self.offset).chunk(6, -1)
        qkv = self.qkv(normalise(x, shift1, scale1)).unflatten(-1, (3, self.heads, -1))
        # (2, B, S, N, 3, H, P) -> (3, B, H, S 2 N, P)
        qkv = qkv.permute(4, 1, 5, 2, 0, 3, 6).flatten(3, 5)
        q, k = rotate(F.layer_norm(qkv[:2], qkv.shape[-1:]), phases)  # QK-norm
        # attend() decides who sees whom, and returns what each token saw, of q's shape.
        seen = attend(q, k, qkv[2]).unflatten(2, (-1, 2, x.shape[3]))
        # (B, H, S, 2, N, P) -> (2, B, S, N, H P)
        seen = seen.permute(3, 0, 2, 4, 1, 5).flatten(-2)
        x = torch.addcmul(x, gate1, self.out(seen))
        return torch.addcmul(x, gate2, self.down(F.gelu(self.up(normalise(x, shift2, scale2)))))


def attention_mask(cfg: Config, positions: Tensor, s: int, chunk: int, coupled: bool) -> Tensor:
    """Who attends to whom in the parallel form: bool (tokens of rows, tokens of columns).

    Rows attend to columns marked x (here the window is 1):

                    columns:  sink  reference  history   noised
                                               0 1 2     0 1 2
        rows:  reference              x
               history 0              x        x
               history 1       x      x        x x
               history 2       x      x          x x
               noised 0               x                  x
               noised 1        x      x        x           x
               noised 2        x      x          x           x

    The history is clean: t = 1 and d = 0. The reference is a latent frame that holds the first
    frame of the film. The sink is chunk 0 of the history once more: it keeps the character's look
    and voice in view when chunk 0 has left the window. The keys of sink and reference have no
    time, so a long film has no distance in time that training never saw.

    positions: the rows' latent frames, -1 for the reference; the last s of them are noised.
    chunk: its latent frames. coupled: whether branches see each other.
    """
    is_noised = torch.arange(len(positions)) >= len(positions) - s
    sink_length = chunk if len(positions) > 1 + s else 0  # without history, no sink
    number = positions // chunk  # of a row's or column's chunk; the reference's is -1
    age = number[:, None] - number  # the row's chunk minus the column's
    own = (age == 0) & (is_noised[:, None] == is_noised)
    past = (age > 0) & (age <= cfg.window) & ~is_noised
    sink = (number > 0)[:, None].expand(-1, sink_length)
    mask = torch.cat([sink, own | past | (number < 0)], 1)  # of latent frames
    branch = torch.arange(2).repeat_interleave(cfg.tokens)
    # For each pair of latent frames, the pairs of their tokens: (2 N, 2 N).
    branch_mask = (branch[:, None] == branch) | coupled
    return torch.kron(mask.byte(), branch_mask.byte()).bool()


class KVCache:
    """Keys and values of finished chunks: the streaming context buffer (section 3.1)."""

    def __init__(self, cfg: Config, video_0: Tensor):
        self.count, self.window = 0, cfg.window  # chunks committed; how many are kept
        # Each layer's [reference, sink, last cfg.window chunks], as pairs k, v (B, H, S 2 N, P).
        # Keys are kept rotated, because attention sees times only through their differences.
        self.kept = [[] for _ in range(cfg.layers)]
        self.video_0 = video_0  # (B, 1, N, video_dim), see read_out()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = zip(*self.kept[layer], (k, v))
        return F.scaled_dot_product_attention(q, torch.cat(keys, 2), torch.cat(values, 2))

    def attend_and_keep(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """attend(), then keep k and v; a full window drops its oldest chunk."""
        seen, kept = self.attend(layer, q, k, v), self.kept[layer]
        if len(kept) == 1:  # chunk 0 becomes the sink, too
            kept.append((without_time(k), v))
        kept.append((k, v))
        del kept[2 : -self.window]
        return seen


class AudioVideoTransformer(nn.Module):
    """Two branches and one joint self-attention: noised latents in, velocities out."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        width, branch_shape = cfg.width, (2, 1, 1, cfg.tokens, cfg.width)
        sizes = (cfg.video_dim, cfg.audio_dim)
        self.embed = nn.ModuleList([nn.Linear(size, width) for size in sizes])
        self.text = TextEmbedding(cfg)
        self.place = nn.Parameter(0.02 * torch.randn(branch_shape))
        # Tokens of the reference: video's if no first frame is given, audio's always.
        self.no_reference = nn.Parameter(0.02 * torch.randn(branch_shape))
        self.conditioning = Conditioning(width, len(cfg.characters) + 1)
        self.modulation = nn.Linear(width, 6 * width)  # of all blocks and branches (our choice)
        self.blocks = nn.ModuleList([Block(cfg) for _ in range(cfg.layers)])
        self.head_modulation = nn.Linear(width, 2 * width)
        self.head = nn.ModuleList([nn.Linear(width, 2 * size) for size in sizes])
        # Blocks start as the identity, and heads at zero.
        for layer in (self.modulation, self.head_modulation, *self.head):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @property
    def device(self) -> torch.device:
        return self.place.device

    def embed_latents(self, x_t, t, d, text, character) -> tuple[Tensor, Tensor]:
        """Latents x_t (B, S, E) -> tokens (2, B, S, N, D) and their conditioning (B, S, 1, D).

        t, d (B, S, 1); text (2, B, S, N, D): the transcript, embedded; character (B,).
        """
        parts = split(self.cfg, x_t.to(self.place))
        x = torch.stack([embed(part) for embed, part in zip(self.embed, parts)])
        return x + text + self.place, self.conditioning(t, d, character)

    def reference(self, controls: Controls) -> tuple[Tensor, Tensor]:
        """The first frame, or learned tokens, as a latent frame without text; its conditioning."""
        absent = self.no_reference.expand(-1, len(controls.character), -1, -1, -1)
        picture = self.embed[0](controls.first_frame.to(self.place))
        video = torch.where(controls.has_first_frame[:, None, None, None], picture, absent[0])
        t = torch.ones(len(picture), 1, 1, device=self.device)
        conditioning = self.conditioning(t, 0 * t, controls.character)
        return torch.stack([video, absent[1].to(video)]) + self.place, conditioning

    def run_blocks(self, parts: list, positions: Tensor, attend) -> tuple[Tensor, Tensor]:
        """Join parts, pairs of tokens and conditioning, along S -> one pair, after all blocks."""
        x = torch.cat([tokens for tokens, _ in parts], 2)
        conditioning = torch.cat([conditioning for _, conditioning in parts], 1)
        modulation = self.modulation(conditioning)
        phases = [table.to(x.device) for table in rotary_phases(self.cfg, positions)]
        for layer, block in enumerate(self.blocks):
            x = block(x, modulation, phases, functools.partial(attend, layer))
        return x, conditioning

    def read_out(self, x, conditioning, x_t, t, controls, video_0) -> Tensor:
        """Tokens x (2, B, S, N, D) after all blocks -> v (B, S, E) of x_t (B, S, E) at t.

        video_0 (B, S or 1, N, video_dim): chunk 0's first latent frame; zero where none precedes.
        """
        given = controls.has_first_frame[:, None, None, None]
        first_picture = torch.where(given, controls.first_frame.to(video_0), video_0)
        x = normalise(x, *self.head_modulation(conditioning).chunk(2, -1))
        video_t, audio_t = split(self.cfg, x_t)
        # Our choice: video's head predicts clean latents (at d = 0), as an offset and, for each
        # value, a factor of the film's first picture, which copies what stands still.
        offset, factor = self.head[0](x[0]).float().chunk(2, -1)
        remaining = (1 - t)[..., None].clamp(min=0.05)  # near data, errors would be enlarged
        v_video = (offset + factor * first_picture - video_t) / remaining
        # Our choice: sound is noise in part (a hiss), so its head predicts v, as an offset and,
        # for each value, a factor of x_t, as a Wiener filter does.
        offset, factor = self.head[1](x[1]).float().chunk(2, -1)
        return join(v_video, offset + factor * audio_t)

    def forward(self, x_t, t, d, controls, history=None, coupled=True) -> Tensor:
        """Parallel form: v of all chunks of a clip, each on the history before it, as in predict().

        x_t, v (B, S, E); t, d (B or 1, S or 1, 1), the same within a chunk. history (B, S, E):
        clean latents; None makes a bidirectional model, for which the whole clip is one chunk.
        coupled: False in stage 1, where branches share only conditioning, modulation, transcript.
        """
        cfg, (b, s, _) = self.cfg, x_t.shape
        chunk = s if history is None else cfg.chunk
        assert s % chunk == 0, f"{s} latent frames are not a whole number of chunks of {chunk}"
        t, d = t.expand(b, s, 1), d.expand(b, s, 1)
        text, character = self.text(controls.symbols), controls.character
        parts = [self.reference(controls)]
        video_0 = x_t.new_zeros(b, s, cfg.tokens, cfg.video_dim)
        if history is not None:
            parts.append(self.embed_latents(history, 0 * t + 1, 0 * d, text, character))
            video_0[:, chunk:] = split(cfg, history)[0][:, :1]
        parts.append(self.embed_latents(x_t, t, d, text, character))
        positions = F.pad(torch.arange(s).repeat(len(parts) - 1), (1, 0), value=-1)
        mask = attention_mask(cfg, positions, s, chunk, coupled).to(x_t.device)
        sink_tokens = mask.shape[1] - mask.shape[0]  # columns are the sink and then all rows

        def attend(layer, q, k, v):
            sink = slice(2 * cfg.tokens, 2 * cfg.tokens + sink_tokens)  # after the reference
            k = torch.cat([without_time(k[:, :, sink]), k], 2)
            v = torch.cat([v[:, :, sink], v], 2)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

        x, conditioning = self.run_blocks(parts, positions, attend)
        return self.read_out(x[:, :, -s:], conditioning[:, -s:], x_t, t, controls, video_0)

    def start(self, controls: Controls) -> KVCache:
        """Streaming form: a cache that holds the reference, and no chunk yet."""
        cache = KVCache(self.cfg, torch.zeros_like(controls.first_frame))
        self.run_blocks([self.reference(controls)], torch.tensor([-1]), cache.attend_and_keep)
        return cache

    def predict(self, x_t, t, d, controls: Controls, cache: KVCache) -> Tensor:
        """v (B, S, E) of the next chunk x_t, for t, d (B or 1, 1, 1). The cache is only read."""
        x, conditioning = self.pass_chunk(x_t, t, d, controls, cache, cache.attend)
        return self.read_out(x, conditioning, x_t, t, controls, cache.video_0)

    def commit(self, x: Tensor, controls: Controls, cache: KVCache) -> None:
        """Write the finished chunk x to the cache: its keys and values at t = 1 and d = 0."""
        t = torch.ones(1, 1, 1, device=x.device)
        self.pass_chunk(x, t, 0 * t, controls, cache, cache.attend_and_keep)
        if cache.count == 0:
            cache.video_0 = split(self.cfg, x)[0][:, :1]
        cache.count += 1

    def pass_chunk(self, x_t, t, d, controls, cache, attend) -> tuple[Tensor, Tensor]:
        """The chunk after those in the cache -> its tokens after all blocks, its conditioning."""
        b, s = x_t.shape[:2]
        text, t, d = self.text(controls.symbols), t.expand(b, 1, 1), d.expand(b, 1, 1)
        part = self.embed_latents(x_t, t, d, text, controls.character)
        return self.run_blocks([part], cache.count * self.cfg.chunk + torch.arange(s), attend)


# ---- The denoising loop and the streaming sampler ------------------------------------


def denoise(velocity, x_t: Tensor, times, few=True) -> list[Tensor]:
    """The one denoising loop: from x_t at times[0] to times[-1]. Returns the state at every time.

    velocity(x_t, t, d) -> v is told the step size d, or 0 in multi-step mode, where few is False.
    A time, and few if it is a tensor of 0 and 1, broadcasts to x_t (B, S, E).
    """
    states = [x_t]
    for t, end in pairwise(times):
        step_size = end - t
        x_t = x_t + step_size * velocity(x_t, t, step_size * few)
        states.append(x_t)
    return states


def guided(network, x_t, t, d, variants, guidance) -> Tensor:
    """null + guidance (v - null), classifier-free guidance; guidance: a number or (B, S, 1).

    variants: what network, a model or its predict(), takes after d; see Controls.variants().
    """
    v, *null = [network(x_t, t, d, *variant) for variant in variants]
    return torch.lerp(null[0], v, guidance) if null else v


@torch.no_grad()
def generate(model, controls, times, *, few=True, guidance=1.0, generator=None, clip=None):
    """Generate films through the cache; yields the states of each chunk (see denoise()).

    controls: an iterable of the Controls of each chunk (data/controls.py makes them from text),
    read when the chunk is due: a transcript may come while the film runs. times (K + 1, 1, 1, 1).
    clip: for training, real latents (B, S, E), whose first chunk is taken as it is; if times[0] is
    above 0, each later chunk is begun from the real one, noised to that time.
    """
    cfg, times, caches = model.cfg, times.to(model.device), None
    real_chunks = clip.split(cfg.chunk, 1) if clip is not None else ()
    for index, given in enumerate(controls):
        variants = given.variants(cfg, guidance)
        caches = caches or [model.start(variant) for variant in variants]
        variants = list(zip(variants, caches))
        if real_chunks and index == 0:
            states = [real_chunks[0]] * len(times)  # real at every time; DMD leaves it out
        else:
            # Noise that the CPU draws is the same on every device.
            shape = len(given.character), cfg.chunk, cfg.latent_values
            x_t = torch.randn(shape, generator=generator, dtype=times.dtype).to(model.device)
            if real_chunks:
                x_t = add_noise(real_chunks[index], x_t, times[0])
            velocity = functools.partial(
                guided, model.predict, variants=variants, guidance=guidance
            )
            states = denoise(velocity, x_t, times, few)
        yield states
        # Only when another chunk is asked for: the caller may stop here.
        for variant, cache in variants:
            model.commit(states[-1], variant, cache)


@torch.inference_mode()
def stream(model, codecs, controls, *, seconds, mode="few", steps=None, guidance=1.0, seed=0):
    """Stream one film: yields frames uint8 (F, image, image, 3), samples float32 (n,) of a chunk.

    codecs: see Codecs in data/codecs.py. controls: see generate(); at least `seconds` of them.
    mode: "few", which learned 4 and 8 steps, or "multi"; steps: DEFAULT_STEPS[mode] unless given.
    Sound is yielded a little after its frames; the last chunk brings the rest.
    """
    cfg = model.cfg
    if mode not in DEFAULT_STEPS:
        raise UserError(f"mode is one of {', '.join(DEFAULT_STEPS)}, not {mode}")
    times = time_grid(cfg, DEFAULT_STEPS[mode] if steps is None else steps)
    frames_left = round(seconds * cfg.fps)
    samples_left = frames_left * cfg.sample_rate // cfg.fps
    generator = torch.Generator().manual_seed(seed)
    options = {"few": mode == "few", "guidance": guidance, "generator": generator}
    video_state = audio_state = None
    for states in generate(model, controls, times, **options):
        video, audio = split(cfg, states[-1])
        frames, video_state = codecs.video.decode_next(video, video_state)
        samples, audio_state = codecs.audio.decode_next(audio, audio_state)
        frames = frames[0, :frames_left].cpu().numpy()
        frames_left -= len(frames)
        # The state of the audio codec is the sound that the next chunk would complete.
        samples = samples[0] if frames_left else torch.cat([samples[0], audio_state[0]])
        samples = samples[:samples_left].cpu().numpy()
        samples_left -= len(samples)
        yield frames, samples
        if frames_left == 0:
            return


# ---- The objectives ------------------------------------------------------------------
# An objective returns (loss, logs). data/batches.py drops controls at random, for classifier-free
# guidance and for films without transcript.


def mean_square(term: str, cfg: Config, error: Tensor) -> tuple[Tensor, dict]:
    """Errors (B, S, E) -> the branches' mean squares, added; logs."""
    video, audio = [part.square().mean() for part in split(cfg, error)]
    return video + audio, {f"{term}_video": video.item(), f"{term}_audio": audio.item()}


def mean_size(cfg: Config, x: Tensor, chunk: int) -> Tensor:
    """The mean absolute value of x (B, S, E) in each chunk and branch: (B, S, E), above 0."""
    sizes = []
    for part in split(cfg, x):
        size = part.abs().unflatten(1, (-1, chunk)).mean((2, 3, 4))  # (B, chunks)
        sizes.append(each_latent_frame(size, chunk)[..., None].expand_as(part))
    return join(*sizes).clamp(min=1e-6)


def flow_matching_loss(model, x, history, controls, *, coupled=True, num_real=0, term="flow"):
    """The multi-step mode learns the chunks of x (B, S, E), each at its own time (section 3.2).

    history, coupled: see AudioVideoTransformer.forward(). DMD's fake score learns by this loss,
    too, from films whose first num_real latent frames are left out.
    """
    cfg = model.cfg
    t = draw_times(cfg, x, x.shape[1] if history is None else cfg.chunk)
    noise = torch.randn_like(x)
    v = model(add_noise(x, noise, t), t, 0 * t, controls, history, coupled)
    return mean_square(term, cfg, (v - (x - noise))[:, num_real:])


def shortcut_loss(model, x, history, controls, *, teacher, guidance=1.0) -> tuple[Tensor, dict]:
    """The few-step mode learns the mean velocity of the two halves of a step (ShortCut, 3.3).

    x, history (B, S, E). Large steps are those of the grids of 4 and 8 (our choice: longer ones
    damage both modes). The halves of a step in the grid of 4 are taken by the teacher's few-step
    mode, which knows the grid of 8; those of a step in the grid of 8 by its multi-step mode.
    """
    cfg = model.cfg

    # 1. Draw a step of one of the grids for each chunk, and halve it before the warp.
    steps = 4 * torch.randint(1, 3, (len(x), x.shape[1] // cfg.chunk))  # 4 or 8
    index = (torch.rand(steps.shape) * steps).floor()
    corners = [warp((index + part) / steps, cfg.shift) for part in (0, 0.5, 1)]
    t, middle, end = [each_latent_frame(corner, cfg.chunk).to(x) for corner in corners]
    by_few = each_latent_frame(steps == 4, cfg.chunk).to(x)  # 1 where the few-step mode teaches

    # 2. Without gradient, the teacher takes the two half steps. Only its multi-step mode is
    #    guided: from it the few-step mode learns the guidance.
    scale = torch.where(by_few == 1, 1.0, guidance)
    variants = [(given, history) for given in controls.variants(cfg, guidance)]
    velocity = functools.partial(guided, teacher, variants=variants, guidance=scale)
    x_t = add_noise(x, torch.randn_like(x), t)
    with torch.no_grad():
        *_, x_end = denoise(velocity, x_t, (t, middle, end), by_few)

    # 3. The velocity with which one step from x_t lands there.
    target = (x_end - x_t) / (end - t)
    error = model(x_t, t, end - t, controls, history) - target
    return mean_square("shortcut", cfg, error)


@torch.no_grad()
def rollout(model, x, controls, times, self_made=True) -> list[Tensor]:
    """The few-step mode's films of the clips x (B, S, E): their states (B, S, E) at all times.

    self_made: the mode continues the clips' first chunks with its own, through the cache. Else
    (teacher forcing) each chunk follows real ones. A chunk begins as noise, or, if times[0] is
    above 0, as the real chunk, noised to that time.
    """
    if self_made:
        films = generate(model, controls.chunks(model.cfg), times, clip=x)
        return [torch.cat(chunks, 1) for chunks in zip(*films)]
    velocity = functools.partial(model, controls=controls, history=x)
    return denoise(velocity, add_noise(x, torch.randn_like(x), times[0]), times)


def retake_step(model, times, states, history, controls) -> Tensor:
    """The films of rollout(), states[-1] (B, S, E), with the gradient of one denoising step."""
    # Our choice: a random step, k, is taken again by all chunks in parallel. The gradient is that
    # of d_k v; all other steps and the latents of the history are constants.
    k = int(torch.randint(len(times) - 1, ()))
    d_k = times[k + 1] - times[k]
    v = model(states[k], times[k], d_k, controls, history)
    return states[-1] + d_k * (v - v.detach())


def dmd_loss(film, history, controls, real_score, fake_score, num_real=0, guidance=1.0):
    """Move films (B, S, E) toward the real score and away from the fake score (DMD, section 3.3).

    Their first num_real latent frames are left out. history: what both scores see; None if they
    are bidirectional (Self-Forcing). guidance: of the real score.
    """
    cfg = real_score.cfg
    chunk = film.shape[1] if history is None else cfg.chunk

    # Noise the film again, and let both scores predict the clean film. The gradient of DMD is
    # x_fake - x_real, divided by the mean distance of the film from x_real in each chunk and
    # branch, so that all of them weigh alike at any t. Half the squared distance to `target`
    # has this gradient.
    with torch.no_grad():
        t = draw_times(cfg, film, chunk)
        x_t = add_noise(film, torch.randn_like(film), t)
        variants = [(given, history) for given in controls.variants(cfg, guidance)]
        v_real = guided(real_score, x_t, t, 0 * t, variants, guidance)
        v_fake = fake_score(x_t, t, 0 * t, controls, history)
        x_real, x_fake = x_t + (1 - t) * v_real, x_t + (1 - t) * v_fake
        target = film - (x_fake - x_real) / mean_size(cfg, film - x_real, chunk)
    loss, logs = mean_square("dmd", cfg, (film - target)[:, num_real:])
    return 0.5 * loss, logs


def mutual_forcing_loss(
    model,
    x,  # (B, S, E), real clips
    controls,
    *,
    teacher,  # the model's EMA copy, both of whose modes teach
    real_score,  # DMD's score of real films: the EMA copy or a bidirectional model
    fake_score,  # another model of that kind, which learns the few-step mode's films
    weights=WEIGHTS,  # {term: weight}; a term left out has weight 0, or 1 if it is of extra
    extra=None,  # of a fork: {term: objective(model, x, history, controls) -> (loss, logs)}
    steps=4,  # denoising steps of a chunk in the rollout
    guidance=1.0,  # in the few-step mode's targets; 1 is none
    self_made=True,  # see rollout()
    start_index=0,  # of the grid's times: the rollout begins there, see rollout()
    bidirectional=False,  # the scores see a whole clip as one chunk (Self-Forcing)
) -> tuple[dict, dict]:
    """The losses of a training step of stage 3 (section 3.3): ({term: weighted loss}, logs)."""
    cfg, extra = model.cfg, extra or {}
    if unknown := weights.keys() - WEIGHTS.keys() - extra.keys():
        raise UserError(f"weights of unknown terms: {', '.join(sorted(unknown))}")
    if x.shape[1] < 2 * cfg.chunk:
        raise UserError("clips must be at least two chunks long: one real, one to generate")
    weights = dict.fromkeys(extra, 1) | dict.fromkeys(WEIGHTS, 0) | weights
    losses, logs = {}, {}

    # 1. The few-step mode generates the history, without gradient.
    if self_made or weights["dmd"]:
        times = time_grid(cfg, steps)[start_index:].to(x)
        states = rollout(model, x, controls, times, self_made)
    history = states[-1] if self_made else x
    num_real = cfg.chunk if self_made else 0  # latent frames of the films

    # 2. The multi-step mode learns the real chunk, given that history.
    # 3. The EMA copy teaches the few-step mode to take large steps.
    shortcut = functools.partial(shortcut_loss, teacher=teacher, guidance=guidance)
    objectives = {"flow": flow_matching_loss, "shortcut": shortcut} | extra
    for term, objective in objectives.items():
        if weights[term]:  # else it is not computed
            loss, new = objective(model, x, history, controls)
            losses[term] = weights[term] * loss
            logs |= new

    # 4. The few-step mode's films move toward the real score, and the fake score learns them.
    if weights["dmd"]:
        seen = None if bidirectional else history
        film = retake_step(model, times, states, history, controls)
        loss, new = dmd_loss(film, seen, controls, real_score, fake_score, num_real, guidance)
        losses["dmd"] = weights["dmd"] * loss
        logs |= new
        losses["fake"], new = flow_matching_loss(
            fake_score, states[-1], seen, controls, num_real=num_real, term="fake"
        )
        logs |= new
    return losses, logs
