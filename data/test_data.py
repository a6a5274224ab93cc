"""What data/ claims: codecs, film files, runs of training, clips, subtitles and pictures."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import imageio.v3
import imageio_ffmpeg
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from torch import nn

import mutual_forcing as mf
import sample
import train
from data import checkpoint, runs
from data.batches import Batches
from data.clips import drawer, fingerprint, load_clips
from data.codecs import AudioCodec, Codecs, Film, VideoCodec, encode_films, stack
from data.controls import spell
from data.decoding import ClipError, decode_clip
from data.pictures import read_picture
from data.subtitles import read_transcript
from data.talker import talk
from data.writer import FilmWriter
from mutual_forcing import AudioVideoTransformer, Config, UserError

HERE = Path(__file__).parents[1]
WHOLE = "WHOLE" in os.environ  # all seeds of the random tests, not a few
SIZES = {"width": 32, "layers": 2, "heads": 2, "image": 16, "video_dim": 32, "audio_dim": 32}
TINY = Config(**SIZES, sample_rate=1024, chunk=2, window=2)
SMALL = "--config width=32 layers=1 heads=1 chunk=2 image=32 video_dim=32 --batch 3 --save 2"
SMALL += " --seconds 0.75 1 --lr 1e-2 --device cpu --precision fp32 --from-scratch"


def small_codecs(cfg: Config) -> Codecs:
    codecs = Codecs(VideoCodec(cfg, fine=8, coarse=8), AudioCodec(cfg))
    return codecs.requires_grad_(False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)


def run_train(out, words="", **more) -> int:
    words = f"{SMALL} {words} --out {out}"
    return train.main(words.split(), make_codecs=small_codecs, **more)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A checkpoint of stage 2 after two steps."""
    folder = tmp_path_factory.mktemp("small")
    assert run_train(folder, "--stage joint --steps 2") == 0
    return folder / "joint.pt"


# ---- Codecs and film files


def test_the_audio_codec_inverts_and_streams():
    codec, samples = small_codecs(TINY).audio, torch.rand(2, 8 * 64) * 2 - 1
    tokens = codec.encode(samples)
    state, parts = None, []
    for part in tokens.split([1, 2, 1], 1):
        streamed, state = codec.decode_next(part, state)
        parts.append(streamed)
    n, streamed = 8 * 64 - TINY.hop, torch.cat(parts, 1)
    assert torch.allclose(streamed, samples[:, :n], atol=1e-5)
    whole = torch.cat(codec.decode_next(tokens), 1)
    assert torch.allclose(whole, torch.cat([streamed, state], 1), atol=1e-6)  # and what is due


def test_the_video_codec_streams_and_encodes_each_latent_frame_alone():
    codec, frames = small_codecs(TINY).video, torch.randint(256, (2, 12, 16, 16, 3)).byte()
    latents, other = codec.encode(frames), frames.clone()
    other[:, 4:6] ^= 255  # latent frame 2
    changed = (codec.encode(other) - latents).abs().amax((0, 2, 3))
    assert changed.nonzero().flatten().tolist() == [2]
    state, parts = None, []
    for part in (100 * latents).split([1, 2, 3], 1):
        decoded, state = codec.decode_next(part, state)
        parts.append(decoded)
    whole, _ = codec.decode_next(100 * latents)
    assert whole.shape == frames.shape and whole.float().std() > 1
    assert (torch.cat(parts, 1).int() - whole.int()).abs().max() <= 1  # of 255


