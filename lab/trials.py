"""Ablations of the departures: python trials.py CODEC.pt OUT ARM [ARM ...] (1000 joint steps each).

Each arm changes one thing of the code beside it, trains stage joint from the same codec, and is
scored by lab.evaluate on 16 held-out talkers, 4 plain Euler steps, windows 0-5 and 5-15 s.
"""
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import data.checkpoint
import data.codecs
import mutual_forcing as mf
import train
from data.codecs import AudioCodec, Codecs, VideoCodec
from lab.evaluate import evaluate

Base = mf.AudioVideoTransformer


class Head(Base):
    video, audio = "v", "factor"

    def read_out(self, x, conditioning, x_t, t, controls, video_0):
        v_video, v_audio = mf.split(self.cfg, Base.read_out(self, x, conditioning, x_t, t, controls, video_0))
        x = mf.normalise(x, *self.head_modulation(conditioning).chunk(2, -1))
        video_t, audio_t = mf.split(self.cfg, x_t)
        offset, _ = self.head[0](x[0]).float().chunk(2, -1)
        if self.video == "v":
            v_video = offset
        elif self.video == "clean":
            v_video = (offset - video_t) / (1 - t)[..., None].clamp(min=0.05)
        if self.audio == "v":
            v_audio = self.head[1](x[1]).float().chunk(2, -1)[0]
        return mf.join(v_video, v_audio)


class PlainVideo(Head):
    pass


class CleanVideo(Head):
    video = "clean"


class PlainSound(Head):
    video, audio = "ours", "v"


class Symbols(nn.Module):
    """Keys of cross-attention: the symbols of the chunk of each latent frame."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.count = cfg, cfg.chunk_frames + 2 * cfg.margin
        self.symbol = nn.Embedding(cfg.symbols + 1, cfg.width)
        self.offset = nn.Embedding(self.count + cfg.chunk_frames, cfg.width)

    def forward(self, symbols):  # (B, margin + F + margin) -> zeros; self.keys (B, S, count, D)
        cfg = self.cfg
        windows = symbols.unfold(1, self.count, cfg.chunk_frames)  # (B, chunks, count)
        windows = windows.repeat_interleave(cfg.chunk, 1)  # (B, S, count)
        own = cfg.step_frames * torch.arange(cfg.chunk, device=symbols.device)
        index = torch.arange(self.count, device=symbols.device) - own[:, None] + cfg.chunk_frames
        self.keys = self.symbol(windows) + self.offset(index.repeat(windows.shape[1] // cfg.chunk, 1))
        b, s = self.keys.shape[:2]
        return self.keys.new_zeros(2, b, s, cfg.tokens, cfg.width)


class CrossAttention(Base):
    """Tokens attend to the symbols of their chunk and its margins, in each block."""

    def __init__(self, cfg):
        super().__init__(cfg)
        d = cfg.width
        self.q = nn.ModuleList([mf.BranchLinear(d, d) for _ in range(cfg.layers)])
        self.kv = nn.ModuleList([nn.Linear(d, 2 * d) for _ in range(cfg.layers)])
        self.o = nn.ModuleList([mf.BranchLinear(d, d) for _ in range(cfg.layers)])
        for o in self.o:
            nn.init.zeros_(o.weight)
            nn.init.zeros_(o.bias)
        self.text = Symbols(cfg)

    def run_blocks(self, x, conditioning, positions, attend):
        modulation, phases = self.modulation(conditioning), mf.rotary_phases(self.cfg, positions)
        keys = None if bool((positions < 0).all()) else self.text.keys
        h = self.cfg.heads
        for layer, block in enumerate(self.blocks):
            if keys is not None:
                body = x if (positions >= 0).all() else x[:, :, 1:]
                s = body.shape[2]
                k, v = self.kv[layer](keys.repeat(1, s // keys.shape[1], 1, 1)).chunk(2, -1)
                q = self.q[layer](F.layer_norm(body, body.shape[-1:]))  # (2,B,S,N,D)
                q = q.permute(1, 2, 0, 3, 4).flatten(2, 3)  # B,S,2N,D
                q, k, v = (z.unflatten(-1, (h, -1)).transpose(2, 3) for z in (q, k, v))
                y = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(3)
                y = y.unflatten(2, (2, -1)).permute(2, 0, 1, 3, 4)
                y = self.o[layer](y)
                x = body + y if body.shape == x.shape else torch.cat([x[:, :, :1], body + y], 2)
            x = block(x, modulation, phases, lambda *a, layer=layer: attend(layer, *a))
        return x


class SoundVAE(AudioCodec):
    """A small VAE of sound: 64 values of each hop's companded spectrum, from three hops."""

    VALUES = 64

    def __init__(self, cfg):
        super().__init__(Cfg(cfg))
        self.cfg = Cfg(cfg)
        n, d, v = 250, 512, self.VALUES
        self.enc = nn.Sequential(nn.Linear(3 * n, d), nn.SiLU(), nn.Linear(d, d), nn.SiLU(), nn.Linear(d, 2 * v))
        self.dec = nn.Sequential(nn.Linear(v, d), nn.SiLU(), nn.Linear(d, d), nn.SiLU(), nn.Linear(d, n))
        self.register_buffer("mean", torch.zeros(v))
        self.register_buffer("std", torch.ones(v))

    def hidden(self, samples):
        x = super().encode(samples).flatten(1, 2)  # (B, hops, 250)
        before, after = F.pad(x, (0, 0, 1, 0))[:, :-1], F.pad(x, (0, 0, 0, 1))[:, 1:]
        return x, self.enc(torch.cat([before, x, after], -1)).chunk(2, -1)

    def sound_loss(self, samples):
        x, (mean, lv) = self.hidden(samples)
        lv = lv.clamp(-20, 10)
        out = self.dec(mean + torch.randn_like(mean) * (0.5 * lv).exp())
        kl = 0.5 * (mean.square() + lv.exp() - 1 - lv).mean()
        with torch.no_grad():
            self.mean.lerp_(mean.mean((0, 1)), 0.01)
            self.std.copy_(self.std.square().lerp((mean - self.mean).square().mean((0, 1)), 0.01).sqrt())
        return (out - x).square().mean() + 1e-3 * kl

    def encode(self, samples):
        _, (mean, _) = self.hidden(samples)
        return ((mean - self.mean) / self.std).unflatten(1, (-1, 4))

    def decode_next(self, latents, tail=None):
        x = self.dec(latents.to(self.mean) * self.std + self.mean)
        return super().decode_next(x, tail)


