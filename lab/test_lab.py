"""What data/ and lab/ claim, on tiny models and synthetic films."""

import argparse
import http.client
import json
import os
import signal
import socket
import struct
import threading
import time
from dataclasses import replace
from itertools import islice
from unittest import mock

import imageio.v3 as iio
import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F

import mutual_forcing as mf
import sample
import train
from data.checkpoint import load_file, save_checkpoint
from data.codecs import make_codecs
from data.controls import spell, stream_film
from data.decoding import decode_clip
from lab import benchmark, claims, evaluate, live, ruler, score_line
from lab.flow_map import flow_map_dmd
from mutual_forcing import AudioVideoTransformer, Config

SIZES = {"width": 32, "layers": 2, "heads": 2, "image": 16, "video_dim": 32, "audio_dim": 32}
TINY = Config(**SIZES, sample_rate=1024, chunk=2, window=2)
SMALL = Config(width=32, layers=1, heads=1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)


def lively(cfg: Config) -> AudioVideoTransformer:
    model = AudioVideoTransformer(cfg)
    for weight in model.parameters():
        weight.data += 0.15 * torch.randn_like(weight)
    return model


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "small.pt"
    save_checkpoint(path, lively(SMALL), make_codecs(SMALL), {"stage": "mutual"})
    return path


# ---- lab/


def test_the_ruler_knows_truth_from_shuffled_sound_and_sees_what_is_wrong():
    cfg = Config()
    films = evaluate.to_films(evaluate.held_out(cfg, 6, 6), cfg)
    reference = evaluate.to_films(evaluate.held_out(cfg, 6, 6, kind=1), cfg)
    own_ruler, length = evaluate.Ruler(cfg), films.frames.shape[1]
    with pytest.raises(mf.UserError, match="even fps"):
        evaluate.Ruler(Config(fps=25))

    def score(**wrong):  # in their one window
        figures = evaluate.score(own_ruler, films._replace(**wrong), reference)
        return {name: value for name, (value,) in figures.items()}

    truth, shuffled = score(), score(samples=np.roll(films.samples, 1, 0))
    assert truth["transcript_error"] <= 0.01 and shuffled["transcript_error"] > 0.8
    assert truth["lip"] > 0.97 and truth["sync"] > 0.95 and abs(shuffled["sync"]) < 0.3
    assert abs(truth["sync_lag_ms"]) < 10 and truth["identity_drift"] < 0.01
    assert truth["voice_drift"] < 0.05 and 0.1 < truth["frechet_audio"] < 1
    late = np.roll(films.samples, 1000, 1)  # at 8 kHz
    assert abs(score(samples=late)["sync_lag_ms"] - 125) < 15
    still = score(frames=films.frames[:, :1].repeat(length, 1))
    assert still["motion"] == 0 and still["lip"] == 0 and truth["motion"] > 0.003
    light = np.linspace(1, 0.5, length)[None, :, None, None, None]
    assert score(frames=(films.frames * light).astype(np.uint8))["identity_drift"] > 0.05
    hiss = 0.02 * np.random.default_rng(0).standard_normal(films.samples.shape)
    assert score(samples=films.samples + hiss)["frechet_audio"] > 2 * truth["frechet_audio"]
    softer = truth["loudness_db"] - score(samples=films.samples / 2)["loudness_db"]
    assert abs(softer - 6.02) < 0.01
    assert score(samples=0 * films.samples)["letter_margin"] is None
    other = np.roll(films.samples, 1, 0)
    other[:, :12000] = films.samples[:, :12000]  # another's voice from 1.5 s on
    assert score(samples=other)["voice_drift"] > 0.4
    assert score(symbols=None) == truth | {"transcript_error": None, "lip": None}


def blurred(frames: np.ndarray) -> np.ndarray:
    """Frames with the mean of 3 x 3 pixels in each pixel's place."""
    pixels = torch.from_numpy(frames).float().movedim(-1, 2).flatten(0, 1)
    means = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return means.round().byte().movedim(1, -1).reshape(frames.shape).numpy()