def test_a_token_of_the_video_codec_holds_its_own_square_and_decodes_back():
    codec = small_codecs(replace(TINY, video_dim=384)).video  # as many values as pixels
    codec.encoder = nn.Sequential(nn.PixelUnshuffle(2), nn.ConstantPad3d((0, 0, 0, 0, 0, 12), 0.0))
    codec.decoder = nn.PixelShuffle(2)
    codec.mean.uniform_(-1, 1)
    codec.std.uniform_(0.5, 2)
    frames = torch.randint(256, (2, 6, 16, 16, 3)).byte()
    latents = codec.encode(frames)
    assert torch.equal(codec.decode_next(latents)[0], frames)
    for token in range(4):  # row by row, as the rotary embedding has it
        row, column = 8 * (token // 2), 8 * (token % 2)
        other = frames.clone()
        other[1, 3, row : row + 8, column : column + 8] ^= 255
        changed = (codec.encode(other) - latents).abs().amax(3).nonzero().tolist()
        assert changed == [[1, 1, token]]


@torch.no_grad()
def test_latents_of_the_video_codec_have_unit_variance_after_stage_0():
    codec = small_codecs(replace(TINY, video_dim=128)).video
    codec.encoder[-1].weight *= 10
    codec.encoder[-1].bias += 1
    clips = torch.rand(20, 2, 16, 16, 3).pow(torch.rand(20, 1, 1, 1, 1) * 3).mul(255).byte()
    for _ in range(600):
        codec.loss(clips[torch.randint(20, (4,))])
    first_frames = codec.encode(clips).unflatten(3, (2, 4, 16))[:, :, :, 0]
    by_channel = first_frames.movedim(3, 0).flatten(1)
    assert by_channel.mean(1).abs().max() < 0.15
    assert (by_channel.std(1) - 1).abs().max() < 0.15


def test_latents_that_are_kept_serve_later_passes_with_other_controls():
    codecs = small_codecs(TINY)
    batches = Batches(TINY, talk, [0, 1, 2], [1.0, 2.0], 8, kept=4)
    (x, controls), (later, later_controls) = (batches.latents(i, codecs, "cpu") for i in (1, 5))
    assert len(batches.encoded) == 1 and torch.equal(x, later) and len(x) == 4
    assert not torch.equal(controls.has_first_frame, later_controls.has_first_frame)
    # A run that goes on from here, with nothing kept yet, has the same.
    again, again_controls = Batches(TINY, talk, [0, 1, 2], [1.0, 2.0], 8, kept=4).latents(
        5, codecs, "cpu"
    )
    assert torch.equal(again, later)
    assert all(torch.equal(*pair) for pair in zip(again_controls, later_controls))
    other, _ = batches.latents(2, codecs, "cpu")
    assert other.shape != x.shape
    films = Film(*[part[:4] for part in batches.films(1)])
    latents, _ = encode_films(TINY, codecs, films)
    assert (latents - x).abs().max() < 0.01


def test_spectra_of_sound_are_orthogonal_and_have_unit_variance():
    cfg = Config()
    codecs = small_codecs(cfg)
    product = codecs.audio.basis.double().T @ codecs.audio.basis.double()
    assert (product - torch.eye(cfg.hop)).abs().max() < 1e-6
    films = stack([talk(cfg, np.random.default_rng(seed), 24) for seed in range(16)])
    x, _ = encode_films(cfg, codecs, films)
    video, audio = mf.split(cfg, x)
    assert audio.shape == (16, 12, 4, 250) and 0.8 < audio.std() < 1.2
    assert torch.equal(mf.join(video, audio), x)


@pytest.mark.parametrize("kind", ["mp4", "gif", "wav", "png"])
def test_sample_writes_each_kind_of_film(kind, small, tmp_path, capsys):
    (tmp_path / "films").mkdir()
    out = tmp_path / "films" / f"film.{kind}"
    words = f"--checkpoint {small} --say hi_ab --out {out} --json --device cpu"
    assert sample.main(words.split(), make_codecs=small_codecs) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["frames"] == 2 + 3 * 5 + 8 and figures["steps"] == 4
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    if kind == "wav":
        samples, rate = soundfile.read(out)
        assert rate == 8000 and len(samples) == 25 * 500 and np.abs(samples).max() > 0
    elif kind == "png":
        assert imageio.v3.imread(out).shape == (2 * (32 + 24), 2 * 32 * 7, 3)
    else:
        frames = imageio.v3.imread(out, index=None)
        assert frames.shape[1:3] == (128, 128) and len(frames) == 25
    if kind == "gif":
        with Image.open(out) as film:
            durations = [film.seek(i) or film.info["duration"] for i in range(film.n_frames)]
        assert abs(sum(durations) - 1000 * 25 / 16) <= 5  # GIFs count 10 ms
    if kind == "mp4":
        assert abs(imageio_ffmpeg.count_frames_and_secs(out)[1] - 25 / 16) < 0.05


def test_interrupted_sampling_keeps_the_chunks_so_far_and_the_old_film(
    small, tmp_path, monkeypatch
):
    old = tmp_path / "film.wav"
    old.write_bytes(b"old")
    add = FilmWriter.add

    def interrupt(writer, frames, samples):
        add(writer, frames, samples)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(FilmWriter, "add", interrupt)
    words = f"--checkpoint {small} --seconds 9 --out {old} --device cpu"
    assert sample.main(words.split(), make_codecs=small_codecs) == 130
    (new,) = tmp_path.glob("film-interrupted-*.wav")
    assert old.read_bytes() == b"old" and 0 < len(soundfile.read(new)[0]) <= 4 * 500


def test_every_config_field_is_read():
    files = [HERE / "mutual_forcing.py", *HERE.glob("data/*.py")]
    source = "".join(file.read_text() for file in files)
    source = re.sub(r"(?s)def __post_init__.*?@property", "", source)  # a check does not count
    for field in fields(Config):
        assert re.search(rf"\b(cfg|self)\.{field.name}\b", source), field.name


# ---- Runs of training


CHILD = """
import sys, torch
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
import train
from data.test_data import small_codecs
save = train.save
def kept(state, args, *rest):
    save(state, args, *rest)
    weights = state.model.state_dict()
    weights = {n: getattr(w, "full_tensor", lambda w=w: w)() for n, w in weights.items()}
    torch.save(weights, args.out / f"weights{train.runs.process()[0]}")
train.save = kept
sys.exit(train.main(sys.argv[1:], lambda cfg: small_codecs(cfg).float()))
"""


def run_two_processes(script: Path, words: str, out: Path):
    """Train in float64 in two processes; returns the weights that each ends with."""
    script.write_text(CHILD)
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *start, script, *words.split(), "--out", out]
    env = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [torch.load(out / f"weights{rank}") for rank in range(2)]


