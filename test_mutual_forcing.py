"""What the code claims, as values and invariances, on a tiny model and tiny synthetic data."""

import json
import math
import re
import runpy
import shlex
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import imageio.v3
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import mutual_forcing as mf
import sample
import train
from data import checkpoint
from data.codecs import AudioCodec, Codecs, VideoCodec, make_codecs
from data.controls import film_controls, spell, stream_film
from data.runs import read_config
from mutual_forcing import AudioVideoTransformer, Config, Controls

HERE = Path(__file__).parent
SIZES = {"width": 32, "layers": 2, "heads": 2, "image": 16, "video_dim": 32, "audio_dim": 32}
TINY = Config(**SIZES, sample_rate=1024, chunk=2, window=2)
IS_VIDEO = torch.arange(TINY.latent_values) < TINY.tokens * TINY.video_dim
ONE = torch.ones(1, 1, 1)  # t = 1; 0.5 * ONE is t or d = 0.5


def small_codecs(cfg: Config) -> Codecs:
    return Codecs(VideoCodec(cfg, fine=8, coarse=8), AudioCodec(cfg)).requires_grad_(False)


CODECS = small_codecs(TINY)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)


def lively(**changes) -> AudioVideoTransformer:
    """A model without zeros, so that no layer that starts at zero hides anything."""
    model = AudioVideoTransformer(replace(TINY, **changes))
    for weight in model.parameters():
        weight.data += 0.15 * torch.randn_like(weight)
    return model


def some_clip(b=2, chunks=6):
    """Random latents, history and controls; films 0, 2, ... are given their first frame."""
    x, history = torch.randn(2, b, chunks * TINY.chunk, TINY.latent_values)
    symbols = torch.randint(28, (b, chunks * TINY.chunk_frames + 2 * TINY.margin))
    first_frame = torch.randn(b, 1, TINY.tokens, TINY.video_dim)
    controls = Controls(symbols, torch.randint(9, (b,)), first_frame, torch.arange(b) % 2 == 0)
    return x, history, controls


def some_case(chunks=6, **changes):
    """A model and what forward() takes, with a time for each chunk."""
    x, history, controls = some_clip(chunks=chunks)
    t = torch.rand(2, chunks, 1).repeat_interleave(TINY.chunk, 1)
    d = (1 - t) * torch.rand(2, 1, 1)
    given = {"x_t": x, "t": t, "d": d, "controls": controls, "history": history}
    return lively(**changes), given


# ---- Config and symbols --------------------------------------------------------------------------


def test_config_names_the_field_that_is_wrong():
    wrong = "window=2.0 fps=x characters=9 shift=-4 chunk=0 fps=0 video_dim=-1 layers=1048576"
    wrong += " tokens=3 width=100 clock=1 shift=nan nothing=1 sample_rate=8001"
    for pair in wrong.split():
        with pytest.raises(mf.UserError, match=pair):
            read_config([pair])
    assert read_config(["shift=2.5", "width=96"]) == Config(shift=2.5, width=96)


def test_silence_is_the_last_symbol_and_unknown_the_next():
    assert spell("É b!", frames=2) == [4, 4, 26, 26, 1, 1, 26, 26]
    model = lively(symbols=11)
    said, unknown, *wrong = [
        film_controls(model, CODECS, transcript) for transcript in ([3, 11], None, [12], [-1], "hi")
    ]
    assert next(said).symbols.tolist() == [[10] * 4 + [3, 11] + [10] * 6]  # frames and margins
    assert next(unknown).symbols.tolist() == [[11] * 12]
    for film in wrong:
        with pytest.raises(mf.UserError, match="symbols"):
            next(film)


# ---- Schedules and the denoising loop ------------------------------------------------------------


def test_times_of_sampling_and_training_are_warped_progress():
    assert mf.warp(0, 4.0) == 0 and mf.warp(0.5, 4.0) == 0.2 and mf.warp(1, 4.0) == 1
    grid = mf.time_grid(TINY, 4)
    assert torch.equal(grid.flatten(), mf.warp(torch.linspace(0, 1, 5), TINY.shift))
    assert torch.equal(grid, mf.time_grid(TINY, 8)[::2])
    t = mf.draw_times(TINY, torch.zeros(20, 1000, 1), chunk=2)
    assert torch.equal(t[:, ::2], t[:, 1::2])  # one for each chunk
    u = mf.warp(t, 1 / TINY.shift)  # its inverse
    assert torch.allclose(u.median(), torch.tensor(0.5), atol=0.02) and 0.2 < u.std() < 0.3


@pytest.mark.parametrize("steps", [1, 2, 4, 50])
def test_analytic_velocity_returns_the_data(steps):
    model, (data, _, controls) = lively(), some_clip(chunks=3)
    chunks, times = data.split(TINY.chunk, 1), mf.time_grid(TINY, steps)

    def predict(x_t, t, d, given, cache):
        return (chunks[cache.count] - x_t) / (1 - t)

    def commit(x, given, cache):
        assert (x - chunks[cache.count]).abs().max() < 1e-4  # the finished chunk
        cache.count += 1

    with mock.patch.multiple(model, predict=predict, commit=commit):
        films = list(mf.generate(model, controls.chunks(TINY), times))
    for states, x in zip(films, chunks, strict=True):
        assert len(states) == steps + 1 and 0.8 < states[0].std() < 1.2
        for x_t, t in zip(states, times):
            assert (x_t - mf.add_noise(x, states[0], t)).abs().max() < 1e-4
        assert (states[-1] - x).abs().max() < 1e-4


