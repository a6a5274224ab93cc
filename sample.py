"""Make a film with a checkpoint: `python sample.py --say "hello you"` writes sample.mp4.

The method is in mutual_forcing.py; data/writer.py writes the file.
"""

import argparse
import functools
import itertools
import json
import resource
import sys
import time
from pathlib import Path

from tqdm import tqdm

import mutual_forcing as mf
from data import runs
from data.checkpoint import CheckpointError, load_checkpoint, makes_films
from data.codecs import Codecs, make_codecs
from data.controls import ALPHABET, spell, stream_film
from data.pictures import read_picture
from data.typed import TypedText
from data.writer import FilmWriter, delayed_interrupt
from mutual_forcing import Config, UserError

SHIPPED = Path(__file__).parent / "assets" / "talker.pt"


def load_talker(path: Path, make_codecs, device=None) -> tuple[mf.AudioVideoTransformer, Codecs]:
    """A checkpoint that can stream a film, on a device. Raises CheckpointError for any other."""
    model, codecs, extra = load_checkpoint(path, make_codecs)
    if not makes_films(extra):
        raise CheckpointError(f"{path}: before stage 2, or bidirectional; it cannot stream")
    if device:
        model.to(device, runs.native_precision(device))
        codecs.to(device)
    return model, codecs


def film_settings(args, cfg: Config) -> dict:
    """The command line as arguments of stream_film(), which checks them."""
    names = ["character", "mode", "steps", "guidance", "seed"]
    settings = {name: getattr(args, name) for name in names}
    needed = 8.0
    if args.say is not None and cfg.symbols != len(ALPHABET):
        raise UserError("--say: the symbols of this model are not letters")
    if args.say == "-":
        needed = 24 * 3600.0  # at most
    elif args.say is not None:
        symbols = [cfg.silence] * 2 + spell(args.say)
        if set(symbols) == {cfg.silence}:
            raise UserError("--say: nothing in it can be spoken; letters a to z can")
        needed = (len(symbols) + cfg.fps // 2) / cfg.fps
        settings["transcript"] = symbols
    settings["seconds"] = needed if args.seconds is None else args.seconds
    if args.say not in (None, "-") and settings["seconds"] < needed - 0.5:
        print(f"--seconds: the text takes {needed:.1f}; its end is cut off", file=sys.stderr)
    if args.first_frame:
        report = functools.partial(print, file=sys.stderr)
        settings["first_frame"] = read_picture(args.first_frame, cfg.image, report)
    return settings


def make_film(args, make_codecs) -> int:
    """Stream one film into args.out and report the speed. Returns the exit code."""
    began = time.perf_counter()
    model, codecs = load_talker(args.checkpoint, make_codecs, runs.find_device(args.device))
    cfg = model.cfg
    settings, loaded = film_settings(args, cfg), time.perf_counter()
    with delayed_interrupt() as interrupted:  # after which whole chunks are kept
        typed = TypedText(cfg, interrupted) if args.say == "-" else None
        if typed:
            settings["transcript"] = typed
            film = typed.cut(stream_film(model, codecs, **settings))
        else:
            film = stream_film(model, codecs, **settings)
        first_chunk = next(film)  # or what is wrong with the settings
        first_chunk_ms = 1000 * (time.perf_counter() - loaded - (typed.waited if typed else 0))
        num_frames = None if typed else round(settings["seconds"] * cfg.fps)
        writer = FilmWriter(args.out, cfg)
        try:
            with tqdm(total=num_frames, unit="frame", disable=None) as bar:
                for frames, samples in itertools.chain([first_chunk], film):
                    writer.add(frames, samples)
                    bar.update(len(frames))
                    if interrupted:
                        break
            unfinished = interrupted and writer.num_frames != num_frames
            if unfinished and args.out.exists():
                name = f"{args.out.stem}-interrupted-{time.time():.0f}"
                writer.out = args.out.with_stem(name)
            writer.finish()
        finally:
            writer.close()
    spent, seconds = time.perf_counter() - loaded, writer.num_frames / cfg.fps
    spent -= typed.waited if typed else 0
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB; on a Mac bytes
    figures = {
        "out": str(writer.out),
        "seconds": seconds,
        "frames": writer.num_frames,
        "mode": args.mode,
        "steps": args.steps,
        "fps": round(writer.num_frames / spent, 1),
        "real_time_factor": round(seconds / spent, 2),
        "first_chunk_ms": round(first_chunk_ms, 1),
        "load_s": round(loaded - began, 2),
        "peak_memory_mb": memory // (2**20 if sys.platform == "darwin" else 2**10),
    }
    text = ", ".join(f"{name} {value}" for name, value in figures.items())
    text = json.dumps(figures) if args.json else text
    print(text.encode("ascii", "backslashreplace").decode())  # whatever stdout can show
    return 130 if unfinished else 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("sample.py", description="Make a film of a talking character.")
    add = parser.add_argument
    add("--say", help="text, letters a to z, or - for standard input; without it: babble")
    add("--character", help="a name that the checkpoint knows; without it, --seed decides")
    add("--first-frame", type=Path, help="a picture to start from")
    add("--seconds", type=float, help="length; default: as long as the text takes, else 8")
    add("--mode", choices=("few", "multi"), default="few", help="default few")
    add("--steps", type=int, help="evaluations a chunk; default 4, in --mode multi 50")
    add("--guidance", type=float, default=1.0, help="other than 1 doubles the evaluations")
    add("--seed", type=int, default=0, help="another film; default 0")
    add("--checkpoint", type=Path, default=SHIPPED, help="default: the shipped one")
    add("--device", help="default: cuda, else mps, else cpu")
    add("--out", type=Path, default=Path("sample.mp4"), help=".mp4, .gif, .wav or .png")
    add("--json", action="store_true", help="print the figures as JSON")
    return parser


def main(argv=None, make_codecs=make_codecs) -> int:
    """The command line. Returns 0, 2 for a mistake of the user, 130 if interrupted."""
    args = build_parser().parse_args(argv)
    if args.steps is None:
        args.steps = mf.DEFAULT_STEPS[args.mode]
    return runs.exit_code("sample.py", lambda: make_film(args, make_codecs))


if __name__ == "__main__":
    sys.exit(main())