def test_two_processes_average_the_gradients_of_their_own_films(tmp_path):
    words, out = f"{SMALL} --stage mutual --steps 2 --seconds 1", tmp_path / "two"
    one, two = run_two_processes(tmp_path / "child.py", words, out)
    assert all(torch.equal(one[name], two[name]) for name in one)
    # The same in one loop: the losses of both ranks by their seeds, averaged.
    torch.set_default_dtype(torch.float64)
    try:
        args = train.build_parser().parse_args(words.split())
        args.device, args.weights, args.real_is_whole = torch.device("cpu"), mf.WEIGHTS, False
        args.real = args.extra = None
        torch.manual_seed(0)
        model = AudioVideoTransformer(runs.read_config(args.config))
        codecs = small_codecs(model.cfg).float()
        codecs.load_state_dict({name: x.half() for name, x in codecs.state_dict().items()})
        state = train.State(model, codecs, "mutual", args)
        for step in range(2):
            for rank in range(2):
                seed = [args.seed, list(train.STAGES).index("mutual"), rank]
                batches = Batches(model.cfg, talk, seed, [1.0], 3)
                x, controls = batches.latents(step, codecs, "cpu")
                seed = np.random.SeedSequence([*seed, step, 0])
                torch.manual_seed(int(seed.generate_state(1)[0]))
                losses, _ = train.losses_of(state, x, controls, args)
                (sum(losses.values()) / 2).backward()
            train.update(state, args)
        for name, weight in state.model.state_dict().items():
            assert (weight - one[name]).abs().max() < 1e-6
        # The run goes on in one process, from its first step.
        content = checkpoint.load_file(out / "resume.pt") | {"step": 1}
        checkpoint.save_file(out / "resume.pt", content)
        (out / "mutual.png").unlink()
        words = [*words.split(), "--resume", "--out", str(out)]
        assert train.main(words, lambda cfg: small_codecs(cfg).float()) == 0
        assert (out / "mutual.png").exists()
    finally:
        torch.set_default_dtype(torch.float32)