# ---- The model: who attends to whom --------------------------------------------------------------


def test_equal_instants_have_equal_phase_in_both_branches_and_turns_are_whole():
    period = TINY.clock * TINY.fps // TINY.step_frames
    cos, sin = mf.rotary_phases(TINY, torch.arange(period + 1))
    cos, sin = (table.unflatten(0, (period + 1, 2 * TINY.tokens)) for table in (cos, sin))
    for table in (cos, sin):
        time, place = table.chunk(2, -1)
        video, audio = time[:, : TINY.tokens], time[:, TINY.tokens :]
        assert torch.equal(video, audio[:, :1].expand_as(video))  # the first hop of a latent frame
        assert torch.equal(time[period], time[0]) and (audio[0, :1] != audio[0, 1:]).any(-1).all()
        assert len(place[:, : TINY.tokens].flatten(0, 1).unique(dim=0)) == TINY.tokens
    assert (place[:, TINY.tokens :] == 0).all()  # sines: sound has no place
    turns = cos[1:] * cos[:-1] + sin[1:] * sin[:-1]  # of a latent frame, by each pair
    assert torch.allclose(turns, turns[:1].expand_as(turns), atol=1e-4)  # the last one too


@pytest.mark.parametrize("window", [1, 2])
def test_streamed_with_cache_equals_parallel_over_the_whole_stream(window):
    """The most important test: both modes, controls on, before and after the window rolls."""
    model, given = some_case(chunks=7, window=window)
    x, t, d, controls, history = given.values()
    d[0] = 0  # one film in multi-step mode, one in few-step mode
    whole, cache = model(**given), model.start(controls)
    for i, own in enumerate(controls.chunks(TINY)):
        chunk = slice(i * TINY.chunk, (i + 1) * TINY.chunk)
        piece = model.predict(x[:, chunk], t[:, chunk][:, :1], d[:, chunk][:, :1], own, cache)
        assert (piece - whole[:, chunk]).abs().max() < 1e-4 * whole.std()
        model.commit(history[:, chunk], own, cache)
    assert cache.count == 7


def test_the_mask_is_the_picture_in_its_docstring():
    cfg, tokens = replace(TINY, window=1), 2 * TINY.tokens  # of a latent frame
    reference, frames = torch.tensor([-1]), torch.arange(6)  # positions; 3 chunks
    mask = mf.attention_mask(cfg, torch.cat([reference, frames, frames]), 6, chunk=2, coupled=True)
    rows = r"(?m)^ +(?:rows:)? +(?:reference|history \d|noised \d) .*x.*"
    lines = re.findall(rows, mf.attention_mask.__doc__)
    places = sorted({match.start() for line in lines for match in re.finditer("x", line)})
    picture = torch.tensor([[line[place : place + 1] == "x" for place in places] for line in lines])
    assert picture.shape == (7, 8) and picture[0].tolist() == [False, True] + 6 * [False]
    chunk = torch.arange(3).repeat_interleave(2)
    row = torch.cat([torch.tensor([0]), 1 + chunk, 4 + chunk]).repeat_interleave(tokens)
    column = torch.cat([torch.tensor([0, 0, 1]), 2 + chunk, 5 + chunk]).repeat_interleave(tokens)
    assert torch.equal(mask, picture[row][:, column])
    mask = mf.attention_mask(cfg, torch.cat([reference, frames]), 6, chunk=6, coupled=True)
    assert mask[:tokens, :tokens].all() and not mask[:tokens, tokens:].any()  # the reference


def chunks_changed(model, given, **other):
    """The numbers of the chunks whose v other inputs change."""
    change = (model(**given | other) - model(**given)).abs().amax((0, 2))
    return change.unflatten(0, (-1, TINY.chunk)).amax(1).nonzero().flatten().tolist()