def test_the_ruler_sees_what_is_wrong_with_the_picture():
    cfg, rng = Config(), np.random.default_rng(0)
    films = evaluate.to_films(evaluate.held_out(cfg, 3, 5), cfg)
    own_ruler, frames = evaluate.Ruler(cfg), films.frames
    looks = own_ruler.looks(frames)

    def score(frames, symbols=films.symbols):
        changed = films._replace(frames=frames, symbols=symbols)
        figures = evaluate.score(own_ruler, changed, films)
        return {name: value for name, (value,) in figures.items()}

    truth = score(frames)
    assert 75 < truth["iris"] < 100 and truth["iris_difference"] < 3
    assert 10 < truth["stripes"] < 30 and 0.15 < truth["saturation"] < 0.6
    assert truth["mouth_letters"] > 0.95 and 0.95 < truth["lips_follow"] < 1.05
    assert truth["lopsided"] == truth["flicker"] == 0 and truth["grain"] < 0.3
    babbling = score(frames, symbols=None)
    assert babbling["mouth_letters"] > 0.9 and babbling["iris"] == truth["iris"]

    dull = score(((frames + frames.mean(-1, keepdims=True)) / 2).astype(np.uint8))
    for name in ("iris", "saturation"):
        assert 0.4 * truth[name] < dull[name] < 0.65 * truth[name]
    assert truth["palette"] < 0.1 and dull["palette"] > 10
    soft = score(blurred(frames))
    assert soft["stripes"] < 0.95 * truth["stripes"] and soft["iris"] < 0.7 * truth["iris"]
    assert soft["mouth_letters"] < truth["mouth_letters"] - 0.05 and soft["lopsided"] == 0
    noisy = np.rint(np.clip(frames + 2 * rng.standard_normal(frames.shape), 0, 255))
    noisy = score(noisy.astype(np.uint8))
    assert 2 < noisy["flicker"] < 2.5 and 1 < noisy["grain"] < 1.3  # grey: the mean of 3 colours
    assert noisy["lopsided"] < 0.01 and 0.95 < noisy["lips_follow"] < 1.05
    assert abs(noisy["iris"] - truth["iris"]) < 2 and noisy["mouth_letters"] > 0.95

    # A mouth of another moment, beside a grey eye; one that does not follow; one that is torn.
    other, fixed, torn = (frames.copy() for _ in range(3))
    other[:, :, 20:31, 32:46] = other[:, :, 20:31, 32:46].mean(-1, keepdims=True)
    for film, places in enumerate(np.rint(looks.mouth).astype(int)):
        for f, (y, x) in enumerate(places):
            mouth, still = np.s_[y - 6 : y + 7, x - 9 : x + 10], np.s_[33:46, 23:42]
            skin = frames[film, f, y - 3, x - 10]
            late_y, late_x = places[f - 40]
            late = frames[film, f - 40, late_y - 6 : late_y + 7, late_x - 9 : late_x + 10]
            other[film, f][mouth] = late
            fixed[film, f][mouth] = skin
            fixed[film, f][still] = frames[film, f][mouth]
            torn[film, f, y - 6 : y + 7, x - 9 : x] = frames[film, f, y - 5 : y + 8, x - 9 : x]
    other = score(other)
    assert other["mouth_letters"] < 0.3
    assert other["iris_difference"] > 10 * truth["iris_difference"]
    assert abs(score(fixed)["lips_follow"]) < 0.2
    assert score(torn)["lopsided"] > 0.5


def test_statistics_of_known_curves():
    time = np.arange(160) / 16
    curve = np.stack([np.sin(2 * time), np.sin(3 * time + 1)])
    assert ruler.correlation(curve, 2 * curve + 1) == pytest.approx(1)
    late = np.stack([np.sin(2 * (time - 0.1)), np.sin(3 * (time - 0.1) + 1)])
    assert ruler.lag_ms(curve, late, fps=16) == pytest.approx(100, abs=3)
    a, b = np.random.default_rng(0).standard_normal((2, 20000, 2))
    distance = ruler.frechet(a, b * 3 + 1, np.ones(2))
    assert distance == pytest.approx(1 + (3 - 1) ** 2, rel=0.05)  # means, then standard deviations
    assert evaluate.windows_of(600) == [(0, 5), (5, 15), (15, 25), (590, 600)]


def test_the_ruler_sees_the_films_that_stream_makes():
    model, codecs, films = lively(TINY), make_codecs(TINY), evaluate.held_out(TINY, 17, 1)
    options = {"few": True, "steps": 2, "guidance": 1.0, "with_transcript": True}
    made = evaluate.remake(model, codecs, films, **options)
    film = films[16]  # alone in its batch, whose noise has a seed of its own
    given = {"transcript": film.symbols[TINY.margin :], "character": film.character}
    given |= {"first_frame": film.frames[0], "seed": 16}
    parts = list(stream_film(model, codecs, seconds=1, steps=2, **given))
    assert np.array_equal(made.frames[16], np.concatenate([frames for frames, _ in parts]))
    samples = np.concatenate([samples for _, samples in parts])
    assert np.allclose(made.samples[16], samples, atol=1e-5)
    unknown = [film._replace(symbols=0 * film.symbols + TINY.unknown) for film in films[:2]]
    again = evaluate.remake(model, codecs, unknown, **options)
    without = evaluate.remake(model, codecs, films[:2], **options | {"with_transcript": False})
    assert np.array_equal(without.samples, again.samples)


