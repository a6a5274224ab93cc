"""What the code claims, as values and invariances, on a tiny model and tiny synthetic data."""

import copy
import functools
import json
import math
import os
import re
import runpy
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import imageio.v3
import numpy as np
import pytest
import torch

import mutual_forcing as mf
import sample
import train
from data.codecs import make_codecs
from mutual_forcing import AudioVideoTransformer, Config, Controls

HERE = Path(__file__).parent
WHOLE = "WHOLE" in os.environ  # all seeds of the random tests, not a few
TINY = Config(width=32, layers=2, heads=2, image=16, patch=8, sample_rate=1024, chunk=2, window=2)
CODECS = make_codecs(TINY)
IS_VIDEO = torch.arange(TINY.latent_values) < TINY.video_values
ONE = torch.ones(1, 1, 2)  # t = 1 for both branches; 0.5 * ONE is t or d = 0.5


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
    first_frame = torch.randn(b, 1, TINY.video_tokens, TINY.video_dim)
    controls = Controls(symbols, torch.randint(9, (b,)), first_frame, torch.arange(b) % 2 == 0)
    return x, history, controls


def some_case(chunks=6, **changes):
    """A model and what forward() takes, with a time for each chunk and branch."""
    x, history, controls = some_clip(chunks=chunks)
    t = torch.rand(2, chunks, 2).repeat_interleave(TINY.chunk, 1)
    d = (1 - t) * torch.rand(2, 1, 1)
    given = {"x_t": x, "t": t, "d": d, "controls": controls, "history": history}
    return lively(**changes), given


# ---- Config, symbols, codecs ----
def test_config_converts_types_and_names_the_field_that_is_wrong():
    cfg = Config(motion=2, characters=["ada"])
    assert cfg == Config(motion=2.0, characters=("ada",)) and type(cfg.motion) is float
    types = {"window": 2.0, "fps": True, "characters": "ada", "compand": "1", "motion": math.nan}
    ranges = {"chunk": 0, "video_channels": -1, "layers": 1000, "late": 0.5, "width": 2**20}
    fits = {"patch": 15, "step_sounds": 3, "bands": 3, "width": 100, "clock": 1, "late": 1}
    for name, value in [*types.items(), *ranges.items(), *fits.items()]:
        with pytest.raises(mf.UserError, match=rf"\b{name}\b"):
            Config(**{name: value})


def test_silence_is_the_last_symbol_and_unknown_the_next():
    assert mf.spell("É b!", frames=2) == [4, 4, 26, 26, 1, 1, 26, 26]
    cfg = replace(TINY, symbols=11)
    said = mf.film_controls(cfg, CODECS, 1, transcript=[3, 11]).symbols[0].tolist()
    assert said == [10] * 4 + [3, 11] + [10] * 6  # four frames and their margins
    assert mf.film_controls(cfg, CODECS, 1).symbols.unique().tolist() == [11]
    with pytest.raises(mf.UserError, match="between 0 and 11"):
        mf.film_controls(cfg, CODECS, 1, transcript=[12])


# ---- Schedules and the denoising loop ----
def test_grids_are_warped_progress_and_those_of_4_and_8_nest():
    even = torch.linspace(0, 1, 5)
    assert mf.warp(0, 4.0) == 0 and mf.warp(0.5, 4.0) == 0.2 and mf.warp(1, 4.0) == 1
    video, audio = mf.time_grid(TINY, 4)[:, 0, 0].unbind(-1)
    assert torch.equal(audio, mf.warp(even, TINY.audio_shift)) and (audio.diff() > 0).all()
    u = torch.tensor([0, TINY.late / 3, TINY.late * 2 / 3, TINY.late, 1])  # a late last step
    assert torch.allclose(video, mf.warp(u, TINY.video_shift), atol=1e-6)
    assert torch.equal(mf.time_grid(TINY, 4), mf.time_grid(TINY, 8)[::2])
    many = mf.time_grid(TINY, 40)[::10, 0, 0, 0]  # even: training draws few late times
    assert torch.allclose(many, mf.warp(even, TINY.video_shift), atol=1e-5)


def test_times_of_training_are_warped_too_one_for_each_chunk_and_branch():
    t = mf.draw_times(TINY, torch.zeros(20, 1000, 1), chunk=2)
    assert torch.equal(t[:, ::2], t[:, 1::2])
    u = mf.warp(t, 1 / TINY.shifts)  # its inverse
    assert torch.allclose(u.flatten(0, 1).median(0).values, torch.tensor(0.5), atol=0.02)
    same = torch.isclose(u[..., 0], u[..., 1], atol=1e-5).float().mean()
    assert abs(same - 0.5) < 0.02  # half of the chunks have the same progress in both