@pytest.mark.parametrize("layers", [1, 2])  # each sees a window further back
def test_future_leaves_the_past_alone_and_history_moves_the_chunk(layers):
    model, given = some_case(chunks=9, layers=layers)
    for at, visible_to in ((3, range(4, 4 + TINY.window * layers)), (0, range(1, 9))):
        bump = (torch.arange(9 * TINY.chunk) // TINY.chunk == at)[:, None]  # chunk 0: the sink
        moved = chunks_changed(model, given, history=given["history"] + bump)
        assert moved == list(visible_to)
        assert chunks_changed(model, given, x_t=given["x_t"] + bump) == [at]
        alone = given | {"history": None}  # a bidirectional model: the clip is a single chunk
        assert chunks_changed(model, alone, x_t=given["x_t"] + bump) == list(range(9))
    moved = given["controls"]._replace(first_frame=-given["controls"].first_frame)
    assert chunks_changed(model, given, controls=moved) == list(range(9))
    end = 3 * TINY.chunk_frames + 2 * TINY.margin
    for at, chunk in ((end - 1, 2), (end, 3)):  # the last symbol that chunk 2 sees, and the next
        symbols = given["controls"].symbols.clone()
        symbols[:, at] = (symbols[:, at] + 1) % 27
        other = given["controls"]._replace(symbols=symbols)
        assert chunks_changed(model, given, controls=other)[0] == chunk


@pytest.mark.parametrize("coupled", [True, False])
def test_branches_see_each_other_only_if_coupled(coupled):
    model, given = some_case()
    before = model(**given, coupled=coupled)
    for name in ("x_t", "history"):
        for moved in (IS_VIDEO, ~IS_VIDEO):
            after = model(**given | {name: given[name] + moved}, coupled=coupled)
            assert not torch.allclose(after[..., moved], before[..., moved], atol=1e-3)
            assert torch.equal(after[..., ~moved], before[..., ~moved]) == (not coupled)


@pytest.mark.parametrize("control", ["symbols", "character", "first_frame"])
def test_each_control_matters_and_can_be_dropped_or_amplified(control):
    model, given = some_case(chunks=2)
    symbols, character, first_frame, has_first_frame = controls = given["controls"]
    others = Controls(symbols.flip(1), (character + 1) % 9, -first_frame, has_first_frame)
    other = controls._replace(**{control: getattr(others, control)})
    own, null = model(**given), model(**given | {"controls": controls.dropped(TINY)})
    change = model(**given | {"controls": other}) - own
    assert change[0].abs().max() > 1e-4  # film 0 is given its first frame, film 1 is not
    assert torch.equal(model(**given | {"controls": other.dropped(TINY)}), null)
    assert controls.variants(TINY, 1) == [controls]  # no guidance, no second evaluation
    variants = [(variant, given["history"]) for variant in controls.variants(TINY, 3)]
    for guidance, expected in ((1, own), (0, null), (ONE, own), (3, null + 3 * (own - null))):
        guided = mf.guided(model, given["x_t"], given["t"], given["d"], variants, guidance)
        assert torch.allclose(guided, expected, atol=1e-4)


# ---- The cache and the sampler -------------------------------------------------------------------


def test_the_cache_keeps_the_sink_does_not_grow_and_only_a_commit_writes_it():
    model, (x, _, controls) = lively(), some_clip(chunks=12)
    cache, states = model.start(controls), []
    for i, (chunk, own) in enumerate(zip(x.split(TINY.chunk, 1), controls.chunks(TINY))):
        states.append([torch.stack(pair) for pair in cache.kept[-1]])
        for d in (0, 0.5):
            model.predict(chunk, 0.3 * ONE, d * ONE, own, cache)
        for pair, before in zip(cache.kept[-1], states[-1], strict=True):
            assert torch.equal(torch.stack(pair), before)
        model.commit(chunk, own, cache)
        # Latent frames of the reference, the sink, and the window.
        frames = [k.shape[2] / (2 * TINY.tokens) for k, _ in cache.kept[-1]]
        assert frames == [1] + [TINY.chunk] * (1 + min(i + 1, TINY.window))
    reference, sink, newest = states[1]
    timeless = newest[0].unflatten(-1, (2, 2, -1)) * torch.tensor([[0.0], [1.0]])  # time, place
    assert torch.equal(sink[0], timeless.flatten(-3)) and torch.equal(sink[1], newest[1])
    for first, second, *_ in states[1:]:
        assert torch.equal(first, reference) and torch.equal(second, sink)


@pytest.mark.parametrize("few", [True, False])
def test_a_chunk_is_denoised_in_its_mode_and_committed_at_t_1_and_d_0(few):
    model, grid = lively(), mf.time_grid(TINY, 2)
    with mock.patch.object(model, "pass_chunk", wraps=model.pass_chunk) as step:
        films = list(mf.generate(model, some_clip(chunks=3)[2].chunks(TINY), grid, few=few))
    x, t, d = (torch.stack([call.args[i] for call in step.call_args_list]) for i in range(3))
    sizes = torch.cat([few * grid.diff(dim=0), 0 * grid[:1]])
    assert torch.equal(t, grid.repeat(3, 1, 1, 1)) and torch.equal(d, sizes.repeat(3, 1, 1, 1))
    assert torch.equal(x, torch.stack([state for states in films for state in states]))
    attends = [call.args[5].__name__ for call in step.call_args_list]
    assert attends == 3 * ["attend", "attend", "attend_and_keep"]


class StandIn(nn.Module):
    """A stand-in for a VAE of any stride: it shows greys, which add up over time."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg

    def encode(self, frames):
        grey = frames.float().unflatten(1, (-1, self.cfg.step_frames)).mean((2, 3, 4, 5))
        return grey[..., None, None].expand(-1, -1, self.cfg.tokens, self.cfg.video_dim)

    def decode_next(self, latents, state=None):
        grey = latents.mean((2, 3)).cumsum(1) + (100 if state is None else state)
        frames = grey.byte().repeat_interleave(self.cfg.step_frames, 1)[..., None, None, None]
        return frames.expand(-1, -1, self.cfg.image, self.cfg.image, 3), grey[:, -1:]


def stand_in(cfg: Config) -> Codecs:
    return Codecs(StandIn(cfg), AudioCodec(cfg))


@pytest.mark.parametrize("seconds, make_codecs", [(1.3, small_codecs), (1.5, stand_in)])
def test_stream_is_exact_in_length_and_equals_one_shot_with_any_codec(seconds, make_codecs):
    stride_4 = {"step_frames": 4, "audio_dim": 64}
    model = lively(**stride_4 if make_codecs == stand_in else {})
    cfg, codecs, count = model.cfg, make_codecs(model.cfg), round(16 * seconds)
    given = {"transcript": "hi you", "character": "ada"}
    given["first_frame"] = np.full((16, 16, 3), 7, np.uint8)
    pieces = list(stream_film(model, codecs, seconds=seconds, seed=3, **given))
    frames, samples = map(np.concatenate, zip(*pieces))
    assert len(frames) == count and len(samples) == 64 * count
    assert len(pieces[0][1]) == 64 * cfg.chunk_frames - cfg.hop  # the last hop comes later
    controls = islice(film_controls(model, codecs, *given.values()), len(pieces))
    noise = torch.Generator().manual_seed(3)
    films = mf.generate(model, controls, mf.time_grid(cfg, 4), generator=noise)
    tokens, sound = mf.split(cfg, torch.cat([states[-1] for states in films], 1))
    assert np.array_equal(codecs.video.decode_next(tokens)[0][0, :count], frames)
    whole = torch.cat(codecs.audio.decode_next(sound), 1)[0, : 64 * count].numpy()
    assert abs(whole - samples).max() <= 1e-5 * abs(whole).max()


def test_a_transcript_that_comes_late_gives_the_same_film_bit_for_bit():
    model, taken, symbols = lively(), [], torch.randint(27, (99,)).tolist()

    def live():
        for symbol in symbols:
            taken.append(symbol)
            yield symbol

    known = list(stream_film(model, CODECS, seconds=2.2, transcript=symbols))
    late = stream_film(model, CODECS, seconds=2.2, transcript=live())
    for i, (before, now) in enumerate(zip(known, late, strict=True)):
        assert len(taken) == (i + 1) * TINY.chunk_frames + TINY.margin  # no further ahead
        assert all(map(np.array_equal, before, now))


def test_stream_takes_4_steps_or_50_unless_told_and_guidance_of_one_is_none():
    model = lively()

    def film(**options):
        pieces = stream_film(model, CODECS, seconds=0.75, **{"transcript": "abc"} | options)
        return np.concatenate([samples for _, samples in pieces])

    def alike(one, other):
        return np.allclose(one, other, atol=1e-3 * abs(few).max())

    few, multi = film(), film(mode="multi")
    assert (few == film(steps=4)).all() and not alike(few, film(steps=5))
    assert (multi == film(mode="multi", steps=50)).all() and not alike(multi, few)
    assert alike(few, film(guidance=1 + 1e-6)) and not alike(few, film(guidance=3.0))
    assert alike(film(transcript=None), film(guidance=0)) and not alike(few, film(guidance=0))


def test_stream_refuses_what_it_cannot_do():
    model, options = lively(), [("seconds", 0), ("steps", 0), ("seed", -1), ("seconds", 1e6)]
    options += [("seconds", math.nan), ("guidance", math.nan), ("character", 9)]
    options += [("character", "nobody"), ("transcript", [99]), ("mode", "slow")]
    options += [("first_frame", np.zeros((16, 16, 3))), ("first_frame", np.uint8([[[0] * 3]]))]
    for name, value in options:
        with pytest.raises(mf.UserError):
            next(stream_film(model, CODECS, **{"seconds": 1} | {name: value}))


# ---- The objectives ------------------------------------------------------------------------------


def test_stage_2_overfits_a_batch_and_leaves_both_modes_equal_bit_for_bit():
    model, (_, given) = AudioVideoTransformer(TINY), some_case(chunks=2)
    list(stream_film(model, CODECS, seconds=0.5))  # to sample first does not disturb training
    given["history"] = x = given["x_t"]
    optimizer, losses = torch.optim.AdamW(model.parameters(), 3e-3), []
    few_step = model.conditioning.size
    for _ in range(120):
        optimizer.zero_grad()
        loss, _ = mf.flow_matching_loss(model, x, x, given["controls"])
        loss.backward()
        assert not any(weight.grad.any() for weight in few_step.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    multi = model(**given | {"d": 0 * ONE})
    assert torch.equal(model(**given), multi)
    few_step[-1].weight.data += 0.1
    assert torch.equal(model(**given | {"d": 0 * ONE}), multi)
    assert not torch.equal(model(**given), multi)


def stage3(b=3, chunks=6, **options):
    """Losses and logs of a step of stage 3, and its models."""
    torch.manual_seed(0)
    nets = {name: lively() for name in ("model", "teacher", "real_score", "fake_score")}
    x, _, controls = some_clip(b, chunks)
    return *mf.mutual_forcing_loss(**{"x": x, "controls": controls} | nets | options), nets


@pytest.mark.parametrize("bf16", [False, True])  # a rollout's casts must not hide the weights
@pytest.mark.parametrize("term", ["flow", "shortcut", "dmd", "fake"])
@pytest.mark.parametrize("history", ["few", "real"])
def test_each_objective_reaches_the_weights_of_both_branches(term, history, bf16):
    args = SimpleNamespace(device=ONE.device, precision="bf16" if bf16 else "fp32")
    with train.autocast(args):
        losses, logs, nets = stage3(self_made=history == "few")
    losses[term].backward()
    net = nets.pop("fake_score" if term == "fake" else "model")
    for weight in (net.place, net.blocks[0].qkv.weight, net.blocks[-1].down.weight):
        assert weight.grad.abs().flatten(1).amax(1).min() > 0  # of video and of audio
    for layer in (*net.embed, *net.head):
        assert layer.weight.grad.abs().max() > 0
    few_step = net.conditioning.size[-1].weight.grad.abs().max() > 0
    assert few_step == (term in ("shortcut", "dmd"))
    for other in nets.values():  # no gradient through history, targets and scores
        assert all(weight.grad is None for weight in other.parameters())
    assert all(math.isfinite(value) for value in logs.values())


def test_objectives_weigh_what_is_asked_and_one_of_weight_zero_is_left_out():
    weights = {"flow": 2.0, "shortcut": 1 / 3, "dmd": 1 / 3}
    usual, heavier, guided = stage3()[0], stage3(weights=weights)[0], stage3(guidance=2.0)[0]
    ratios = [(heavier[term] / usual[term]).item() for term in (*weights, "fake")]
    assert np.allclose(ratios, [2, 0.5, 1, 1])
    assert {term for term in usual if guided[term] != usual[term]} == {"shortcut", "dmd"}
    mine = mock.Mock(return_value=(torch.tensor(3.0), {"mine": 3.0}))  # a fork's own
    options = {"weights": {"flow": 1, "dmd": 0}, "extra": {"mine": mine}}
    losses, logs, _ = stage3(**options, real_score=None, fake_score=None)
    assert list(losses) == ["flow", "mine"] and losses["mine"] == 3 and logs["mine"] == 3
    with pytest.raises(mf.UserError, match="two chunks"):
        stage3(chunks=1)
    with pytest.raises(mf.UserError, match="unknown terms: DMD"):
        stage3(weights={"DMD": 1})


@pytest.mark.parametrize("self_made", [True, False])
def test_each_objective_sees_the_self_made_history_and_only_if_asked(self_made):
    """Another rollout changes a loss if the history is self-made; DMD's films are always its own."""
    losses = []
    for seed in (0, 1):
        x, films, _ = some_clip(3)
        films = films + torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
        with mock.patch.object(mf, "rollout", return_value=[films] * 5):
            losses.append(stage3(self_made=self_made)[0])
    changed = {term for term in losses[0] if losses[0][term] != losses[1][term]}
    assert changed == {"dmd", "fake", *(("flow", "shortcut") if self_made else ())}


@pytest.mark.parametrize("history", ["few", "late", "guided"])
def test_films_equal_the_parallel_form_on_the_history_that_they_leave(history):
    model, (x, _, controls), times = lively(), some_clip(chunks=7), mf.time_grid(TINY, 3)
    times = times[1:] if history == "late" else times
    if history == "guided":
        films = mf.generate(model, controls.chunks(TINY), times, guidance=3.0)
        states, real = [torch.cat(parts, 1) for parts in zip(*films)], 0
    else:
        states, real = mf.rollout(model, x, controls, times), TINY.chunk
    guidance = 3.0 if history == "guided" else 1.0
    variants = [(variant, states[-1]) for variant in controls.variants(TINY, guidance)]
    out = states[0]
    for t, d in zip(times, times.diff(dim=0)):
        out = out + d * mf.guided(model, out, t, d, variants, guidance)
    assert (out - states[-1])[:, real:].abs().max() < 1e-4 * out.std()
    noise = (states[0] - times[0] * x) / (1 - times[0])  # states[0] itself, if not late
    assert 0.9 < noise[:, real:].std() < 1.1
    assert torch.equal(states[-1][:, :real], x[:, :real])
    assert not any(state.requires_grad for state in states)


def analytic(function):
    """A stand-in model: v is a function of x_t, t and d."""
    return mock.Mock(cfg=TINY, side_effect=lambda x_t, t, d, *_: function(x_t, t, d))


def gaussian(x_t, t, mean=0.0):
    """v of the flow to data of this mean and unit variance, which is known."""
    x = mean + (x_t - t * mean) * t / (t**2 + (1 - t) ** 2)  # E[x | x_t]
    return (x - x_t) / (1 - t)


def test_the_known_velocity_has_the_least_flow_matching_loss():
    (x, _, controls), losses = some_clip(b=400, chunks=2), []
    for factor in (0.9, 1.0, 1.1, -1.0):
        torch.manual_seed(1)
        net = analytic(lambda z, t, d, factor=factor: factor * gaussian(z, t))
        losses.append(mf.flow_matching_loss(net, x, x, controls)[0].item())
    assert min(losses) == losses[1] < 0.6 * losses[3]


def test_shortcut_targets_are_where_two_half_steps_of_a_known_flow_land():
    """The teacher's two modes differ here: the few-step mode follows the flow without error."""
    x, history, controls = some_clip(b=50)
    calls = []

    def flow(z, t, end):
        return z * ((end**2 + (1 - end) ** 2) / (t**2 + (1 - t) ** 2)).sqrt()

    def teach(z, t, d):
        few = (flow(z, t, t + d) - z) / d.clamp(min=1e-9)
        return torch.where(d == 0, gaussian(z, t), few)

    def learn(z, t, d):
        calls.append((z, t, t + d))
        return out

    out = torch.zeros_like(x, requires_grad=True)
    loss, _ = mf.shortcut_loss(analytic(learn), x, history, controls, teacher=analytic(teach))
    loss.backward()  # the gradient is 2 (out - target) / count, and out is 0
    ((z, t, end),) = calls
    count = x[..., 0].numel() * TINY.tokens * torch.where(IS_VIDEO, TINY.video_dim, TINY.audio_dim)
    landing = z - out.grad * count / 2 * (end - t)
    u, u_end = mf.warp(t, 1 / TINY.shift), mf.warp(end, 1 / TINY.shift)  # progress
    m = mf.warp((u + u_end) / 2, TINY.shift)
    middle = z + gaussian(z, t) * (m - t)
    step_of_8 = middle + gaussian(middle, m) * (end - m)
    is_step_of_4 = u_end - u > 0.2
    assert torch.allclose(landing, torch.where(is_step_of_4, flow(z, t, end), step_of_8), atol=1e-4)
    learned = torch.cat([t, end], -1).flatten(0, 1).unique(dim=0)
    grids = [mf.time_grid(TINY, steps).flatten() for steps in (4, 8)]
    steps = torch.cat([torch.stack([grid[:-1], grid[1:]], 1) for grid in grids])
    assert torch.allclose(learned, steps.unique(dim=0), atol=1e-6)  # all of them, and no others


def test_only_the_multi_step_mode_teaches_guidance():
    x, history, controls = some_clip(b=50)
    controls = controls._replace(character=torch.zeros(50).long())
    told = []

    def teach(z, t, d, given, *_):  # 1 with the character, 0 without
        told.append(d)
        return (given.character == 0)[:, None, None] * torch.ones_like(z)

    learn = mock.Mock(cfg=TINY, side_effect=lambda z, *_: 0 * z)
    teacher = mock.Mock(cfg=TINY, side_effect=teach)
    with mock.patch.object(mf, "mean_square", side_effect=lambda term, cfg, error: error):
        error = mf.shortcut_loss(learn, x, history, controls, teacher=teacher, guidance=3.0)
    target = torch.where(told[0] == 0, 3.0, 1.0)
    assert torch.allclose(-error, target.expand_as(x), atol=1e-5) and 1 < target.mean() < 3


def test_the_fake_score_does_not_learn_the_real_chunk():
    x, _, controls = some_clip()
    x[:, : TINY.chunk] = 1000.0
    controls = controls._replace(has_first_frame=torch.ones(2).bool())  # else chunk 0 is copied
    zero = mock.Mock(cfg=TINY, side_effect=lambda x_t, *_: 0 * x_t)
    nets = {"teacher": None, "real_score": zero, "fake_score": zero}
    options = {"weights": {"dmd": 1}, "self_made": True}
    losses, _ = mf.mutual_forcing_loss(lively(), x, controls, **nets, **options)
    assert losses["fake"] < 1000  # 1000 squared, if chunk 0 were among the films


def dmd_gradient(mean_real, mean_fake, times, first=0):
    """DMD's gradient on a model's picture and sound; the scores are Gaussians of these means."""
    torch.manual_seed(0)
    (x, _, controls), offset = some_clip(b=8), torch.zeros(2, requires_grad=True)
    net = analytic(lambda z, t, d: torch.where(IS_VIDEO, *offset).expand_as(z))
    real = analytic(lambda z, t, d: gaussian(z, t, mean_real))
    fake = analytic(lambda z, t, d: gaussian(z, t, mean_fake))
    film = mf.retake_step(net, times, [torch.randn_like(x), x], x, controls)
    loss, _ = mf.dmd_loss(film, x, controls, real, fake, num_real=first)
    loss.backward()
    return offset.grad


def test_dmd_gradient_has_the_right_sign_size_and_a_zero():
    one, four = mf.time_grid(TINY, 1), mf.time_grid(TINY, 4)
    assert (dmd_gradient(2.0, 0.0, one) < -1e-3).all()  # descent moves toward the real mean
    assert (dmd_gradient(-2.0, 0.0, one) > 1e-3).all()
    assert (dmd_gradient(0.0, 2.0, one) > 1e-3).all()  # and away from the fake one
    assert (dmd_gradient(1.0, 1.0, one) == 0).all()
    far = dmd_gradient(1e3, 0.0, one)
    assert torch.allclose(far, -torch.ones(2), atol=0.05)  # about 1, however far
    ratio = dmd_gradient(2.0, 0.0, four[:2]) / dmd_gradient(2.0, 0.0, four[3:])
    assert torch.allclose(ratio, four[1, 0, 0, 0] / (1 - four[3, 0, 0, 0]))  # what a step moves
    bad_start = torch.where(torch.arange(12) < 2, 1e3, -1e3)[:, None]
    own = dmd_gradient(bad_start, 0.0, one, first=2)
    assert torch.allclose(own, torch.ones(2), atol=0.05)  # of generated chunks alone


def test_dmd_weighs_each_chunk_and_branch_by_its_own_size():
    scales = torch.tensor([[1.0], [1.0], [10.0], [10.0]])  # two chunks
    video = -scales[:, :, None] * torch.ones(3, 4, 4, 32)
    audio = 5 * scales[:, :, None] * torch.ones(3, 4, 4, 32)
    x = mf.join(video, audio)
    assert torch.equal(mf.mean_size(TINY, x, 2), x.abs())


# ---- Checkpoints ---------------------------------------------------------------------------------


def test_checkpoint_round_trip_is_atomic_and_safe(tmp_path, monkeypatch):
    model, codecs, path = lively(), small_codecs(TINY), tmp_path / "a.pt"
    codecs.video.mean += 0.5
    checkpoint.save_checkpoint(path, model, codecs, {"step": 3})
    *loaded, extra = checkpoint.load_checkpoint(path, small_codecs)
    assert extra == {"step": 3} and loaded[0].cfg == TINY
    for new, old in zip(loaded, (model, codecs)):
        assert not any(weight.requires_grad for weight in new.parameters())
        for name, weight in old.state_dict().items():
            assert torch.equal(new.state_dict()[name], weight.half().float())
    codecs.video.register_buffer("count", torch.tensor(70001))  # not a number of half precision
    checkpoint.save_checkpoint(path, model, codecs)
    assert checkpoint.load_file(path)["codecs"]["video.count"] == 70001
    before = path.read_bytes()
    with monkeypatch.context() as broken, pytest.raises(ZeroDivisionError):
        broken.setattr(Path, "write_bytes", lambda part, data: part.write_text("half") / 0)
        checkpoint.save_checkpoint(path, model, codecs)
    for name, value in (("video.std", codecs.video.std), ("no_reference", model.no_reference)):
        value.data.view(-1)[0] = 1e9  # infinite in half precision
        for file in (path, tmp_path / "new.pt"):
            with pytest.raises(checkpoint.CheckpointError, match=name):
                checkpoint.save_checkpoint(file, model, codecs)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_bad_checkpoints_end_in_a_line_that_says_why(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint.save_checkpoint("good.pt", lively(), CODECS)
    content, data = checkpoint.load_file("good.pt"), Path("good.pt").read_bytes()
    config, weights, fewer = content["config"], content["model"], dict(content["codecs"])
    del fewer["video.mean"]
    for message, change in {
        "depth": {"config": config | {"depth": 64}},
        "Missing.*blocks.2.qkv.weight": {"config": config | {"layers": 3}},
        "Unexpected.*more": {"model": weights | {"more": torch.zeros(3)}},
        "size mismatch for place": {"model": weights | {"place": torch.zeros(3)}},
        "Missing.*video.mean": {"codecs": fewer},
        "not a checkpoint of this version": {"format": "other"},
        "not a checkpoint": {"config": tmp_path},  # of a class  BUG: UnpicklingError
    }.items():
        with mock.patch.object(checkpoint, "FORMAT", change.get("format", checkpoint.FORMAT)):
            checkpoint.save_file("bad.pt", content | change)
        with pytest.raises(checkpoint.CheckpointError, match=f"^bad.pt: .*{message}[^\n]*$"):
            checkpoint.load_checkpoint("bad.pt", small_codecs)
    for damaged in (b"", b"hello" * 100, data[:-1], data[:999] + b"\0" + data[1000:]):
        Path("bad.pt").write_bytes(damaged)
        with pytest.raises(checkpoint.CheckpointError, match="damaged"):
            checkpoint.load_checkpoint("bad.pt", small_codecs)
    with pytest.raises(checkpoint.CheckpointError, match="No such file"):
        checkpoint.load_checkpoint("missing.pt", small_codecs)
    with pytest.raises(checkpoint.CheckpointError, match=r"codecs: size mismatch for video[^\n]*$"):
        checkpoint.load_checkpoint("good.pt", make_codecs)


# ---- The scripts ---------------------------------------------------------------------------------

MODEL = "--config width=32 layers=1 heads=1 chunk=2 image=32 video_dim=32"
SMALL = "--batch 3 --save 2 --seconds 0.75 1 --lr 1e-2 --device cpu --precision fp32"


def run_train(out, words="", make_codecs=small_codecs, **more) -> int:
    sizes = "" if "--init" in words else MODEL
    arguments = f"{SMALL} {sizes} {words} --out {out}".split()
    return train.main(arguments, make_codecs=make_codecs, **more)


def run_sample(words, make_codecs=small_codecs) -> int:
    return sample.main(["--device", "cpu", *words.split()], make_codecs=make_codecs)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small")  # of stage 2, after two steps
    assert run_train(folder, "--stage joint --steps 2 --from-scratch") == 0
    return folder / "joint.pt"


# BUG: --resume goes on with codecs rounded to half precision, also where the run made its own.
@pytest.mark.parametrize("stage", list(train.STAGES))
def test_two_plus_two_steps_are_four_steps_bit_for_bit(stage, tmp_path, monkeypatch):
    words, step = f"--stage {stage} --steps 4 --from-scratch", train.train_step
    assert run_train(tmp_path / "whole", words) == 0

    def killed(state, *rest):
        logs = step(state, *rest)
        if state.step == 3:  # one step after the checkpoint; the log has more than the checkpoint
            raise SystemExit(9)
        return logs

    monkeypatch.setattr(train, "train_step", killed)
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    with pytest.raises(SystemExit):
        run_train(tmp_path / "parts", words)
    monkeypatch.setattr(train, "train_step", step)
    assert run_train(tmp_path / "parts", f"{words} --resume") == 0
    files = [tmp_path / name / "resume.pt" for name in ("whole", "parts")]
    whole, parts = [checkpoint.load_file(file) for file in files]
    for one, other in zip(tree_leaves(whole), tree_leaves(parts), strict=True):
        assert not torch.is_tensor(one) or torch.equal(one, other)  # of all nets and optimizers
    lines = (tmp_path / "parts" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def test_all_stages_run_in_turn_and_each_trains_what_it_says(tmp_path):
    assert run_train(tmp_path, "--steps 2") == 0
    files = [tmp_path / f"{stage}.pt" for stage in train.STAGES]
    loaded = [checkpoint.load_checkpoint(file, small_codecs) for file in files]
    models, codecs, extras = zip(*loaded)
    assert [extra["stage"] for extra in extras] == list(train.STAGES)
    for later in codecs[1:]:  # stage 0 alone trains the codec
        for name, weight in later.state_dict().items():
            assert torch.equal(weight, codecs[0].state_dict()[name])
    sizes = [model.conditioning.size[-1].weight.any() for model in models]
    assert sizes == [False, False, False, True]  # stage 3 alone trains the few-step mode
    words = f"--stage joint --whole --steps 1 --init {tmp_path}/codec.pt"
    assert run_train(tmp_path / "teacher", words) == 0
    words = f"--stage mutual --steps 1 --flow 0 --shortcut 0 --init {tmp_path}/joint.pt --teacher"
    assert run_train(tmp_path / "self-forcing", f"{words} {tmp_path}/teacher/joint.pt") == 0
    assert run_train(tmp_path / "wrong", f"{words} {tmp_path}/codec.pt") == 2


def test_sample_refuses_mistakes_in_one_line_and_keeps_an_old_film(small, tmp_path, capsys):
    old, good = tmp_path / "film.wav", f"--checkpoint {small} --out {tmp_path}/film.wav"
    old.write_text("old")
    wrong = "--seconds 0,--steps 0,--guidance -1,--character nobody,--say 123,--device tpu"
    wrong += f",--first-frame {small},--checkpoint {old},--out a.txt,--out {tmp_path}/no/film.wav"
    for words in wrong.split(","):
        assert run_sample(f"{good} {words}") == 2
        (line,) = capsys.readouterr().err.splitlines()
        option, value = words.split()
        names = option[2:], value, f"{Path(value).parent}: "
        assert line.startswith("sample.py: ") and any(name in line for name in names), line
        assert old.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_bug_gives_a_traceback(small, tmp_path):
    def broken(cfg):
        raise RuntimeError("more than one element refers to a memory location")

    with pytest.raises(RuntimeError, match="memory location"):
        run_train(tmp_path, "--stage codec", broken)
    with pytest.raises(RuntimeError, match="memory location"):  # BUG: load_checkpoint() hides it
        run_sample(f"--checkpoint {small} --out {tmp_path}/a.wav", broken)


def test_a_forks_codecs_and_objective_are_arguments_of_main(tmp_path):
    calls = []

    def objective(model, x, history, controls):
        calls.append(x.shape)
        v = model(torch.randn_like(x), 0 * ONE, 0.25 * ONE, controls, history)
        loss = (v - x).square().mean()
        return loss, {"mine": loss.item()}

    words = "--stage mutual --from-scratch --steps 1 --batch 4 --seconds 1.5"
    assert run_train(tmp_path, words, stand_in, extra={"mine": objective}) == 0
    assert calls == [(4, 12, 4 * (32 + 250))]
    assert json.loads((tmp_path / "log.jsonl").read_text())["mine"] > 0
    words = f"--checkpoint {tmp_path}/mutual.pt --out {tmp_path}/a.gif --seconds 1"
    assert run_sample(words, stand_in) == 0
    assert imageio.v3.imread(tmp_path / "a.gif", index=None).std((1, 2, 3)).max() == 0  # greys


def test_the_readmes_examples_stream_and_train(tmp_path, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    streams, trains = (tmp_path / "streams.py", tmp_path / "trains.py")
    streams.write_text(blocks[0])
    trains.write_text(blocks[1])
    runpy.run_path(streams)
    assert capsys.readouterr().out.count("(8, 64, 64, 3)") == 16
    objective = runpy.run_path(trains)["steady_sound"]
    losses, logs, nets = stage3(extra={"steady_sound": objective})
    losses["steady_sound"].backward()
    assert nets["model"].place.grad.any() and logs["steady_sound"] > 0


def test_readme_commands_parse_and_files_exist():
    text = (HERE / "README.md").read_text() + (HERE / "docs" / "training.md").read_text()
    parsers = {"train": train.build_parser(), "sample": sample.build_parser()}
    commands = re.findall(r"(?m)^(?:python|torchrun .*) (train|sample)\.py\b([^$\n]*)$", text)
    assert {script for script, _ in commands} == set(parsers)
    for script, words in commands:
        args = parsers[script].parse_args(shlex.split(words, comments=True))  # exits if wrong
        if script == "train":
            args.weights, args.extra = mf.WEIGHTS, None
            stages = list(train.STAGES) if args.stage == "all" else [args.stage]
            train.check(args, Config(), stages)
    for name in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (HERE / name).exists() or (HERE / "docs" / name).exists(), name
    source = "".join(file.read_text() for file in [*HERE.glob("*.py"), *HERE.glob("*/*.py")])
    for name in re.findall(r"`(\w+)\(\)`", text):
        assert f"def {name}(" in source, name