def test_evaluate_scores_in_windows(checkpoint, monkeypatch, capsys):
    words = [str(checkpoint), "--talkers", "2", "--seconds", "5", "--device", "cpu"]
    assert evaluate.main([*words, "--mode", "few", "--steps", "1", "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["windows"] == [[0, 5]] and err.count("ground truth: ") == 2
    names = ["ground truth", "shuffled sound", str(checkpoint)]
    assert [row["checkpoint"] for row in result["rows"]] == 2 * names
    assert all(list(row)[5:] == list(evaluate.FIGURES) for row in result["rows"])
    spoken, without = result["rows"][:3], result["rows"][3:]
    errors = [row["transcript_error"][0] for row in spoken]
    assert errors[0] == 0 and min(errors[1:]) > 0.8
    assert all(row["transcript_error"] == row["lip"] == [None] for row in without)
    assert [(row["mode"], row["steps"]) for row in spoken] == 2 * [(None, None)] + [("few", 1)]
    assert [path.name for path in checkpoint.parent.iterdir()] == ["small.pt"]
    row = {"checkpoint": "a", "mode": "few", "steps": 4, "control": "spoken"}
    rows = [row | {name: [0.25, 0.5] for name in evaluate.FIGURES}]
    rows.append(rows[0] | {"control": "babbling"})
    result = {"windows": [(0, 5), (5, 15)], "rows": rows}
    monkeypatch.setattr(evaluate, "evaluate", lambda *_, **asked: result)
    assert evaluate.main([*words, "--all"]) == 0
    out = capsys.readouterr().out
    assert "| figure | a, few 4 | what it is |" in out and "| lip | 0.25 / 0.5 |" in out
    assert all(meaning in out for meaning in evaluate.FIGURES.values())
    assert evaluate.main(words) == 0
    out = capsys.readouterr().out
    assert "Babbling, seconds 5-15\n" in out and "| lip | 0.5 |" in out and "0.25" not in out
    for name, meaning in evaluate.FIGURES.items():
        assert (meaning in out) == (name in ruler.DEFAULT_FIGURES)


def test_the_score_line_has_a_row_for_each_kept_checkpoint(tmp_path, monkeypatch, capsys):
    words = [str(tmp_path), "--seconds", "5", "--talkers"]
    for talkers, said in (("2", "holds no checkpoint"), ("1", "--talkers must be")):
        assert score_line.main([*words, talkers]) == 2
        assert said in capsys.readouterr().err
    for name, codec, joint in (("after-990-minutes", 30.0, 960), ("after-1020-minutes", 30, 990.0)):
        extra = {"stage": "joint", "minutes": {"codec": codec, "joint": joint}}
        save_checkpoint(tmp_path / f"{name}.pt", lively(SMALL), make_codecs(SMALL), extra)
    for codec, rows in ((31, ["990", "1020", "ground"]), (30, ["990", "1020", "1021", "ground"])):
        extra = {"stage": "mutual", "minutes": {"codec": codec, "joint": 990.0, "mutual": 1}}
        save_checkpoint(tmp_path / "mutual.pt", lively(SMALL), make_codecs(SMALL), extra)
        with monkeypatch.context() as unscored:
            if codec == 31:  # mutual.pt is of an earlier run
                unscored.setattr(score_line, "evaluate", lambda *_, **__: {"rows": []})
            assert score_line.main([*words, "2"]) == 0
        table = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
        assert [line[0].split()[1] for line in table] == rows
    assert table[2][1] == "mutual" and 0 < float(table[2][2]) <= 1  # letters misread
    assert float(table[3][2]) == 0


def test_clips_have_no_letters_to_score():
    clips = evaluate.held_out(SMALL, 2, 6)
    clips = [clip._replace(symbols=0 * clip.symbols + SMALL.unknown) for clip in clips]
    models = {"one": (lively(SMALL), make_codecs(SMALL))}
    result = evaluate.evaluate(models, talkers=2, seconds=5, settings=[], clips=clips)
    for row in result["rows"]:
        assert {name for name in evaluate.FIGURES if row[name] != [None]} == set(evaluate.OF_CLIPS)


def test_evaluate_refuses_bad_input_in_one_line(checkpoint, tmp_path, capsys):
    other, teacher = tmp_path / "other.pt", tmp_path / "teacher.pt"
    odd = replace(SMALL, chunk=3)  # 5 s are less than a window
    save_checkpoint(other, lively(odd), make_codecs(odd))
    save_checkpoint(teacher, lively(SMALL), make_codecs(SMALL), {"whole": True})
    options = ("--seconds inf", "--talkers 1", "--data no-such-folder", "--device abacus")
    wrong = [[checkpoint, *option.split()] for option in options]
    wrong += [[checkpoint, other], [other], [teacher], [tmp_path / "missing.pt"], [tmp_path]]
    for words in wrong:
        assert evaluate.main(["--talkers", "2", "--seconds", "5", *map(str, words)]) == 2, words
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("lab.evaluate: ") and err.count("\n") == 1, err


def test_operations_are_counted_once():
    linear, a, b = torch.nn.Linear(7, 4), torch.randn(3, 5, 7), torch.randn(3, 7, 2)
    q, k = torch.randn(1, 3, 5, 7), torch.randn(1, 3, 6, 7)

    def multiply():
        linear(a).sum().backward()  # the product, and the gradient of the weights
        a @ b
        F.scaled_dot_product_attention(q, k, k)  # two products

    counted = benchmark.operations_of(multiply)
    assert counted == 2 * (2 * 15 * 7 * 4 + 15 * 7 * 2 + 2 * 15 * 7 * 6)
    assert 0 < benchmark.limit_of(multiply, torch.device("cpu")) < 0.01


def test_a_chunk_costs_its_steps_and_the_commit():
    codecs = make_codecs(TINY)

    def operations(steps):  # of the fourth chunk: the window is full
        film = stream_film(lively(TINY), codecs, seconds=9, steps=steps)
        for _ in range(3):
            next(film)
        return benchmark.operations_of(lambda: next(film))

    video, audio = mf.split(TINY, torch.randn(1, TINY.chunk, TINY.latent_values))
    decoding = benchmark.operations_of(lambda: codecs.video.decode_next(video))
    decoding += benchmark.operations_of(lambda: codecs.audio.decode_next(audio))
    step = operations(2) - operations(1)
    assert operations(1) - decoding == pytest.approx(2 * step, rel=0.1)


def test_the_benchmark_times_as_many_rollouts_of_4_steps_as_of_8(monkeypatch):
    drawn = []

    def recording(*_, steps, **__):
        drawn.append(steps)

    monkeypatch.setattr(train.mf, "mutual_forcing_loss", recording)
    args = train.build_parser().parse_args([])
    args.weights, args.extra, args.real_is_whole = {}, None, False
    state = argparse.Namespace(stage="mutual", model=None, ema=None, real=None, nets={})
    for state.step in [*range(1, benchmark.TURNS), *benchmark.COUNTED]:
        train.losses_of(state, None, None, args)
    assert drawn.count(4) == drawn.count(8) == 6 and drawn[-2:] == [4, 8]


def test_benchmark_prints_positive_figures(checkpoint, monkeypatch, capsys):
    (what, measure, settings), training_jobs = benchmark.JOBS[1], benchmark.JOBS[-3:]
    given = (checkpoint, torch.device("cpu"), make_codecs)
    assert benchmark.main(["--device", "abacus"]) == 2
    words = ["--device=cpu", f"--checkpoint={checkpoint}"]
    monkeypatch.setattr(benchmark, "JOBS", [(what, measure, settings | {"seconds": 1})])
    assert benchmark.main([*words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    film = rows[0]
    assert film["decode_ms"] < film["chunk_ms_median"] <= film["chunk_ms_p95"]
    assert abs(film.pop("memory_growth_mb")) < 100
    rows.append(benchmark.start_up_row(*given))
    monkeypatch.setattr(benchmark, "TURNS", 2)
    for _, measure, settings in training_jobs:
        rows.append(measure(*given, **settings | {"batch": 1}))
        assert rows[-1]["step_ms"] > rows[-1]["forward_ms"] + rows[-1]["backward_ms"]
    for row in rows:
        numbers = [value for value in row.values() if isinstance(value, (int, float))]
        assert len(numbers) >= 3 and min(numbers) > 0, row
    monkeypatch.setattr(benchmark, "benchmark", lambda *_: {"machine": "abacus", "rows": rows[:1]})
    assert benchmark.main(words) == 0
    out = capsys.readouterr().out
    assert out.startswith("abacus\n\n| what | mode | steps |") and benchmark.LEGEND in out


def test_every_arm_of_the_claims_is_a_command_of_train(tmp_path, monkeypatch):
    words = ["--init", str(tmp_path / "joint.pt"), "--out", str(tmp_path)]
    args, commands = claims.build_parser().parse_args(words), {}
    args.checksums, args.device = {}, "cpu"

    def parse(words, _, extra):
        parsed = train.build_parser().parse_args(words)
        commands[parsed.out.name.rsplit("-", 2)[0]] = parsed
        return 0

    monkeypatch.setattr(train, "main", parse)
    monkeypatch.setattr(claims, "save_stage_0", mock.Mock())
    for name in claims.ARMS:
        claims.train_arm(name, 0, args, make_codecs)
    assert commands.keys() == claims.ARMS.keys() - {"two-stages"}
    assert {name for name, parsed in commands.items() if parsed.init != args.init} == {"one-stage"}
    one = commands["one-stage"]
    assert one.init == tmp_path / "codec.pt" and one.stage == "joint"
    assert one.steps == sum(train.STAGES[stage].steps for stage in ("unimodal", "joint"))
    assert commands["self-forcing"].teacher.parent.name.startswith("teacher-0-")


@pytest.mark.parametrize("mean", [0.0, 2.0, -2.0])  # of the data; the films' is 0
def test_without_a_fake_score_films_move_toward_the_data(mean):
    offset = torch.zeros(2, requires_grad=True)  # of the few-step mode's picture and sound
    is_video = torch.arange(TINY.latent_values) < TINY.tokens * TINY.video_dim

    def velocity(x_t, t, d, *_):
        """Of the flow from noise to Gaussians: over an interval d of the films', else of the data's."""
        end = t + d
        few = x_t * (((end**2 + (1 - end) ** 2) / (t**2 + (1 - t) ** 2)) ** 0.5 - 1)
        few = few / d.clamp(min=1e-9) + torch.where(is_video, *offset)
        x = mean + (x_t - t * mean) * t / (t**2 + (1 - t) ** 2)  # E[x | x_t]
        return torch.where(d == 0, (x - x_t) / (1 - t), few)

    films, model = torch.randn(8, 12, TINY.latent_values), mock.Mock(cfg=TINY, side_effect=velocity)
    loss, _ = flow_map_dmd(model, films, films, None)
    loss.backward()
    if mean:
        assert (offset.grad * mean < -1e-3).all()
    else:
        assert offset.grad.abs().max() < 1e-3 and loss < 1e-4


def test_what_stage_0_left_is_found_in_a_later_checkpoint(tmp_path):
    for stage in ("codec", "joint --init {out}/codec.pt"):
        words = f"--stage {stage} --preset tiny --steps 1 --batch 1 --out {{out}} --overwrite"
        assert train.main(words.format(out=tmp_path).split()) == 0
    claims.save_stage_0(tmp_path / "joint.pt", tmp_path / "found.pt", make_codecs)
    left, found = (load_file(tmp_path / f"{name}.pt") for name in ("codec", "found"))
    for part in ("model", "codecs"):
        torch.testing.assert_close(found[part], left[part], rtol=0, atol=0)


def test_claims(tmp_path, monkeypatch, capsys):
    tiny = "--preset tiny --stage joint --from-scratch --steps 4 --device cpu"
    assert train.main([*tiny.split(), "--out", f"{tmp_path}/init"]) == 0
    results, page = tmp_path / "r.json", tmp_path / "r.md"
    page.write_text(f"above\n{claims.BEGIN}\nold\n{claims.END}\nbelow\n")
    words = f"--init {tmp_path}/init/joint.pt --out {tmp_path}/runs --results {results}"
    words += " --arms shortcut self-forcing --talkers 2 --seconds 5 --device cpu"
    words, usual, few = words.split(), claims.ARMS, "--steps 2 --batch 2 "
    short = {name: arm._replace(options=arm.options + few) for name, arm in usual.items()}
    monkeypatch.setattr(claims, "ARMS", short)
    runs, steps, main, step = [], [], train.main, train.train_step

    def counting(words, *rest):
        runs.append(words)
        return main(words, *rest)

    def interrupting(state, *rest):
        steps.append((state.stage, state.plan.batch))
        if len(steps) == 3:  # the first step of the teacher, once the first arm is scored
            os.kill(os.getpid(), signal.SIGINT)
        return step(state, *rest)

    monkeypatch.setattr(train, "main", counting)
    monkeypatch.setattr(train, "train_step", interrupting)
    assert claims.main(words) == 130
    first = json.loads(results.read_text())
    assert {row["arm"] for row in first["rows"]} == {"ground truth", "shuffled sound", "shortcut"}
    assert claims.main(words) == 0
    # Two steps of each arm and none twice, in four runs, as the teacher's was interrupted.
    assert steps == [("mutual", 2)] * 2 + [("joint", 2)] * 2 + [("mutual", 2)] * 2
    whole = json.loads(results.read_text())
    assert whole["rows"][:8] == first["rows"] and len(whole["rows"]) == 12 and len(runs) == 4
    assert len(whole["arms"]["self-forcing"]["alike"]["0"]) == 2  # layers
    assert iio.imread(tmp_path / "arms" / "self-forcing.png").shape == (128, 768, 3)

    monkeypatch.setattr(claims, "evaluate", None)  # calling it would fail
    assert claims.main(words) == 0 and len(runs) == 4
    capsys.readouterr()
    assert claims.main(["--tables", "--results", str(results)]) == 0
    tables = capsys.readouterr().out
    assert tables.count("| shortcut | few | 8 |") == tables.count("| ground truth |") == 2
    assert page.read_text() == f"above\n{claims.BEGIN}\n{tables}{claims.END}\nbelow\n"
    monkeypatch.setattr(claims, "ARMS", usual)
    assert claims.main(words) == 2 and "training of shortcut" in capsys.readouterr().err
    others = " ".join(words).replace("shortcut self-forcing", "two-stages").split()
    with pytest.raises(TypeError):
        claims.main([*others, "--mix"])  # only arms that are made again lose their rows
    assert json.loads(results.read_text())["rows"] == whole["rows"]
    monkeypatch.setattr(claims, "ARMS", short)
    results.write_text(json.dumps(whole | {"code": "other"}))
    assert claims.main(words) == 2 and "another code; --mix" in capsys.readouterr().err
    assert claims.main([*words, "--mix"]) == 0 and json.loads(results.read_text())["mixed"]


def test_seeds_are_scored_apart_and_become_a_mean_and_a_spread(tmp_path, monkeypatch):
    words = ["--results", str(tmp_path / "r.json"), "--seconds", "25"]
    args, made = claims.build_parser().parse_args(words), []
    args.device, args.checksums = "cpu", {}
    results = {"init": "", "code": "", "mixed": False, "arms": {}, "rows": []}

    def evaluate(models, *, settings, **films):
        row = {name: [0.1 * len(made)] * 3 for name in ruler.FIGURES} | {"guidance": 1.0}
        made.append(settings)
        rows = [row | {"mode": mode, "steps": steps} for mode, steps in settings]
        return {"rows": [row | {"control": "spoken", "checkpoint": "dmd"} for row in rows]}

    monkeypatch.setattr(claims, "evaluate", evaluate)
    monkeypatch.setattr(claims, "train_arm", lambda name, seed, *rest: tmp_path / f"{seed}.pt")
    monkeypatch.setattr(claims, "likeness", lambda *_: [1.0])
    monkeypatch.setattr(claims, "draw_strip", lambda *_: np.zeros((2, 2, 3), np.uint8))
    for seed in (0, 1, 0):  # the third has scores already
        save_checkpoint(tmp_path / f"{seed}.pt", lively(TINY), make_codecs(TINY))
        claims.score_arm("dmd", seed, args, results, make_codecs)
    assert made == [claims.FEW] * 2 and [row["seed"] for row in results["rows"]] == [0, 0, 1, 1]
    lines = claims.tables(results).splitlines()
    cell = "0.05 ± 0.071"
    found = [line for line in lines if line.startswith("| dmd | few | 4 | 1 | 2 |")]
    assert len(found) == 1 and found[0].count(f"{cell} / {cell} / {cell}") == len(claims.SHOWN)


# ---- lab/live.py


@pytest.fixture
def live_server(tmp_path):
    """A server of a tiny model, and ask(path, **fields) -> (status, bytes)."""
    path = tmp_path / "tiny.pt"
    save_checkpoint(path, lively(TINY), make_codecs(TINY), {"stage": "mutual"})
    args = {"port": 0, "character": "ada", "checkpoint": path, "steps": 4, "device": "cpu"}
    with live.Server(argparse.Namespace(**args), make_codecs) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()

        def ask(path, headers=None, method="POST", body=None, **fields):
            connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
            connection.request(method, path, body or json.dumps(fields), headers or {})
            answer = connection.getresponse()
            content = answer.read()
            connection.close()
            return answer.status, content

        yield server, ask
        server.shutdown()
        thread.join()


def begun(ask, name: str, steps=4) -> str:
    assert ask("/begin", film=name, character="ada", seed=3, steps=steps)[0] == 200
    return name


def read_chunks(ask, film: str, begin: int, end: int) -> tuple[np.ndarray, np.ndarray, list]:
    """Frames and samples of chunks begin to end of a film, and the symbols of the frames."""
    num_samples = round(TINY.chunk_seconds * TINY.sample_rate)
    chunk = [("index", "<u4"), ("samples", "<f4", num_samples)]
    chunk += [
        ("frames", "u1", (TINY.chunk_frames, 16, 16, 3)),
        ("symbols", "u1", TINY.chunk_frames),
    ]
    chunks = []
    for index in range(begin, end):
        status, content = ask("/chunk", film=film)
        assert status == 200, content
        (content,) = np.frombuffer(content, chunk)
        assert content["index"] == index
        chunks.append(content)
    frames, samples, symbols = (
        np.concatenate([content[name] for content in chunks])
        for name in ("frames", "samples", "symbols")
    )
    return frames, samples, symbols.tolist()


def streamed(server, transcript, **settings) -> tuple[np.ndarray, np.ndarray]:
    settings = {"seconds": 30, "character": "ada", "steps": 4, "seed": 3} | settings
    film = stream_film(server.model, server.codecs, transcript=transcript, **settings)
    frames, samples = zip(*islice(film, 8))
    return np.concatenate(frames), np.concatenate(samples)


def test_a_live_film_is_what_stream_makes_of_the_same_text(live_server):
    server, ask = live_server
    film, other = begun(ask, "a"), begun(ask, "b", steps=8)
    read_chunks(ask, film, 0, 2)
    read = 2 * TINY.chunk_frames + TINY.margin
    assert ask("/say", film=film, text="héy") == (200, str(read).encode())
    assert ask("/say", film=film, text="you") == (200, str(read + 12).encode())
    frames, samples, symbols = read_chunks(ask, film, 2, 8)
    expected = [TINY.silence] * read + spell("hey you")
    whole_frames, whole_samples = streamed(server, expected)
    assert np.array_equal(frames, whole_frames[8:])
    assert np.array_equal(samples, whole_samples[len(whole_samples) - len(samples) :])
    assert len(whole_samples) == 32 * 64 - TINY.hop  # so that the sound is a hop late
    assert symbols == expected[8:32]
    other_frames, _, _ = read_chunks(ask, other, 0, 1)
    assert not np.array_equal(other_frames, whole_frames[:4])

    # From the picture of frame 30, with other settings; text that was not spoken still is.
    assert ask("/say", film=film, text="mama")[0] == 200
    settings = {"character": "hana", "seed": 5, "steps": 4}
    assert ask("/begin", film=film, frame=30, **settings)[0] == 200
    frames, samples, _ = read_chunks(ask, film, 8, 11)
    script = spell("hey you mama")[32 - read :]
    new_frames, new_samples = streamed(server, script, first_frame=whole_frames[30], **settings)
    assert np.array_equal(frames, new_frames[:12])
    assert np.array_equal(samples[TINY.hop :], new_samples[: len(samples) - TINY.hop])
    assert not samples[: TINY.hop].any()  # the last sound of the stream before is lost


def test_a_saved_live_film_has_the_frames_and_the_sound_of_its_last_seconds(
    live_server, tmp_path, monkeypatch
):
    _, ask = live_server
    monkeypatch.setattr(live, "KEPT_SECONDS", 1)
    film = begun(ask, "a")
    frames, samples, _ = read_chunks(ask, film, 0, 8)
    (tmp_path / "film.mp4").write_bytes(ask("/save", film=film)[1])
    clip = decode_clip(tmp_path / "film.mp4", TINY)
    assert len(clip.frames) == 16 and len(clip.samples) == 1024
    luma = np.array([0.299, 0.587, 0.114])  # of which H.264 keeps more than of the colours
    errors = []
    for first in (15, 16):  # the second is right
        differences = clip.frames - frames[first : first + 16].astype(int)
        errors.append(abs(differences @ luma).mean())
    assert errors[1] < 0.7 * errors[0]
    correlations = {}
    for shift in range(-16, 17, 4):  # in samples
        expected = samples[1024 + TINY.hop + shift :][:900]
        correlations[shift] = np.corrcoef(clip.samples[:900], expected)[0, 1]
    assert correlations[0] == max(correlations.values()) > 0.4


def test_the_last_chunk_of_a_live_stream_is_as_long_as_the_others(live_server):
    server, _ = live_server
    film = live.LiveFilm(server.model, server.codecs)
    settings = {"seconds": 2 * TINY.chunk_seconds, "character": "ada", "steps": 4}
    transcript = film.transcript()
    film.stream = stream_film(server.model, server.codecs, transcript=transcript, **settings)
    assert len(film.chunk()) == len(film.chunk())
    with pytest.raises(mf.UserError, match="ended"):
        film.chunk()


def test_a_live_server_refuses_in_one_line(live_server, monkeypatch, capfd):
    monkeypatch.setattr(live, "LEFT_SECONDS", 60)
    server, ask = live_server
    film = begun(ask, "a")
    wrong = [
        (404, "/nothing", {}),
        (404, "/act", {"film": film}),
        (404, "/transcript", {"film": film}),
        (404, "/nothing", {"method": "GET"}),
        (400, "/say", {"method": "GET"}),
        (400, "/chunk", {"film": "1"}),
        (400, "/chunk", {}),
        (400, "/begin", {"film": "b", "seed": -1}),
        (400, "/chunk", {"film": "b"}),
        (403, "/", {"method": "GET", "headers": {"Host": "example.com"}}),
        (403, "/begin", {"headers": {"Origin": "http://example.com"}}),
        (413, "/say", {"film": film, "text": "a" * 4097}),
        (400, "/say", {"body": "a"}),
        (400, "/say", {"film": film, "text": "a" * 501}),
        (400, "/say", {"film": film, "text": "123"}),
    ]
    for status, path, request in wrong:
        answer, line = ask(path, **request)
        assert answer == status and b"\n" not in line and len(line) > 10, (path, answer, line)
    for name in "bcd":
        begun(ask, name)
    status, line = ask("/begin", film="e")
    assert status == 400 and b"4 films are playing" in line
    assert b"bruno" in ask("/", {"Host": "localhost:99"}, "GET")[1]
    assert capfd.readouterr().err == ""

    # A maker that fails: the page and stderr are told, and the other films go on.
    server.films[film].symbols.append("bug")
    status, line = ask("/chunk", film=film)
    assert status == 500 and line.startswith(b"TypeError; ")
    assert "Traceback" in capfd.readouterr().err
    status, line = ask("/chunk", film=film)
    assert status == 400 and b"has ended" in line
    read_chunks(ask, "b", 0, 1)
    for wrong in ({"character": "nobody"}, {"steps": 0}):
        assert ask("/begin", film=film, **wrong)[0] == 200
        status, line = ask("/chunk", film=film)
        assert status == 400 and line.startswith((b"no character", b"steps must be"))


def test_a_live_film_that_no_page_asks_for_makes_room(live_server):
    server, ask = live_server
    for name in "abc":
        begun(ask, name)
        server.films[name].asked -= live.LEFT_SECONDS + 1
    read_chunks(ask, "a", 0, 1)
    begun(ask, "d")
    assert list(server.films) == ["a", "b", "c", "d"]  # there is room: nobody has to go
    begun(ask, "e")
    assert list(server.films) == ["a", "c", "d", "e"]
    status, line = ask("/chunk", film="b")
    assert status == 400 and b"has ended" in line


def test_a_page_that_leaves_is_no_bug(live_server, capfd, monkeypatch):
    server, ask = live_server
    film = begun(ask, "a")
    body = json.dumps({"film": film}).encode()
    head = b"POST /chunk HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
    act, shutdown_request = server.act, server.shutdown_request
    asked, left, ended = threading.Event(), threading.Event(), threading.Semaphore(0)

    def act_later(*given, **options):
        asked.set()
        assert left.wait(20)
        return act(*given, **options)

    def end_request(request):
        shutdown_request(request)
        ended.release()

    monkeypatch.setattr(server, "act", act_later)
    monkeypatch.setattr(server, "shutdown_request", end_request)
    for sent in (head + body, head):  # one page waits for its answer, one has not asked to the end
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as page:
            page.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
            page.sendall(sent)
            assert sent == head or asked.wait(20)
        left.set()
        assert ended.acquire(timeout=20)
    read_chunks(ask, film, 1, 2)
    assert capfd.readouterr().err == ""


def test_live_refuses_mistakes_in_one_line(checkpoint, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for words in ("--character nobody", f"--port {port}", "--port 70000", "--checkpoint no.pt"):
            given = ["--device", "cpu", "--checkpoint", str(checkpoint), *words.split()]
            assert live.main(given) == 2
            out, err = capsys.readouterr()
            assert out == "" and err.startswith("lab.live: ") and err.count("\n") == 1, err


def test_sample_speaks_what_is_typed_while_it_is_typed(checkpoint, tmp_path, monkeypatch, capsys):
    def type_in(*parts):
        read, write = os.pipe()
        monkeypatch.setattr("sys.stdin", os.fdopen(read))

        def typing():
            for part in parts:
                os.write(write, part)
                time.sleep(0.3)
            os.close(write)

        thread = threading.Thread(target=typing)
        thread.start()
        code = sample.main([*words, "-"])
        thread.join()
        return code

    monkeypatch.setattr("sys.stdin", None)
    out = tmp_path / "film.wav"
    words = f"--checkpoint {checkpoint} --out {out} --device cpu --json --say".split()
    assert sample.main([*words, "-"]) == 2
    assert "no standard input" in capsys.readouterr().err
    for *parts, text in ((b"hi\n", b"you", "hi you"), (b"\xc3", b"\xa9m", "em")):
        assert type_in(*parts) == 0
        typed, figures = soundfile.read(out)[0], json.loads(capsys.readouterr().out)
        frames = 2 + 3 * len(text) + 8  # of the second text: whole chunks
        assert figures["frames"] == frames and len(typed) == frames * 500
        assert sample.main([*words, text, "--seconds", "3"]) == 0
        capsys.readouterr()
        assert np.array_equal(typed, soundfile.read(out)[0][: len(typed)])
    out.unlink()
    assert type_in(b"\n", b"1 2") == 2
    assert "nothing in it can be spoken" in capsys.readouterr().err and not out.exists()
