"""Score checkpoints with the ruler (lab/ruler.py): `python -m lab.evaluate CHECKPOINT`.

Beside the checkpoints' rows stand those of ground truth, and of ground truth with the sound of
another talker.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import mutual_forcing as mf
from data import runs
from data.batches import frames_of
from data.checkpoint import same_format
from data.clips import drawer, load_clips
from data.codecs import Codecs, Film, encode_films, make_codecs, stack
from data.talker import talk
from lab.ruler import DEFAULT_FIGURES, FIGURES, OF_CLIPS, Ruler, score, windows_of
from mutual_forcing import Config, UserError
from sample import load_talker

HELD_OUT = 2**40  # first word of the seeds that training never draws
BATCH = 16  # films that a model makes at a time


def held_out(cfg: Config, count: int, seconds: float, kind: int = 0, draw=talk) -> list[Film]:
    """Films from seeds that training never sees; kind 0 to score, 1 as the distances' reference."""
    rngs = [np.random.default_rng([HELD_OUT, kind, i]) for i in range(count)]
    frames = frames_of(cfg, seconds)
    return [draw(cfg, rng, frames) for rng in tqdm(rngs, "drawing", disable=None, leave=False)]


def to_films(films: list[Film], cfg: Config) -> Film:
    """Films of equal length -> one Film, stacked, its symbols (n, F) without the margins."""
    stacked = Film(*[part.numpy() for part in stack(films)])
    return stacked._replace(symbols=stacked.symbols[:, cfg.margin : -cfg.margin])


def controls_of(model, codecs: Codecs, films: list[Film]) -> mf.Controls:
    """What films are made from, on the model's device. Only the first latent frame is encoded."""
    cfg, whole = model.cfg, stack(films)
    samples = whole.samples[:, : cfg.tokens * cfg.hop]
    start = whole._replace(frames=whole.frames[:, : cfg.step_frames], samples=samples)
    _, controls = encode_films(cfg, codecs, Film(*[part.to(model.device) for part in start]))
    return controls


@torch.inference_mode()
def remake(model, codecs, films, *, few, steps, guidance, with_transcript, seed=0) -> Film:
    """Films as a model makes them from their controls; every second one gets its first frame."""
    cfg, frames, samples = model.cfg, [], []
    chunks = len(films[0].frames) // cfg.chunk_frames
    for start in range(0, len(films), BATCH):
        controls = controls_of(model, codecs, films[start : start + BATCH])
        even = torch.arange(len(controls.character), device=model.device) % 2 == 0
        controls = controls._replace(has_first_frame=even)
        if not with_transcript:
            controls = controls._replace(symbols=torch.full_like(controls.symbols, cfg.unknown))
        noise = torch.Generator().manual_seed(seed + start)
        options = {"few": few, "guidance": guidance, "generator": noise}
        made = mf.generate(model, controls.chunks(cfg), mf.time_grid(cfg, steps), **options)
        pictures, sounds, state = [], [], None
        for states in tqdm(made, "films", chunks, unit="chunk", disable=None, leave=False):
            video, audio = mf.split(cfg, states[-1])
            picture, state = codecs.video.decode_next(video, state)
            pictures.append(picture.cpu())
            sounds.append(audio.clone())  # a view would keep the video's latents, too
        frames.append(torch.cat(pictures, 1).numpy())
        decoded = torch.cat(codecs.audio.decode_next(torch.cat(sounds, 1)), 1)
        samples.append(decoded.cpu().numpy())
    whole = to_films(films, cfg)
    return whole._replace(frames=np.concatenate(frames), samples=np.concatenate(samples))


def evaluate(models, *, settings, talkers=32, seconds=25.0, guidance=1.0, seed=0, clips=None):
    """Score models (name -> (model, codecs)), with and without transcript, as {"windows", "rows"}.

    settings: pairs of a mode and its denoising steps. clips: a list of Films, instead of talkers.
    Rows are also printed on stderr as they come. Raises UserError.
    """
    cfg = next(iter(models.values()))[0].cfg
    for name, (model, _) in models.items():
        if not same_format(cfg, model.cfg):
            raise UserError(f"{name}: makes films of another format than the first checkpoint")
    ruler, draw, rows = Ruler(cfg), drawer(clips, "joint"), []
    originals = held_out(cfg, talkers, seconds, 0, draw)
    truth = to_films(originals, cfg)
    reference = to_films(held_out(cfg, talkers, seconds, 1, draw), cfg)
    windows = windows_of(truth.frames.shape[1] / cfg.fps)
    if not windows:
        raise UserError(f"{seconds:g} seconds in whole chunks of the model are less than a window")

    def add(films: Film, control: str, checkpoint: str, mode=None, steps=None):
        if clips or control == "babbling":
            films = films._replace(symbols=None)
        row = {"checkpoint": checkpoint, "mode": mode, "steps": steps}
        row |= {"guidance": guidance if mode else None, "control": control}
        row |= score(ruler, films, reference, OF_CLIPS if clips else FIGURES)
        rows.append(row)
        shown = [f"{name} {row[name][-1]}" for name in DEFAULT_FIGURES]
        print(f"{control}, {checkpoint}: {', '.join(shown)}", file=sys.stderr, flush=True)

    for control in ("spoken", "babbling"):
        add(truth, control, "ground truth")
        add(truth._replace(samples=np.roll(truth.samples, 1, 0)), control, "shuffled sound")
        options = {"guidance": guidance, "seed": seed, "with_transcript": control == "spoken"}
        for name, (model, codecs) in models.items():
            for mode, steps in settings:
                films = remake(model, codecs, originals, few=mode == "few", steps=steps, **options)
                add(films, control, name, mode, steps)
    return {"windows": windows, "rows": rows}


