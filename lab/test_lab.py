"""What data/ and lab/ claim, on tiny models and synthetic films."""

import json
import math
import os
import signal
import subprocess
import time
import tracemalloc
from dataclasses import replace
from types import SimpleNamespace

import imageio.v3
import imageio_ffmpeg
import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel

import mutual_forcing as mf
import sample
import train
from data.clips import drawer, fingerprint, load_clips, read_subtitles
from data.codecs import encode_films, make_codecs, stack
from data.decoding import ClipError, decode_clip
from data.pictures import read_picture
from data.talker import talk
from lab import benchmark, claims, evaluate, ruler
from mutual_forcing import AudioVideoTransformer, Config, UserError, spell

TINY = Config(width=32, layers=2, heads=2, image=16, patch=8, sample_rate=1024, chunk=2, window=2)
SMALL = Config(width=32, layers=1, heads=1)
CODECS = make_codecs(TINY)


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
    mf.save_checkpoint(path, lively(SMALL), {"stage": "mutual"})
    return path


# ---- data/


def test_codecs_invert_and_stream():
    frames = torch.arange(2 * 4 * 16 * 16 * 3).remainder(256).byte().reshape(2, 4, 16, 16, 3)
    samples = torch.rand(2, 4 * 64) * 2 - 1
    for codec, film, due in zip(CODECS, (frames, samples), (0, TINY.hop)):
        tokens = codec.encode(film)
        begin, state = codec.decode_next(tokens[:, :1])
        rest, state = codec.decode_next(tokens[:, 1:], state)
        n, streamed = film.shape[1] - due, torch.cat([begin, rest], 1)
        assert torch.allclose(streamed.float(), film[:, :n].float(), atol=1e-5)
        assert torch.allclose(codec.decode(tokens)[:, :n], streamed)
    assert torch.equal(codec.decode(tokens)[:, n:], state)  # the sound that is due


def test_video_codec_enlarges_changes_and_differences_across_borders():
    frames = torch.full((1, 2, 16, 16, 3), 100, dtype=torch.uint8)
    frames[:, 1] += 10  # brighter in time
    frames[..., 8:, :] += 20  # and a step at the border of two patches
    tokens = CODECS.video.encode(frames)[0, 0, :2]
    left, right = tokens.unflatten(1, (2, 8, 8, 3))[:, :, 0, :, 0]  # each (frame, column)
    grey, step = (left + right.flip(1)) / 2, right.flip(1) - left  # of mirrored pixels
    assert torch.allclose(grey[0], torch.tensor(110 / 127.5 - 1))
    assert torch.allclose(grey[1] - grey[0], torch.tensor(TINY.motion * 10 / 127.5))
    gain = torch.tensor([1, 1, 1, 1, 1, TINY.seam / 3, TINY.seam / 2, TINY.seam])
    assert torch.allclose(step, 20 / 127.5 * gain)


def test_spectra_of_sound_are_orthogonal_and_have_unit_variance():
    cfg = Config()
    codecs = make_codecs(cfg)
    product = codecs.audio.basis.double().T @ codecs.audio.basis.double()
    assert (product - torch.eye(cfg.hop)).abs().max() < 1e-6
    films = stack([talk(cfg, np.random.default_rng(seed), 24) for seed in range(16)])
    x, _ = encode_films(cfg, codecs, films)
    video, audio = mf.split(cfg, x)
    assert audio.shape == (16, 12, 8, 125) and 0.8 < audio.std() < 1.2
    assert torch.equal(mf.join(video, audio), x)