@pytest.mark.parametrize("steps", [1, 2, 4, 50])
def test_analytic_velocity_returns_the_data(steps):
    data, noise = torch.randn(2, 2, 4, TINY.latent_values)
    times = mf.time_grid(TINY, steps)
    states = mf.denoise(TINY, lambda x_t, k: data, noise, times)
    assert len(states) == steps + 1 and (states[-1] - data).abs().max() < 1e-5
    for x_t, t in zip(states, times):
        assert (x_t - mf.add_noise(TINY, data, noise, t)).abs().max() < 1e-5
        clamped = mf.each_value(TINY, ((1 - t) / 0.2).clamp(max=1))  # slower near the data
        v = mf.velocity(TINY, data, x_t, t)
        assert (v - clamped * (data - noise)).abs().max() < 1e-4


# ---- The model: who attends to whom ----
def test_equal_instants_have_equal_phase_in_both_modalities():
    video, audio = AudioVideoTransformer(TINY).phases(torch.arange(5))
    half = TINY.head_dim // 4  # the pairs that turn with time
    video = video.unflatten(0, (5, TINY.video_tokens))[:, :, :half]
    audio = audio.unflatten(0, (5, TINY.step_sounds, TINY.bands))[..., :half, :]
    assert torch.equal(video[:, 0], audio[:, 0, 0])  # the first hop of a latent frame
    assert not torch.equal(video[:, 0], audio[:, 1, 0])
    assert torch.equal(audio[:, :, 0], audio[:, :, 1])  # both bands of a hop sound at once


@torch.inference_mode()
def test_weights_in_bf16_hardly_change_the_output():
    model, given = some_case()
    exact, rough = model(**given), copy.deepcopy(model).bfloat16()(**given)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).std() < 0.03 * exact.std()


def test_positions_stay_bounded_and_the_same_after_10000_chunks():
    model, (x, _, controls) = lively(), some_clip(chunks=1)
    controls = controls._replace(symbols=torch.full((2, 50_000), 3))
    period = TINY.clock_ticks // TINY.step_sounds // TINY.chunk
    outs = []
    for count in (4, 4 + 157 * period):
        cache = model.start(controls)
        for cache.count in (count - 2, count - 1, count):
            out = model.step(x, 0.5 * ONE, 0 * ONE, controls, cache, commit=True)
        outs.append(out)
    assert count > 10_000 and torch.equal(*outs)


@pytest.mark.parametrize("window, asked", [(1, None), (2, None), (2, 1)])
def test_streamed_with_cache_equals_parallel_over_the_whole_stream(window, asked):
    """The most important test: both modes, controls on, before and after the window rolls."""
    model, given = some_case(chunks=7, window=window)
    x, t, d, controls, history = given.values()
    d[0] = 0  # one film in multi-step mode, one in few-step mode
    whole = model(**given, window=asked)
    cache = model.start(controls, asked)
    for s in range(0, 7 * TINY.chunk, TINY.chunk):
        chunk = slice(s, s + TINY.chunk)
        piece = model.step(x[:, chunk], t[:, s : s + 1], d[:, s : s + 1], controls, cache)
        assert (piece - whole[:, chunk]).abs().max() < 1e-4 * whole.std()
        model.step(history[:, chunk], ONE, 0 * ONE, controls, cache, commit=True)


def test_the_mask_is_the_picture_in_its_docstring():
    sizes = (TINY.video_tokens, TINY.audio_tokens)
    clip = [SimpleNamespace(phases=range(3 * 2 * size), x=ONE) for size in sizes]  # 3 chunks of 2
    first = SimpleNamespace(phases=range(TINY.video_tokens))
    mask = mf.ParallelAttention(clip + clip, [first], 3, window=1, has_history=True).mask
    lines = re.findall(r".*(?:first|history \d|noised \d) .*x.*", mf.ParallelAttention.__doc__)
    places = sorted({match.start() for line in lines for match in re.finditer("x", line)})
    picture = torch.tensor([[line[place : place + 1] == "x" for place in places] for line in lines])
    assert picture.shape == (7, 8) and picture[0].tolist() == [True] + 7 * [False]
    chunk = torch.cat([torch.arange(3).repeat_interleave(2 * size) for size in sizes])
    row = torch.cat([1 + chunk, 4 + chunk])
    sink = torch.ones_like(chunk[chunk == 0])
    column = torch.cat([torch.zeros(TINY.video_tokens).long(), sink, 2 + chunk, 5 + chunk])
    assert torch.equal(mask, picture[row][:, column])


def chunks_changed(model, given, **other):
    """The numbers of the chunks whose x_pred other inputs change."""
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
    moved = given["controls"]._replace(first_frame=-given["controls"].first_frame)
    assert chunks_changed(model, given, controls=moved) == list(range(9))