def Cfg(cfg):
    from dataclasses import replace
    return replace(cfg, audio_dim=cfg.hop)


def train_sound(codec, cfg, minutes=4):
    import numpy as np
    from data.talker import talk
    opt, rng, began, n = torch.optim.AdamW(codec.parameters(), 1e-3), np.random.default_rng(5), time.time(), 0
    sounds = [talk(cfg, rng, 48).samples for _ in range(SOUNDS)]
    began = time.time()
    while time.time() - began < 60 * minutes:
        batch = torch.tensor(np.stack([sounds[i] for i in rng.integers(SOUNDS, size=16)]))
        loss = codec.sound_loss(batch)
        opt.zero_grad(); loss.backward(); opt.step(); n += 1
        for g in opt.param_groups:
            g["lr"] = 1e-3 * max(0.05, 1 - (time.time() - began) / (60 * minutes))
    print("sound vae", n, loss.item())


ARMS = {
    "ours": {}, "plain-video": {"model": PlainVideo}, "clean-video": {"model": CleanVideo},
    "plain-sound": {"model": PlainSound}, "cross-attention": {"model": CrossAttention},
    "change-1": {"change": 1.0}, "rate-5e-5": {"words": "--lr 5e-5"}, "sound-vae": {"sound": True},
}


def main(codec, out, *names):
    for name in names:
        name, _, seed = name.partition("@")
        arm, seed = ARMS[name], seed or "0"
        model = arm.get("model", Base)
        for module in (mf, train, data.checkpoint):
            module.AudioVideoTransformer = Base
        _, both, _ = data.checkpoint.load_checkpoint(Path(codec), data.codecs.make_codecs)
        for module in (mf, train, data.checkpoint):
            module.AudioVideoTransformer = model
        data.codecs.CHANGE = arm.get("change", 4.0)
        make, init = data.codecs.make_codecs, codec
        folder = Path(out) / f"{name}-{seed}"
        words = f"--stage joint --steps {STEPS} --seed {seed} --out {folder} --overwrite --save 100000 "
        if arm.get("sound"):
            codecs = both
            cfg = mf.Config(audio_dim=SoundVAE.VALUES)
            sound = SoundVAE(cfg)
            torch.manual_seed(0)
            train_sound(sound, mf.Config(), MINUTES)
            both = Codecs(codecs.video, sound.eval()).requires_grad_(False)
            make = lambda cfg, both=both: both
            words += f"--from-scratch --config audio_dim={SoundVAE.VALUES} "
        else:
            make = lambda cfg, both=both: both
            words += "--from-scratch "
        words += arm.get("words", "")
        began = time.time()
        assert train.main(words.split(), make) == 0
        took = time.time() - began
        net, codecs, _ = data.checkpoint.load_checkpoint(folder / "joint.pt", make)
        result = evaluate({name: (net, codecs)}, settings=[("few", 4)], talkers=TALKERS, seconds=15.0)
        with open(Path(out) / "results.jsonl", "a") as file:
            for row in result["rows"]:
                if row["checkpoint"] == name or name == "ours":
                    print(json.dumps({"arm": name, "seed": seed, "minutes": round(took / 60, 1)} | row), file=file)


STEPS, TALKERS, MINUTES, SOUNDS = 1000, 16, 3, 400
if __name__ == "__main__":
    if sys.argv[1] == "--quick":
        STEPS, TALKERS, MINUTES, SOUNDS = 3, 2, 0.5, 4
        del sys.argv[1]
    main(*sys.argv[1:])