@pytest.mark.parametrize("kind", ["mp4", "gif", "wav", "png"])
def test_sample_writes_each_kind_of_film(kind, checkpoint, tmp_path, capsys):
    (tmp_path / "films").mkdir()
    out = tmp_path / "films" / f"film.{kind}"
    words = f"--checkpoint {checkpoint} --say hi_ab --out {out} --json --device cpu"
    assert sample.main(words.split()) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["frames"] == 2 + 3 * 5 + 8 and figures["steps"] == 4
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    if kind == "wav":
        samples, rate = soundfile.read(out)
        assert rate == 8000 and len(samples) == 25 * 500 and np.abs(samples).max() > 0
    elif kind == "png":
        assert imageio.v3.imread(out).shape == (2 * (64 + 24), 2 * 64 * 7, 3)
    else:
        frames = imageio.v3.imread(out, index=None)
        assert frames.shape[1:3] == (256, 256) and len(frames) == 25
    if kind == "mp4":
        assert abs(imageio_ffmpeg.count_frames_and_secs(out)[1] - 25 / 16) < 0.05


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
    parts = list(mf.stream(model, codecs, seconds=1, steps=2, **given))
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
    assert result["windows"] == [[0, 5]] and err.count("| ground truth |") == 2
    names = ["ground truth", "shuffled sound", str(checkpoint)]
    assert [row["checkpoint"] for row in result["rows"]] == 2 * names
    assert all(list(row)[5:] == list(evaluate.FIGURES) for row in result["rows"])
    spoken, without = result["rows"][:3], result["rows"][3:]
    errors = [row["transcript_error"][0] for row in spoken]
    assert errors[0] == 0 and min(errors[1:]) > 0.8
    assert all(row["transcript_error"] == row["lip"] == [None] for row in without)
    assert [(row["mode"], row["steps"]) for row in spoken] == 2 * [(None, None)] + [("few", 1)]
    assert [path.name for path in checkpoint.parent.iterdir()] == ["small.pt"]
    rows = [{"checkpoint": "a", "mode": None} | {name: [0.25, 0.5] for name in evaluate.FIGURES}]
    result = {"windows": [(0, 5), (5, 15)], "rows": rows}
    monkeypatch.setattr(evaluate, "evaluate", lambda *_, **asked: result)
    assert evaluate.main([*words, "--all"]) == 0
    assert "| a | - | 0.25 / 0.5 | 0.25 / 0.5 |" in capsys.readouterr().out
    assert evaluate.main(words) == 0
    out = capsys.readouterr().out
    assert "Seconds 5-15\n" in out and "| a | - | 0.5 |" in out and "0.25" not in out
    assert all(meaning in out for meaning in evaluate.FIGURES.values())


def test_clips_have_no_letters_to_score():
    clips = evaluate.held_out(SMALL, 2, 6)
    clips = [clip._replace(symbols=0 * clip.symbols + SMALL.unknown) for clip in clips]
    given = {"one": lively(SMALL)}, make_codecs(SMALL)
    result = evaluate.evaluate(*given, talkers=2, seconds=5, settings={}, clips=clips)
    for row in result["rows"]:
        assert {name for name in evaluate.FIGURES if row[name] != [None]} == set(evaluate.OF_CLIPS)


def test_evaluate_refuses_bad_input_in_one_line(checkpoint, tmp_path, capsys):
    other, teacher = tmp_path / "other.pt", tmp_path / "teacher.pt"
    mf.save_checkpoint(other, lively(replace(SMALL, chunk=3)), {})  # 5 s are less than a window
    mf.save_checkpoint(teacher, lively(SMALL), {"whole": True})
    options = ("--seconds inf", "--talkers 1", "--data no-such-folder", "--device abacus")
    wrong = [[checkpoint, *option.split()] for option in options]
    wrong += [[checkpoint, other], [other], [teacher], [tmp_path / "missing.pt"], [tmp_path]]
    for words in wrong:
        assert evaluate.main(["--talkers", "2", "--seconds", "5", *map(str, words)]) == 2, words
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("lab.evaluate: ") and err.count("\n") == 1, err