def test_each_modality_moves_the_other_and_sound_alone_has_a_gain_of_x_t():
    model, given = some_case(chunks=1)
    before, x = model(**given), given["x_t"]
    for moved in (IS_VIDEO, ~IS_VIDEO):
        change = model(**given | {"x_t": x + moved}) - before
        assert change[..., ~moved].abs().max() > 1e-4
    model.audio.gain.bias.data += 0.5
    assert torch.allclose(model(**given) - before, 0.5 * x * ~IS_VIDEO, atol=1e-5)


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
    guided = mf.guided(model, **given, guidance=3.0)
    assert torch.allclose(guided, null + 3 * (own - null), atol=1e-4)


def test_a_chunk_reads_the_transcript_up_to_four_frames_past_its_end():
    model, given = some_case()
    end = 3 * TINY.chunk_frames + 2 * TINY.margin
    for at, chunk in ((end - 1, 2), (end, 3)):  # the last symbol that chunk 2 sees, and the next
        symbols = given["controls"].symbols.clone()
        symbols[:, at] = (symbols[:, at] + 1) % 27
        other = given["controls"]._replace(symbols=symbols)
        assert chunks_changed(model, given, controls=other)[0] == chunk


def test_a_chunk_without_history_sees_itself_alone_even_if_it_is_the_whole_clip():
    model, given = some_case()
    given["history"] = None
    other = given["x_t"] + (torch.arange(12) == 11)[:, None]
    assert chunks_changed(model, given, x_t=other) == [5]
    assert chunks_changed(model, given | {"chunk": 12}, x_t=other) == list(range(6))


def test_forward_asserts_shapes():
    model, given = some_case()
    with pytest.raises(AssertionError, match="one number for video and one for audio"):
        model(**given | {"t": given["t"][..., :1]})
    with pytest.raises(AssertionError, match="whole number of chunks"):
        model(**given, chunk=5)


# ---- The cache and the sampler ----
def test_the_cache_keeps_the_sink_and_only_a_commit_writes_it():
    model, (x, _, controls) = lively(), some_clip(chunks=12)
    cache, states = model.start(controls), []
    for chunk in x.split(TINY.chunk, 1):
        states.append(torch.stack([cache.k, cache.v])[..., cache.size :, :].clone())
        for d in (0, 0.5):
            model.step(chunk, 0.3 * ONE, d * ONE, controls, cache)
        assert torch.equal(torch.stack([cache.k, cache.v])[..., cache.size :, :], states[-1])
        model.step(chunk, ONE, 0 * ONE, controls, cache, commit=True)
    first_frame, sink, newest, _ = states[1].split([TINY.video_tokens, *3 * [cache.size]], -2)
    assert torch.equal(sink[0], mf.without_time(newest[0])) and torch.equal(sink[1], newest[1])
    kept = torch.cat([first_frame, sink], -2)
    assert kept.abs().amax((1, 2, 3, 5)).min() > 0  # no place of it is empty
    for state in states[1:]:
        assert torch.equal(state[..., : kept.shape[-2], :], kept)


@pytest.mark.parametrize("few", [True, False])
def test_a_chunk_is_denoised_in_its_mode_and_committed_at_t_1_and_d_0(few):
    model, grid = lively(), mf.time_grid(TINY, 2)
    with mock.patch.object(model, "step", wraps=model.step) as step:
        list(mf.generate(model, some_clip()[2], 3, grid, few=few))
    calls = step.call_args_list
    t, d = (torch.stack([call.args[i] for call in calls]) for i in (1, 2))
    sizes = torch.cat([few * grid.diff(dim=0), 0 * grid[:1]])
    for given, expected in ((t, grid), (d, sizes)):  # all but the commit of the last chunk
        assert torch.equal(given, expected.repeat(3, 1, 1, 1)[:-1])
    assert [bool(call.kwargs) for call in calls] == (3 * [False, False, True])[:-1]  # commit=True


class StandIn:
    """A stand-in for a VAE of 4 frames a latent frame: it shows greys, which add up over time."""

    def encode(self, frames):
        grey = frames.float().unflatten(1, (-1, 4)).mean((2, 3, 4, 5))
        return grey[..., None, None].expand(-1, -1, TINY.video_tokens, 8)

    def decode_next(self, latents, state=None):
        grey = latents.mean((2, 3)).cumsum(1) + (100 if state is None else state)
        frames = grey.byte().repeat_interleave(4, 1)[..., None, None, None]
        return frames.expand(-1, -1, 16, 16, 3), grey[:, -1:]