def test_train_refuses_mistakes_in_one_line_and_keeps_what_is_there(small, tmp_path, capsys):
    before = small.read_bytes()
    for words, said in (
        ("--stage joint", "holds another run"),
        ("--stage joint --steps 3 --resume", "started with other steps"),
    ):
        assert run_train(small.parent, words) == 2
        assert said in capsys.readouterr().err and small.read_bytes() == before
    strict = SMALL.replace(" --from-scratch", "").split()
    for words, said in (
        ("--resume", "does not exist"),
        ("--stage mutual", "--init"),
        ("--config widht=3", "widht"),
        ("--config width=4.5", "FIELD=N"),
        ("--config width=²", "FIELD=N"),
        ("--seconds 0.1", "--seconds"),
        ("--stage codec --batch 0", "--batch"),
        ("--init nowhere.pt", "nowhere.pt"),
        ("--data nowhere", "nowhere"),
        ("--device tpu", "tpu"),
        ("--flow 0 --dmd 0 --shortcut 0", "weights"),
    ):
        assert train.main([*strict, *words.split(), "--out", str(tmp_path / "new")]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert said in lines[-1] and "Traceback" not in "".join(lines), (words, lines)
        assert not (tmp_path / "new").exists() or words != "--resume"
    assert run_train(small.parent, "--stage joint --steps 2 --overwrite") == 0
    new, old = checkpoint.load_file(small), torch.load(io.BytesIO(before[:-32]))
    for name in ("model", "codecs"):  # the same run, anew
        for key, weight in new[name].items():
            assert torch.equal(weight, old[name][key])


def test_two_runs_do_not_share_a_folder(tmp_path, capsys):
    (tmp_path / ".lock").touch()
    code = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, 2); print(1, flush=True)"
    command = [sys.executable, "-c", code + "; input()", tmp_path / ".lock"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as other:
        other.stdout.readline()
        assert run_train(tmp_path, "--stage joint --steps 2") == 2
        assert "another run" in capsys.readouterr().err
        other.communicate(b"\n")
    assert run_train(tmp_path, "--stage joint --steps 2") == 0


def test_a_gradient_that_is_not_finite_stops_before_the_weights_move(tmp_path, monkeypatch, capsys):
    losses_of = train.losses_of

    def bad(state, *rest):
        losses, logs = losses_of(state, *rest)
        if state.step == 2:  # the loss is finite, its gradient is not
            weight = state.model.embed[1].bias
            losses["flow"] = losses["flow"] + (weight - weight.detach()).abs().sqrt().sum()
        return losses, logs

    monkeypatch.setattr(train, "losses_of", bad)
    assert run_train(tmp_path, "--stage joint --steps 4") == 2
    assert str(tmp_path / "joint.pt") in capsys.readouterr().err
    model, _, extra = checkpoint.load_checkpoint(tmp_path / "joint.pt", small_codecs)
    assert extra["step"] == 2 and all(weight.isfinite().all() for weight in model.parameters())


def test_an_interrupted_run_leaves_a_checkpoint_and_goes_on(tmp_path, monkeypatch, capsys):
    step = train.train_step

    def interrupted(state, *rest):
        if state.step == 0:
            signal.raise_signal(signal.SIGINT)
        return step(state, *rest)

    monkeypatch.setattr(train, "train_step", interrupted)
    assert run_train(tmp_path, "--stage unimodal --steps 3") == 130
    assert "--resume" in capsys.readouterr().err
    assert checkpoint.load_file(tmp_path / "resume.pt")["step"] == 1
    assert run_train(tmp_path, "--stage unimodal --steps 3 --resume") == 0


# ---- Checkpoints


@pytest.mark.parametrize("seed", range(100 if WHOLE else 8))
def test_damage_of_a_checkpoint_ends_in_one_line(seed, small, tmp_path):
    """Bits of the header, of the pickle, or of anything are changed, and the end may be cut off."""
    rng, path = np.random.default_rng(seed), tmp_path / "bad.pt"
    data = bytearray(small.read_bytes())
    for at in rng.integers(rng.choice([300, 5000, len(data)]), size=3):
        data[at] ^= 1 << rng.integers(8)
    path.write_bytes(data[: rng.choice([len(data), rng.integers(len(data))])])
    with pytest.raises(checkpoint.CheckpointError, match=r"^[^\n]+$"):
        checkpoint.load_checkpoint(path, small_codecs)


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
    return read_transcript(tmp_path / "said.srt", CFG, frames)  # symbols, and what is refused


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
def test_subtitles_are_read_or_unknown_and_named(name, tmp_path):
    text, phrases = {**READ, **UNKNOWN}[name]
    symbols, refused = said(tmp_path, text)
    assert (symbols == expected(*phrases)).all()
    assert name in refused if name in UNKNOWN else refused == ""


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
    (folder / "gone.mp4").symlink_to("nowhere")
    clips = load_clips(folder, CFG, 24, cache)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("1 clips with words, 4 without words, 9 files not used")
    for line in """without sound, for stage codec alone: e.avi
        d.m4a: not used, it has no picture
        a.en.srt: not used, a.mp4 has a.srt
        orphan.vtt: not used, no clip of its name is used
        p.png: not used, 0.06 s, a clip takes 1.50 s
        n.txt: not used, a text, or empty
        .hidden: not used, hidden
        gone.mp4: not used, a link to nothing, or no file
        short.mkv: not used, 0.50 s, a clip takes 1.50 s""".splitlines():
        assert f"  {line.strip()}" in lines
    assert "  damaged.mp4: not used, nothing in it can be decoded" in "\n".join(lines)
    assert len(clips) == 5 and len(drawer(clips, "joint").args[0]) == 4
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
    clips = [decode_clip(path, CFG) for path in (mute, long)]
    assert [len(clip.frames) for clip in clips] == [64, 64]
    assert [round(len(clip.samples) / 8000) for clip in clips] == [0, 4]
    assert not any(clip.note for clip in clips)
    for path in (sound, covered):
        with pytest.raises(ClipError, match="it has no picture"):
            decode_clip(path, CFG)


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