def test_products_are_counted_once():
    linear = torch.nn.Linear(7, 4)
    a, b = torch.randn(3, 5, 7), torch.randn(3, 7, 2)
    q, k = torch.randn(1, 3, 5, 7), torch.randn(1, 3, 6, 7)

    def multiply():
        linear(a).sum().backward()  # the product, and the gradient of the weights
        a @ b
        torch.einsum("bij,bjk->bik", a, b)
        for backend in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
            with sdpa_kernel(backend):
                F.scaled_dot_product_attention(q, k, k)

    products = benchmark.matrix_products(multiply)
    sizes = sorted(math.prod(left) * right[-1] for left, right in products)
    assert sizes == sorted(2 * [15 * 7 * 4] + 2 * [15 * 7 * 2] + 4 * [15 * 7 * 6])
    assert all(left[-1] == right[-2] for left, right in products)
    assert 0 < benchmark.seconds_alone(products, torch.device("cpu")) < 0.1


def test_a_chunk_costs_its_steps_and_the_commit():
    def size(steps, cache):  # multiplications of the fourth chunk: the window is full
        settings = {"batch": 1, "mode": "few", "guidance": 1.0, "steps": steps, "cache": cache}
        film = benchmark.films_of(lively(TINY), make_codecs(TINY), 4, **settings)
        for _ in range(3):
            next(film)
        return sum(math.prod(a) * b[-1] for a, b in benchmark.matrix_products(lambda: next(film)))

    assert size(2, cache=True) == pytest.approx(1.5 * size(1, cache=True), rel=0.1)
    assert 1.5 < size(1, cache=False) / size(1, cache=True) < 4  # four chunks for two passes


def test_benchmark_quick_prints_positive_figures(checkpoint, monkeypatch, capsys):
    assert benchmark.main(["--quick", "--json", "--device=cpu", f"--checkpoint={checkpoint}"]) == 0
    rows = film, uncached, step = json.loads(capsys.readouterr().out)["rows"]
    assert film["cache"] and not uncached["cache"]
    for row in rows:
        numbers = [value for value in row.values() if type(value) in (int, float)]
        assert len(numbers) >= 5 and min(numbers) > 0, row
    for row in (film, uncached):
        assert row["chunk_ms_median"] <= row["chunk_ms_p95"]
        assert row["fps_end_to_end"] < min(row["fps_model"], row["fps_codec"])
    monkeypatch.setattr(benchmark, "matrix_products", lambda step: [((2, 2), (2, 2))])  # fast
    for stage in train.STAGES:
        job = {"stage": stage, "batch": 1, "seconds": 1.5}
        row = benchmark.training_row(checkpoint, torch.device("cpu"), make_codecs, job)
        assert row.keys() == step.keys() and row["step_seconds"] > 0


def test_claims(tmp_path, monkeypatch, capsys):
    tiny = f"--preset tiny --stage joint --steps 4 --device cpu --out {tmp_path}/init"
    assert train.main(tiny.split()) == 0
    results, page = tmp_path / "r.json", tmp_path / "r.md"
    page.write_text(f"above\n{claims.BEGIN}\nold\n{claims.END}\nbelow\n")
    words = f"--init {tmp_path}/init/joint.pt --out {tmp_path}/arms --results {results}"
    words += " --arms shortcut self-forcing --talkers 2 --seconds 5 --device cpu --steps 2"
    words = [*words.split(), "--batch", "2"]
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
    assert (tmp_path / "arms" / "arms.png").exists()

    monkeypatch.setattr(claims, "evaluate", None)  # calling it would fail
    assert claims.main(words) == 0 and len(runs) == 4
    capsys.readouterr()
    assert claims.main(["--tables", "--results", str(results)]) == 0
    tables = capsys.readouterr().out
    assert tables.count("| shortcut | few | 8 |") == tables.count("| ground truth |") == 2
    assert page.read_text() == f"above\n{claims.BEGIN}\n{tables}{claims.END}\nbelow\n"
    assert claims.main(words[:-2]) == 2 and "training of shortcut" in capsys.readouterr().err
    results.write_text(json.dumps(whole | {"code": "other"}))
    assert claims.main(words) == 2 and "another code; --mix" in capsys.readouterr().err
    assert claims.main([*words, "--mix"]) == 0 and json.loads(results.read_text())["mixed"]


# ---- Clips, subtitles and pictures