@pytest.mark.parametrize("seconds, video", [(1.3, CODECS.video), (1.5, StandIn())])
def test_stream_is_exact_in_length_and_equals_one_shot_with_any_codec(seconds, video):
    stride_4 = {"step_frames": 4, "video_channels": 8}
    model = lively(**stride_4 if isinstance(video, StandIn) else {})
    codecs, count = make_codecs(model.cfg)._replace(video=video), round(16 * seconds)
    picture = np.full((16, 16, 3), 7, np.uint8)
    options = {"transcript": "hi you", "character": "ada", "first_frame": picture}
    pieces = list(mf.stream(model, codecs, seconds=seconds, seed=3, **options))
    frames, samples = map(np.concatenate, zip(*pieces))
    assert len(frames) == count and len(samples) == 64 * count
    assert len(pieces[0][1]) == 64 * model.cfg.chunk_frames - model.cfg.hop
    controls = mf.film_controls(model.cfg, codecs, len(pieces), **options)
    times, noise = mf.time_grid(model.cfg, 4), torch.Generator().manual_seed(3)
    films = mf.generate(model, controls, len(pieces), times, generator=noise)
    video, audio = mf.split(model.cfg, torch.cat([states[-1] for states in films], 1))
    assert np.array_equal(codecs.video.decode_next(video)[0][0, :count], frames)
    whole = codecs.audio.decode(audio)[0, : 64 * count].numpy()
    assert abs(whole - samples).max() <= 1e-5 * abs(whole).max()
    codecs.audio.decode_next = mock.Mock(side_effect=RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):  # is not swallowed
        next(mf.stream(model, codecs, seconds=1))


def test_stream_takes_4_steps_or_50_unless_told_and_guidance_of_one_is_none():
    model, films = lively(), []
    multi = {"mode": "multi"}
    choices = [{}, {"steps": 4}, {"steps": 5}, multi, multi | {"steps": 50}]
    choices += [{"guidance": 1 + 1e-6}, {"guidance": 3.0}]  # both double the batch
    for options in choices:
        film = mf.stream(model, CODECS, seconds=0.75, transcript="abc", **options)
        films.append(np.concatenate([frames for frames, _ in film]).astype(int))
    few, four, five, multi, fifty, unguided, guided = films
    assert (few == four).all() and (few != five).any()
    assert (multi == fifty).all() and (multi != few).any()
    assert abs(unguided - few).max() <= 1 < abs(guided - few).max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_callers_default_dtype_does_not_change_a_film(dtype):
    model, films = lively(), []
    for default in (torch.float32, dtype):
        torch.set_default_dtype(default)
        try:
            mf.rotary_table.cache_clear()
            pieces = list(mf.stream(model, make_codecs(TINY), seconds=0.75, transcript="ab"))
        finally:
            torch.set_default_dtype(torch.float32)
        films.append([np.concatenate(parts) for parts in zip(*pieces)])
    assert all(np.array_equal(*parts) for parts in zip(*films))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(mf.UserError, match="autocast"):
        next(mf.stream(model, CODECS, seconds=1))


def test_stream_refuses_what_it_cannot_do():
    model, options = lively(), [("seconds", 0), ("steps", 0), ("window", 3), ("window", 0)]
    options += [("seconds", math.nan), ("guidance", math.nan)]
    options += [("mode", "both"), ("character", "nobody"), ("transcript", [99])]
    options += [("first_frame", np.zeros((16, 16, 3))), ("first_frame", np.uint8([[[0] * 3]]))]
    for name, value in options:
        with pytest.raises(mf.UserError):
            next(mf.stream(model, CODECS, **{"seconds": 1} | {name: value}))


# ---- The objectives ----
def test_stage_2_overfits_a_batch_and_leaves_both_modes_equal_bit_for_bit():
    model, (_, given) = AudioVideoTransformer(TINY), some_case(chunks=2)
    given["history"] = x = given["x_t"]
    optimizer, losses = torch.optim.AdamW(model.parameters(), 3e-3), []
    for _ in range(120):
        optimizer.zero_grad()
        loss, _ = mf.flow_matching_loss(model, x, x, given["controls"])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    multi = model(**given | {"d": 0 * ONE})
    assert torch.equal(model(**given), multi)
    for branch in (model.video, model.audio):
        branch.step.size[-1].weight.data += 0.1
    assert torch.equal(model(**given | {"d": 0 * ONE}), multi)
    assert not torch.equal(model(**given), multi)


@pytest.mark.parametrize("branch, other", [("video", "audio"), ("audio", "video")])
def test_unimodal_training_leaves_the_other_branch_alone(branch, other):
    model, (x, _, controls) = lively(), some_clip()
    loss, _ = mf.flow_matching_loss(model, x, x, controls, branches=(branch,))
    loss.backward()
    moved = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert not any(name.startswith(other) for name in moved)
    assert {f"{branch}.{name}.weight" for name in ("embed", "head.2", "text.out")} <= moved