def markdown(rows: list[dict]) -> str:
    """Rows of figures as a Markdown table; a cell of a list holds one number a window."""

    def cell(value) -> str:
        if isinstance(value, (list, tuple)):
            return " / ".join([cell(number) for number in value])
        if isinstance(value, float):
            return f"{value:.3g}"
        return "-" if value is None else str(value)

    lines = [list(rows[0]), ["---"] * len(rows[0])]
    for row in rows:
        lines.append([cell(row.get(name)) for name in rows[0]])
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines])


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("lab.evaluate", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("checkpoints", type=Path, nargs="+", metavar="CKPT", help="models of one format")
    add("--mode", choices=mf.DEFAULT_STEPS, help="default: both")
    add("--steps", type=int, nargs="+", help="one or several; default: few 4, multi 50")
    add("--guidance", type=float, default=1.0, help="other than 1 (default): twice the evaluations")
    add("--talkers", type=int, default=32, help="films to score; default %(default)s")
    add("--seconds", type=float, default=25.0, help="length of a film; default %(default)s")
    add("--seed", type=int, default=0, help="of the models' noise; default %(default)s")
    add("--data", type=Path, metavar="FOLDER", help="score against these clips, not talkers")
    add("--device", help="default: cuda, else mps, else cpu")
    add("--json", action="store_true", help="print one JSON object instead of a table")
    add("--all", action="store_true", help="show all figures, of all windows, not only the last")
    return parser


def run(args, make_codecs) -> dict:
    """What evaluate() returns for a command line. Raises UserError and OSError."""
    if args.talkers < 2:
        raise UserError("--talkers must be at least 2")
    if not args.seconds <= 86400:
        raise UserError("--seconds must be at most 86400")
    device = runs.find_device(args.device)
    models = {}
    for path in args.checkpoints:
        model, codecs = load_talker(path, make_codecs)
        models[str(path)] = model.to(device), codecs.to(device)
    settings = []
    for mode in [args.mode] if args.mode else mf.DEFAULT_STEPS:
        settings += [(mode, steps) for steps in args.steps or [mf.DEFAULT_STEPS[mode]]]
    clips = None
    if args.data:
        with tempfile.TemporaryDirectory() as cache:
            frames = frames_of(model.cfg, args.seconds)
            clips = load_clips(args.data, model.cfg, frames, Path(cache))
    films = {"talkers": args.talkers, "seconds": args.seconds, "clips": clips}
    return evaluate(models, settings=settings, guidance=args.guidance, seed=args.seed, **films)


def show(result: dict, args) -> None:
    """Print what evaluate() returned: JSON, or tables with a line for each figure."""
    if args.json:
        print(json.dumps(result))
        return
    figures, kept = (FIGURES, slice(None)) if args.all else (DEFAULT_FIGURES, slice(-1, None))
    windows = " / ".join([f"{begin}-{end}" for begin, end in result["windows"][kept]])
    for control in ("spoken", "babbling"):
        rows, lines = [row for row in result["rows"] if row["control"] == control], []
        for name in figures:
            line = {"figure": name.replace("_", " ")}
            for row in rows:
                how = f", {row['mode']} {row['steps']}" if row["mode"] else ""
                line[row["checkpoint"] + how] = row[name][kept]
            lines.append(line | {"what it is": FIGURES[name]})
        print(f"\n### {control.capitalize()}, seconds {windows}\n\n{markdown(lines)}")


def main(argv=None, make_codecs=make_codecs) -> int:
    """The command line. Returns 0, 2 for a mistake of the user, 130 if interrupted."""
    args = build_parser().parse_args(argv)
    return runs.exit_code("lab.evaluate", lambda: show(run(args, make_codecs), args))


if __name__ == "__main__":
    sys.exit(main())