CFG = Config()
one = "1\n{}\nhello you\n".format  # a cue by its times
TWO = "1\n00:00:01,000 --> 00:00:02,000\nhello you\n\n2\n00:00:03,500 --> 00:00:04,000\nhm\n"


def ffmpeg(path, *options, pixels=None, rate=16):
    """Write a file; pixels (F, h, w, 3) are given to ffmpeg as its first input."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y"]
    if pixels is not None:
        size = f"{pixels.shape[2]}x{pixels.shape[1]}"
        command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", str(rate), "-i", "-"]
    data = b"" if pixels is None else pixels.tobytes()
    subprocess.run([*command, *map(str, options), path], input=data, check=True)
    return path


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    sound = ["-f", "lavfi", "-i", "sine=440:d=4:r=16000"]
    options = ["-pix_fmt", "yuv420p", "-g", "12", "-movflags", "+faststart"]
    return ffmpeg(path, "-f", "lavfi", "-i", "testsrc=s=64x48:r=25:d=4", *sound, *options)


def said(tmp_path, text, frames=80):
    (tmp_path / "said.srt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_subtitles(tmp_path / "said.srt", CFG, frames)


def expected(*phrases, frames=80):
    """Symbols of (begin, end, text) in frames; a text of None is unknown."""
    symbols = np.full(frames, CFG.silence)
    for begin, end, text in phrases:
        letters = [CFG.unknown] if text is None else spell(text, 1)
        for frame in range(begin, min(end, frames)):
            symbols[frame] = letters[(frame - begin) * len(letters) // (end - begin)]
    return symbols


HELLO, BOTH = [(16, 32, "hello you")], [(16, 32, "hello you"), (56, 64, "hm")]
LATER, LONG = [(24, 40, "hello you")], "1\n00:00:01,000 --> 00:00:03,000\n"
VTT, CAPTION = "WEBVTT\n\n", "0:00.32 --> 0:02.389 align:start\n \nhello<0:00.919><c> and</c>"
CAPTION += "<0:01.199><c> you</c>\n\n0:02.389 --> 0:02.399\nhello and you\n \n\n0:02.399 --> 0:04\n"
ROLLING = [(5, 15, "hello "), (15, 19, "and "), (19, 38, "you "), (38, 45, "to "), (45, 64, "my")]
READ = {  # a text, and the phrases that it holds
    "two digits": (one("00:00:01,95 --> 00:00:03,50"), [(31, 56, "hello you")]),
    "six digits": (one("0:00:01.950000 --> 0:00:03"), [(31, 48, "hello you")]),
    "colon": (one("00:00:01:500 --> 00:00:02:500"), LATER),
    "space": (one("00:00:01, 500 --> 00:00:02, 500"), LATER),
    "blank": (one("00:00:01,000 --> 00:00:02,000\n \n"), HELLO),
    "crcrlf": (TWO.replace("\n", "\r\r\n"), BOTH),
    "latin-1": (TWO.replace("hello", "h\xe9llo").encode("latin-1"), BOTH),
    "accents": (TWO.replace("hello", "he\u0301ll\xf6"), [(16, 32, "hello you"), BOTH[1]]),
    "signs": (LONG + "a < b --> c > d", [(16, 48, "a < b --> c > d")]),
    "markup": (TWO.replace("hello", "{\\an8}<i>hello</i>"), BOTH),
    "same time": (LONG + "ab\n\n" + LONG + "cd", [(16, 48, "ab cd")]),
    "overlap": ("0:03 --> 0:05\ncd\n\n0:01 --> 0:04\nab", [(16, 48, "ab "), (48, 80, "cd")]),
    "vtt": (VTT + "NOTE a\nb\n\nname\n0:01 --> 0:02 line:0%\n<v Al>hello you\n\nNOTE c", HELLO),
    "rolling": (VTT + CAPTION + "hello and you\nto<0:02.800><c> my</c>\n", ROLLING),
}
for encoding in ("utf-8-sig", "utf-16", "utf-16-be", "utf-32-le"):
    READ[encoding] = (TWO.encode(encoding), BOTH)
UNKNOWN = {  # the reason -> a text, the words that are left, and the frames that are unknown
    "(line 6)": (TWO.replace("03,500", "0x,500"), [*HELLO, (32, 80, None)]),
    "2 of 2 cues": (TWO.replace("-->", "->"), [(0, 80, None)]),
    "after the end": (TWO.replace("00:03", "10:03").replace("00:04", "10:04"), HELLO),
    "letters a to z": (TWO.replace("hm", "\u4f60\u597d"), [*HELLO, (56, 64, None)]),
    "too short": (TWO.replace("04,000", "03,510"), [*HELLO, (56, 57, None)]),
    "times (line 10)": (TWO + "\n3\n00:00:04,5", [*BOTH, (64, 80, None)]),
}


@pytest.mark.parametrize("name", [*READ, *UNKNOWN])
def test_subtitles_are_read_or_unknown_and_named(name, tmp_path, capsys):
    text, phrases = {**READ, **UNKNOWN}[name]
    assert (said(tmp_path, text) == expected(*phrases)).all()
    remark = capsys.readouterr().err
    assert name in remark if name in UNKNOWN else remark == ""


def test_long_subtitles_take_less_than_a_second(tmp_path):
    cues = []
    for i in range(0, 10800, 2):  # three hours
        stamp = f"{i // 3600}:{i // 60 % 60}:{i % 60}"
        cues.append(one(f"{stamp},100 --> {stamp},900"))
    digits = "1" * 32000
    line = one(f"00:00:01,{digits} --> {digits}:00:02") + f"&#{digits};"
    for text in ("\n".join(cues), digits, line):
        began = time.process_time()
        said(tmp_path, text, frames=3 * 3600 * CFG.fps)
        assert time.process_time() - began < 1


def test_a_folder_is_used_or_named(film, tmp_path, capsys):
    folder, cache = tmp_path / "clips", tmp_path / "cache"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.mp4", "sub/b.m4v", "noending"):
        (folder / name).write_bytes(film.read_bytes())
    for line in ("c.ts", "d.m4a -vn", "e.avi -an", "short.mkv -t 0.5"):
        name, *options = line.split()
        ffmpeg(folder / name, "-i", film, *options)
    Image.new("RGB", (9, 9)).save(folder / "p.png")
    for name in ("a.en.srt", "a.srt", "orphan.vtt", "n.txt", ".hidden"):
        (folder / name).write_text(TWO)
    (folder / "damaged.mp4").write_bytes(b"\0nothing")
    clips = load_clips(folder, CFG, 24, cache)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("1 clips with words, 5 without words, 7 files not used")
    for line in """without picture, for stage audio alone: d.m4a
        without sound, for stage video alone: e.avi
        a.en.srt: not used, a.mp4 has a.srt
        orphan.vtt: not used, no clip of its name is used
        p.png: not used, a picture
        n.txt: not used, a text
        .hidden: not used, hidden
        short.mkv: not used, 0.50 s, a clip takes 1.50 s""".splitlines():
        assert f"  {line.strip()}" in lines
    assert "  damaged.mp4: not used, nothing in it can be decoded" in "\n".join(lines)
    assert len(clips) == 6 and len(drawer(clips, "joint").args[0]) == 4
    words = np.pad(expected(*BOTH, frames=64), CFG.margin, constant_values=CFG.silence)
    assert (clips[0].symbols == words).all()
    assert (clips[1].symbols == CFG.unknown).all()
    assert fingerprint(load_clips(folder, CFG, 24, cache)) == fingerprint(clips)  # from the cache
    for path in folder.glob("[!a]*"):
        path.rename(tmp_path / path.name)
    load_clips(folder, CFG, 24, cache)
    assert sum(file.name != "lock" for file in cache.iterdir()) == 3  # of one clip


def test_loading_takes_little_memory(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        ffmpeg(tmp_path / name, "-f", "lavfi", "-i", "testsrc=s=64x64:r=16:d=60")
    tracemalloc.start()
    clips = load_clips(tmp_path, CFG, 24, tmp_path / ".cache")
    fingerprint(clips)
    assert tracemalloc.get_traced_memory()[1] < 2 * clips[0].frames.nbytes
    tracemalloc.stop()


def test_only_what_is_decoded_counts(film, tmp_path):
    title = ["-i", film, "-metadata", "title=Stream #0:0: Video: Audio: Stream mapping:"]
    mute = ffmpeg(tmp_path / "mute.mp4", *title, "-an")
    sound = ffmpeg(tmp_path / "sound.webm", *title, "-vn")
    (tmp_path / "late.srt").write_text(one("00:00:01,000 --> 00:01:00,000"))
    long = ffmpeg(tmp_path / "long.mkv", "-i", film, "-i", tmp_path / "late.srt", "-c:v", "copy")
    Image.new("RGB", (64, 64)).save(tmp_path / "cover.jpg")
    cover = f"-i {tmp_path}/cover.jpg -map 0:a -map 1 -disposition:v attached_pic".split()
    covered = ffmpeg(tmp_path / "covered.mp3", "-i", film, *cover)
    pipe, twice = tmp_path / "pipe.wav", tmp_path / "twice.mp3"
    start, _, samples = ffmpeg(pipe, "-i", film, "-vn").read_bytes().partition(b"data")
    pipe.write_bytes(start[:4] + b"\xff" * 4 + start[8:] + b"data" + b"\xff" * 4 + samples[4:])
    twice.write_bytes(b"\0\1rubbish" * 99 + 2 * covered.read_bytes())
    clips = [decode_clip(path, CFG) for path in (mute, sound, long, covered, pipe, twice)]
    assert [len(clip.frames) for clip in clips] == [64, 0, 64, 0, 0, 0]
    assert [round(len(clip.samples) / 8000) for clip in clips] == [0, 4, 4, 4, 4, 8]
    assert not any(clip.note for clip in clips)


def test_damage_keeps_what_precedes_it(film, tmp_path):
    data = film.read_bytes()
    middle = data.index(b"mdat") + (len(data) - data.index(b"mdat")) // 2
    whole, damaged = decode_clip(film, CFG), tmp_path / "damaged.mp4"
    zeros = data[:middle] + bytes(500) + data[middle + 500 :]
    for content in (data[:middle], zeros):
        damaged.write_bytes(content)
        clip = decode_clip(damaged, CFG)
        assert 16 < len(clip.frames) < 48 and clip.note.startswith("damaged")
        assert (clip.frames == whole.frames[: len(clip.frames)]).mean() > 0.95
        assert len(clip.samples) == len(clip.frames) * CFG.sample_rate // CFG.fps
    with pytest.raises(ClipError, match=r"before its damage .*a clip takes 3\.75 s"):
        decode_clip(damaged, CFG, 60)
    damaged.write_bytes(data.replace(b"avcC", b"avbC"))  # its picture cannot be decoded
    assert len(decode_clip(damaged, CFG).samples) == len(whole.samples)


def test_films_are_decoded_as_they_are_shown(tmp_path):
    y, x = np.mgrid[-127.5:128, -63.5:64]
    disc = ((y / 80) ** 2 + (x / 40) ** 2 < 1) * np.uint8(255)
    disc = np.tile(disc[None, :, :, None], (32, 1, 1, 3))
    path = ffmpeg(tmp_path / "wide.mp4", "-vf", "setsar=2", "-pix_fmt", "yuv420p", pixels=disc)
    turned = ffmpeg(tmp_path / "turned.mp4", "-display_rotation", 90, "-i", path, "-c", "copy")
    for film in (path, turned):
        shown = decode_clip(film, CFG).frames[9, ..., 0] > 127
        assert abs(shown.any(0).sum() - 40) <= 1 and abs(shown.any(1).sum() - 40) <= 1
    grey = np.full((32, 64, 64, 3), (200, 60, 40), np.uint8)
    for levels in ("tv", "pc"):
        options = ["-vf", f"scale=out_range={levels},format=yuv444p", "-color_range", levels]
        clip = decode_clip(ffmpeg(tmp_path / f"{levels}.mp4", *options, pixels=grey), CFG)
        assert np.abs(clip.frames[9].astype(int) - (200, 60, 40)).max() < 5
    frame, _, column = np.mgrid[:100, :128, :128]
    bar = np.tile(((column - frame) // 30 == 0)[..., None] * np.uint8(255), 3)
    weave = ["-vf", "tinterlace=interleave_top,setfield=tff", "-c:v", "mpeg2video", "-b:v", "9M"]
    path = ffmpeg(tmp_path / "i.mpg", *weave, "-flags", "+ilme+ildct", pixels=bar, rate=50)
    big = decode_clip(path, SimpleNamespace(image=128, fps=16, sample_rate=8000))
    rows = big.frames[8:24, 8:-8, :, 0].astype(int)
    assert np.abs(2 * rows[:, 1:-1] - rows[:, :-2] - rows[:, 2:]).mean() < 0.5  # no comb


@pytest.mark.parametrize("rate", ["2", "ntsc", "240", "late", "variable"])
def test_flash_and_click_come_at_the_same_time(rate, tmp_path):
    known = {"late": (25, 1), "variable": (30, 0), "ntsc": (30000 / 1001, 0)}
    fps, late = known.get(rate) or (int(rate), 0)
    pixels = np.zeros((round((4 - late) * fps), 48, 64, 3), np.uint8)
    pixels[round((2 - late) * fps) :] = 255
    drop = ["-vf", "select='not(mod(n,7))+lt(n,20)+eq(n,60)'", "-fps_mode", "vfr"]
    options = ["-c:v", "ffv1", *(drop if rate == "variable" else [])]
    picture = ffmpeg(tmp_path / "p.mkv", *options, pixels=pixels, rate=fps)
    click = ["-f", "lavfi", "-i", "aevalsrc='gte(t,2)*lt(t,2.1)*0.5':d=4:s=16000"]
    path = ffmpeg(tmp_path / "f.mkv", "-itsoffset", late, "-i", picture, *click)
    clip = decode_clip(path, CFG)
    assert abs((clip.frames.mean((1, 2, 3)) > 127).argmax() - 2 * CFG.fps) <= 1
    assert abs((np.abs(clip.samples) > 0.1).argmax() - 2 * 8000) <= 8000 / CFG.fps


def test_pictures_are_read_as_they_are_shown(tmp_path):
    y, x = np.mgrid[:90, :130]
    grey = (x * 255 // 129).astype(np.uint8)
    colour = Image.fromarray(np.stack([grey, y * 2, grey // 2], -1).astype(np.uint8))
    path, said = tmp_path / "p.png", []

    def read(picture, path=path, **options):
        picture.save(path, **options)
        said.clear()
        return read_picture(path, 64, said.append).astype(int)

    ramp = read(Image.fromarray(grey))
    assert np.abs(ramp[5, :, 0] - (20 + np.arange(64) * 90 / 64) * 255 / 129).max() < 3
    assert (read(Image.fromarray(grey.astype(np.uint16) * 257)) == ramp).all() and len(said) == 2
    for values in (grey.astype(np.int32) << 23, (grey / 255).astype(np.float32)):
        assert np.abs(read(Image.fromarray(values), tmp_path / "p.tif") - ramp).max() <= 1
    plain = read(colour)
    hidden = colour.convert("RGBA")
    assert (read(hidden) == plain).all() and len(said) == 1
    hidden.putalpha(0)
    assert (read(hidden) == 255).all() and "transparent" in said[0]
    assert np.abs(read(colour.convert("CMYK"), tmp_path / "p.tif") - plain).max() <= 1
    turned, exif = colour.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[274] = 6
    assert (read(turned, exif=exif) == plain).all()
    for content in (b"", b"text", path.read_bytes()[:200]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="not a readable picture"):
            read_picture(path, 64, said.append)