def stage3(b=3, chunks=6, **options):
    """Losses and logs of a step of stage 3, and its models."""
    torch.manual_seed(0)
    models = {"teacher": lively(), "real": lively(), "fake": lively()}
    model, (x, _, controls) = lively(), some_clip(b, chunks)
    losses, logs = mf.mutual_forcing_loss(model, x, controls, **models | options)
    return losses, logs, {"model": model} | models


@pytest.mark.parametrize("bf16", [False, True])  # a rollout's casts must not hide the weights
@pytest.mark.parametrize("term", ["flow", "shortcut", "dmd", "fake"])
@pytest.mark.parametrize("history", ["few", "real"])
def test_each_objective_reaches_the_weights_of_both_branches(term, history, bf16):
    with train.autocast(SimpleNamespace(device=ONE.device, precision="bf16" if bf16 else "fp32")):
        losses, logs, models = stage3(history=history)
    losses[term].backward()
    net = models.pop("fake" if term == "fake" else "model")
    for branch in (net.video, net.audio):
        for layer in (branch.sides[0].qkv, branch.head[-1]):
            assert layer.weight.grad.abs().max() > 0
        few_step = branch.step.size[-1].weight.grad.abs().max() > 0
        assert few_step == (term in ("shortcut", "dmd"))
    for other in models.values():  # no gradient through history, targets and scores
        assert all(weight.grad is None for weight in other.parameters())
    assert all(math.isfinite(value) for value in logs.values())


def test_objectives_weigh_what_is_asked_and_one_of_weight_zero_is_left_out():
    weights = {"flow": 0.6, "shortcut": 1 / 3, "dmd": 1 / 3}
    usual, heavier, guided = stage3()[0], stage3(weights=weights)[0], stage3(guidance=2.0)[0]
    ratios = [(heavier[term] / usual[term]).item() for term in (*weights, "fake")]
    assert np.allclose(ratios, [2, 0.5, 1, 1])
    assert {term for term in usual if guided[term] != usual[term]} == {"shortcut", "dmd"}
    mine = mock.Mock(return_value=(torch.tensor(3.0), {"mine": 3.0}))  # a fork's own
    options = {"weights": {"flow": 1, "dmd": 0}, "extra": {"mine": (2.0, mine)}}
    losses, logs, _ = stage3(**options, real=None, fake=None)
    assert list(losses) == ["flow", "mine"] and losses["mine"] == 6 and logs["mine"] == 3
    for options, message in (({"chunks": 1}, "two chunks"), ({"history": "both"}, "history")):
        with pytest.raises(ValueError, match=message):
            stage3(**options)


def test_rollouts_begin_from_the_real_chunk_but_for_dmd():
    with mock.patch.object(mf, "generate", wraps=mf.generate) as generate:
        stage3(b=12)
    times = generate.call_args.args[3]
    assert (times[-1] == 1).all() and (times.diff(dim=0) >= 0).all()
    begin = times[0, :, 0]  # (B, 2)
    is_dmd = torch.arange(12) % 3 == 2  # rows are dealt to the terms in turn
    assert not begin[is_dmd].any()
    for t, grid in zip(begin[~is_dmd].unbind(-1), mf.time_grid(TINY, 4)[2:4, 0, 0].unbind(-1)):
        assert torch.equal(t.unique(), grid)  # late


@pytest.mark.parametrize("history", ["few", "real"])
def test_rollouts_equal_the_parallel_form_on_the_history_that_they_leave(history):
    model, (x, _, controls) = lively(), some_clip(chunks=7)
    times = torch.maximum(mf.time_grid(TINY, 2), torch.tensor([0.0, 0.3])[:, None, None])
    sizes, counts = times.diff(dim=0), set()
    for seed in range(4):
        torch.manual_seed(seed)
        states, generated = mf.rollout(model, x, controls, times, history)
        past, out = states[-1] if history == "few" else x, states[0]
        for k in range(2):
            x_pred = model(out, times[k], sizes[k], controls, past)
            out = out.lerp(x_pred, mf.each_value(TINY, sizes[k] / (1 - times[k])))
        assert (out - states[-1])[:, generated].abs().max() < 1e-4 * x.std()
        assert torch.equal(states[-1][:, ~generated], x[:, ~generated])
        counts.add(int(generated.sum()) // TINY.chunk)
    assert counts == ({6} if history == "few" else {7})


def test_guided_films_equal_the_parallel_form_on_their_own_history():
    model, (_, _, controls) = lively(), some_clip(chunks=4)
    times = mf.time_grid(TINY, 2)
    films = mf.generate(model, controls, 4, times, guidance=3.0)
    states = [torch.cat(parts, 1) for parts in zip(*films)]
    given = {"controls": controls, "history": states[-1], "guidance": 3.0}
    sizes, out = times.diff(dim=0), states[0]
    for k in range(2):
        x_pred = mf.guided(model, out, times[k], sizes[k], **given)
        out = out.lerp(x_pred, mf.each_value(TINY, sizes[k] / (1 - times[k])))
    assert (out - states[-1]).abs().max() < 1e-4 * out.std()


def test_rollouts_carry_their_errors_on():
    model, (x, _, controls) = lively(), some_clip(chunks=3)
    late = torch.maximum(mf.time_grid(TINY, 4), mf.time_grid(TINY, 4)[2])
    noise, again = torch.Generator(), torch.Generator()  # of one seed
    films = mf.generate(model, controls, 3, late, clips=x, num_real_chunks=1, generator=noise)
    error = 0
    for i, (states, real) in enumerate(zip(films, x.split(TINY.chunk, 1))):
        noised = mf.add_noise(TINY, real + error, torch.randn(real.shape, generator=again), late[0])
        assert torch.equal(states[0], real if i == 0 else noised)
        error = (states[-1] - real).mean(1, keepdim=True)
        assert (error.abs().max() > 1e-3) == (i > 0)


def analytic(function):
    """A stand-in model: x_pred is a function of x_t, t and d, each (B, S, E)."""
    values = functools.partial(mf.each_value, TINY)
    net = mock.Mock(cfg=TINY)
    net.side_effect = lambda x_t, t, d, *_: function(x_t, values(t), values(d))
    return net


def gaussian(x_t, t, mean=0.0):
    """E[x | x_t] for x of this mean and unit variance: a flow that is known."""
    return mean + (x_t - t * mean) * t / (t**2 + (1 - t) ** 2)


def test_shortcut_targets_are_where_smaller_steps_of_a_known_flow_land():
    """The teacher's two modes differ here: the few-step mode follows the flow without error."""
    x, history, controls = some_clip(b=50)
    calls, shift = [], mf.each_value(TINY, TINY.shifts)

    def flow(z, t, end):
        return z * ((end**2 + (1 - end) ** 2) / (t**2 + (1 - t) ** 2)).sqrt()

    def teach(z, t, d):
        few = z + (flow(z, t, t + d) - z) * (1 - t) / d.clamp(min=1e-9)
        return torch.where(d == 0, gaussian(z, t), few)

    def learn(z, t, d):
        calls.append((z, t, t + d))
        return out

    out = torch.zeros_like(x, requires_grad=True)
    loss, _ = mf.shortcut_loss(analytic(learn), x, history, controls, teacher=analytic(teach))
    loss.backward()  # the gradient is 2 (out - target) / count, and out is 0
    ((z, t, end),) = calls
    count = x[..., 0].numel() * torch.where(IS_VIDEO, TINY.video_values, TINY.audio_values)
    landing = z + (-out.grad * count / 2 - z) * (end - t) / (1 - t)
    u, u_end = mf.warp(t, 1 / shift), mf.warp(end, 1 / shift)  # progress
    m = mf.warp((u + u_end) / 2, shift)
    middle = z + (gaussian(z, t) - z) * (m - t) / (1 - t)
    v = (gaussian(middle, m) - middle) / (1 - m)
    step_of_8 = torch.where(end > 0.999, middle + v * (end - m), z + v * (end - t))
    expected = torch.where(u_end - u > 0.2, flow(z, t, end), step_of_8)
    early = torch.tensor(mf.warp(0.9, TINY.video_shift))  # for video's last step, of equal noise
    denoised = gaussian(torch.lerp((z - t * x) / (1 - t), x, early), early)
    expected = torch.where(IS_VIDEO & (end > 0.999), denoised, expected)
    assert torch.allclose(landing, expected, atol=1e-4)
    for i in (0, -1):  # all steps of the sampler's grids, and no others
        learned = torch.stack([t, end], -1)[:, :, i].flatten(0, 1).unique(dim=0)
        grids = [mf.time_grid(TINY, steps)[:, 0, 0, i] for steps in (4, 8)]
        steps = torch.cat([torch.stack([grid[:-1], grid[1:]], 1) for grid in grids])
        assert torch.allclose(learned, steps.unique(dim=0), atol=1e-6)


def dmd_gradient(mean_real, mean_fake, times):
    """DMD's gradient on a model's picture and sound; the scores are Gaussians of these means."""
    torch.manual_seed(0)
    (x, _, controls), offset = some_clip(), torch.zeros(2, requires_grad=True)
    net = analytic(lambda z, t, d: x + mf.each_value(TINY, offset))
    real = analytic(lambda z, t, d: gaussian(z, t, mean_real))
    fake = analytic(lambda z, t, d: gaussian(z, t, mean_fake))
    options = {"real": real, "fake": fake, "generated": torch.ones(x.shape[1]).bool()}
    loss, _ = mf.dmd_loss(net, [torch.randn_like(x), x], x, controls, times=times, **options)
    loss.backward()
    return offset.grad


def test_dmd_gradient_has_the_right_sign_size_and_a_zero():
    one, four = mf.time_grid(TINY, 1), mf.time_grid(TINY, 4)
    assert (dmd_gradient(2.0, 0.0, one) < -1e-3).all()  # descent moves toward the real mean
    assert (dmd_gradient(-2.0, 0.0, one) > 1e-3).all()
    assert (dmd_gradient(1.0, 1.0, one) == 0).all()
    far = dmd_gradient(1e3, 0.0, one)
    assert torch.allclose(far, -torch.ones(2), atol=0.05)  # about 1, however far
    ratio = dmd_gradient(2.0, 0.0, four[:2]) / dmd_gradient(2.0, 0.0, four[3:])
    assert torch.allclose(ratio**2, torch.tensor([four[1, 0, 0, 0], 1]))


# ---- Checkpoints ----
@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small.pt"
    mf.save_checkpoint(path, AudioVideoTransformer(Config(width=32, layers=1, heads=1)))
    return path


def test_checkpoint_round_trip_is_atomic_and_safe(tmp_path, monkeypatch):
    model, path = lively(), tmp_path / "a.pt"
    mf.save_checkpoint(path, model, {"step": 3})
    loaded, extra = mf.load_checkpoint(path)
    assert extra == {"step": 3} and loaded.cfg == TINY
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.half().float())
    old = path.read_bytes()
    mf.save_checkpoint(tmp_path / "compiled.pt", torch.compile(model))
    assert mf.load_file(tmp_path / "compiled.pt")["weights"].keys() == model.state_dict().keys()
    (tmp_path / "compiled.pt").unlink()
    monkeypatch.setattr(Path, "write_bytes", lambda part, data: part.write_text("half") / 0)
    with pytest.raises(ZeroDivisionError):
        mf.save_checkpoint(path, model)
    model.no_first.data[0] = 1e9
    with pytest.raises(mf.CheckpointError, match="no_first"):
        mf.save_checkpoint(path, model)
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["a.pt"]


class Evil:
    def __reduce__(self):  # to unpickle it would make a file
        return Path.touch, (Path("owned"),)


def test_bad_checkpoints_end_in_a_line_that_says_why(small_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, path = mf.load_file(small_checkpoint), tmp_path / "bad.pt"
    config, weights = content["config"], content["weights"]
    changes = {
        "not a checkpoint of this project": {"config": Evil()},
        "this version": {"format": "other"},
        "depth": {"config": config | {"depth": 64}},
        "window must be int": {"config": config | {"window": 2.0}},
        "width must be int": {"config": config | {"width": torch.eye(3)}},
        "missing.*audio.sides.1.qkv.weight": {"config": config | {"layers": 2}},
        "unexpected.*more": {"weights": weights | {"more": torch.zeros(3)}},
        "no_first is": {"weights": weights | {"no_first": torch.zeros(3)}},
        "video.place": {"weights": weights | {"video.place": weights["video.place"] * math.nan}},
    }
    for message, change in changes.items():
        mf.save_file(path, content | change)
        with pytest.raises(mf.CheckpointError, match=f"^{path}: .*{message}[^\n]*$"):
            mf.load_checkpoint(path)
    assert not Path("owned").exists()
    for data in (b"", b"hello" * 100):
        path.write_bytes(data)
        with pytest.raises(mf.CheckpointError, match="not a checkpoint"):
            mf.load_checkpoint(path)
    with pytest.raises(mf.CheckpointError, match="No such file"):
        mf.load_checkpoint(tmp_path / "missing")
    with mock.patch.object(mf, "Branch", side_effect=RuntimeError), pytest.raises(RuntimeError):
        mf.load_checkpoint(small_checkpoint)  # a bug is not the file's fault


# ---- The scripts ------------------------------------------------------------------------------------------

SMALL = "--config width=32 layers=1 heads=1 chunk=2 image=32 --batch 3 --seconds 0.75 1 --save 2"
SMALL += " --lr 1e-2 --device cpu --precision fp32 --from-scratch"


def run_train(out, words="", **more) -> int:
    return train.main([*SMALL.split(), *words.split(), "--out", str(out)], **more)


def run_sample(*words, **more) -> int:
    return sample.main([*map(str, words), "--device", "cpu"], **more)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small")  # of stage 2, after two steps
    assert run_train(folder, "--stage joint --steps 2") == 0
    return folder / "joint.pt"


@pytest.mark.parametrize("stage", list(train.STAGES))
def test_two_plus_two_steps_are_four_steps_bit_for_bit(stage, tmp_path, monkeypatch):
    assert run_train(tmp_path / "whole", f"--stage {stage} --steps 4") == 0
    step = train.train_step

    def killed(state, *rest):
        logs = step(state, *rest)
        if state.step == 3:  # one step after the checkpoint; the log has more than the checkpoint
            raise SystemExit(9)
        return logs

    monkeypatch.setattr(train, "train_step", killed)
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    with pytest.raises(SystemExit):
        run_train(tmp_path / "parts", f"--stage {stage} --steps 4")
    monkeypatch.setattr(train, "train_step", step)
    assert run_train(tmp_path / "parts", f"--stage {stage} --steps 4 --resume") == 0
    files = [tmp_path / name / f"{stage}.pt" for name in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()
    lines = (tmp_path / "parts" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def test_sample_refuses_mistakes_in_one_line_and_keeps_an_old_film(small, tmp_path, capsys):
    old = tmp_path / "film.wav"
    old.write_bytes(b"old")
    for words, said in (
        (["--seconds", "0"], "seconds"),
        (["--steps", "0"], "steps"),
        (["--window", "9"], "window"),
        (["--guidance", "-1"], "guidance"),
        (["--character", "nobody"], "nobody"),
        (["--say", "123"], "--say"),
        (["--first-frame", small], "picture"),
        (["--checkpoint", old], "film.wav"),
        (["--out", tmp_path / "film.txt"], "ending"),
        (["--out", tmp_path / "no" / "film.wav"], "no"),
    ):
        assert run_sample("--checkpoint", small, "--out", old, *words) == 2
        lines = capsys.readouterr().err.splitlines()
        assert said in lines[-1] and "Traceback" not in "".join(lines), (words, lines)
        assert old.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_a_bug_gives_a_traceback(small, tmp_path):
    def broken(cfg, device):
        raise RuntimeError(
            "unsupported operation: more than one element refers to a memory location"
        )

    with pytest.raises(RuntimeError, match="memory location"):
        run_sample("--checkpoint", small, "--out", tmp_path / "a.wav", make_codecs=broken)
    with pytest.raises(ValueError, match="shape"):
        run_train(tmp_path, "--stage joint", make_codecs=lambda *_: np.zeros(3).reshape(2, 2))


def test_a_forks_codecs_and_objective_are_arguments_of_main(tmp_path):
    calls = []

    def codecs(cfg, device):
        return make_codecs(cfg, device)._replace(video=StandIn())

    def objective(model, x, history, controls):
        calls.append(x.shape)
        t, d = torch.zeros(1, 1, 2), torch.full((1, 1, 2), 0.25)
        loss = (model(torch.randn_like(x), t, d, controls, history) - x).square().mean()
        return loss, {"mine": loss.item()}

    readme = (HERE / "README.md").read_text()
    (tmp_path / "example.py").write_text(re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1])
    example = runpy.run_path(tmp_path / "example.py")
    words = "--stage mutual --steps 1 --batch 5 --seconds 1.5"
    words += " --config image=16 patch=8 step_frames=4 step_sounds=8 video_channels=8"
    extra = {"mine": (0.5, objective), "steady_sound": (0.1, example["steady_sound"])}
    more = {"make_codecs": codecs, "extra": extra}
    assert run_train(tmp_path, words, **more) == 0
    assert calls == [(1, 6, 4 * 8 + 16 * 125)]
    logs = json.loads((tmp_path / "log.jsonl").read_text())
    assert logs["mine"] > 0 and logs["steady_sound"] > 0
    words = ["--checkpoint", tmp_path / "mutual.pt", "--out", tmp_path / "a.gif", "--seconds", 1]
    assert run_sample(*words, make_codecs=codecs) == 0
    assert imageio.v3.imread(tmp_path / "a.gif", index=None).std((1, 2, 3)).max() == 0  # greys


def test_readme_commands_parse_and_files_exist():
    text = (HERE / "README.md").read_text() + (HERE / "docs" / "training.md").read_text()
    parsers = {"train.py": train.build_parser(), "sample.py": sample.build_parser()}
    seen = set()
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            for script, parser in parsers.items():
                if f"{script} " in line + " " and "$" not in line:
                    words = shlex.split(line.split(script, 1)[1], comments=True)
                    parser.parse_args(words)  # exits if it does not fit
                    seen.add(script)
    assert seen == set(parsers)
    for name in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (HERE / name).exists() or (HERE / "docs" / name).exists(), name
    source = "".join(file.read_text() for file in [*HERE.glob("*.py"), *HERE.glob("*/*.py")])
    for name in re.findall(r"`(\w+)\(\)`", text):
        assert f"def {name}(" in source, name
