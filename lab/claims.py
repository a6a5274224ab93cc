"""The paper's claims, arm by arm: `python -m lab.claims --init assets/joint.pt`.

An arm is a way of training: options of train.py, which runs in this process. Its scores are those
of lab.evaluate; they go into a JSON file, and as tables into the Markdown file beside it. What is
trained or scored already is not made again, so the same command goes on after an interruption.
"""

import argparse
import hashlib
import json
import statistics
import sys
from collections import defaultdict
from itertools import groupby, product
from pathlib import Path
from typing import NamedTuple

import imageio.v3 as iio
import numpy as np
import torch
from tqdm import tqdm

import mutual_forcing as mf
import train
from data import runs
from data.batches import Batches
from data.checkpoint import load_checkpoint, replace_file, save_checkpoint
from data.codecs import make_codecs
from data.controls import stream_film
from data.talker import talk
from lab.evaluate import evaluate, markdown
from lab.flow_map import flow_map_dmd
from lab.ruler import FIGURES, windows_of
from mutual_forcing import UserError
from sample import load_talker


class Films(NamedTuple):
    """Films to score."""

    settings: list[tuple]  # pairs of a mode and its denoising steps
    guidance: float = 1.0
    seconds: float = 25.0


class Arm(NamedTuple):
    """A way of training, and its scores."""

    options: str  # of train.py; {init}: --init, {codec}: its stage 0, {needs}: see below
    films: list[Films]
    seeds: int = 3  # at most so many
    needs: str | None = None  # an arm that is trained before, with the same seed
    extra: dict | None = None  # objectives beside those of the module


FEW = [("few", 4), ("few", 8)]
MULTI = [("multi", 50)]
FAST = [Films(FEW)]
BOTH = [Films(FEW + MULTI)]
ALL = [Films([("few", 1), ("few", 2), *FEW, ("few", 16), *MULTI])]
GUIDED = [Films(MULTI, guidance=5.0)]
LONG = [Films([("few", 4)], seconds=60.0), Films([("few", 4)], seconds=600.0)]
STAGE_2 = "--stage joint --init {init} --lr 3e-4 --steps 500 "
STAGE_3 = "--stage mutual --init {init} --steps 300 "
REAL = STAGE_3 + "--history real "
SELF_FORCING = STAGE_3 + "--flow 0 --shortcut 0 --dmd 1 --teacher {needs} "
# Without stage 1, at equal compute: its steps cost as much as those of stage 2.
STEPS = train.STAGES["unimodal"].steps + train.STAGES["joint"].steps
ONE_STAGE = f"--stage joint --init {{codec}} --steps {STEPS} "
ARMS = {
    "two-stages": Arm("", BOTH, 1),  # --init itself
    # Stage 2 continued, in all else like the other arms of stage 3.
    "control": Arm(REAL + "--flow 1 --shortcut 0 --dmd 0 ", BOTH + GUIDED),
    "hybrid": Arm(STAGE_3, ALL + LONG),
    "shortcut": Arm(STAGE_3 + "--shortcut 1 --dmd 0 ", FAST),
    "dmd": Arm(STAGE_3 + "--shortcut 0 --dmd 1 ", FAST),
    "hybrid-real": Arm(REAL, FAST + LONG),
    "shortcut-real": Arm(REAL + "--shortcut 1 --dmd 0 ", FAST, 1),
    "dmd-real": Arm(REAL + "--shortcut 0 --dmd 1 ", FAST, 1),
    "teacher": Arm(STAGE_2 + "--whole --seconds 1.5 ", []),  # it cannot stream
    "self-forcing": Arm(SELF_FORCING + "--lr 5e-5 ", FAST, 3, "teacher"),
    "self-forcing-fast": Arm(SELF_FORCING, FAST, 1, "teacher"),
    "clips-of-1s": Arm(STAGE_2 + "--batch 12 --seconds 1 ", FAST, 1),
    "clips-of-3s": Arm(STAGE_2 + "--batch 4 --seconds 3 ", FAST, 1),
    "guidance-5": Arm(STAGE_3 + "--guidance 5 ", FAST, 1),
    "hybrid-late": Arm(STAGE_3 + "--history late ", FAST, 1),
    "no-fake-score": Arm(STAGE_3 + "--dmd 0 ", FAST, 1, extra={"flow_map": flow_map_dmd}),
    "one-stage": Arm(ONE_STAGE, BOTH, 1),  # the last one, because it takes hours
}
RESTS_ON = ("mutual_forcing", "train", "data/batches", "data/codecs", "data/controls")
RESTS_ON += ("data/talker", "lab/evaluate", "lab/ruler", "lab/looks", "lab/flow_map")
SCORED = [name for name, arm in ARMS.items() if arm.films]
# Figures in the tables; the results hold all.
SHOWN = ("transcript_error", "lip", "sync", "identity_drift", "voice_drift", "loudness_db")
SHOWN += ("letter_margin", "letter_spread", "mouth_letters", "lopsided", "flicker", "grain")
STRIP = "arms/{}.png"  # beside the results
BEGIN, END = "<!-- claims -->", "<!-- /claims -->"  # around the tables in the Markdown file


def checksums(init: Path) -> dict:
    """Of what all results rest on: --init, and the code of the method and of the scores."""
    root, code = Path(__file__).parents[1], hashlib.sha256()
    for name in RESTS_ON:
        code.update(name.encode() + (root / f"{name}.py").read_bytes())
    return {"init": hashlib.sha256(init.read_bytes()).hexdigest(), "code": code.hexdigest()}


def train_arm(name: str, seed: int, args, make_codecs) -> Path:
    """Train an arm, after the one that it needs, unless its checkpoint is complete. Returns that.

    Raises UserError if train.py fails, KeyboardInterrupt if it was interrupted.
    """
    arm = ARMS[name]
    if not arm.options:
        return args.init
    # What another --init, other code or other options made is in another folder.
    needed = ARMS[arm.needs].options if arm.needs else ""
    key = hashlib.sha256(f"{args.checksums} {arm.options} {needed}".encode()).hexdigest()[:8]
    folder = args.out / f"{name}-{seed}-{key}"
    parsed = train.build_parser().parse_args(arm.options.split())
    checkpoint = folder / f"{parsed.stage}.pt"
    steps = train.plan_of(parsed, parsed.stage).steps
    if checkpoint.exists() and load_checkpoint(checkpoint, make_codecs)[2]["step"] >= steps:
        return checkpoint
    paths = {"init": args.init, "codec": args.out / "codec.pt"}
    if "{codec}" in arm.options:
        save_stage_0(args.init, paths["codec"], make_codecs)
    if arm.needs:
        paths["needs"] = train_arm(arm.needs, seed, args, make_codecs)
    words = [word.format(**paths) for word in arm.options.split()]
    words += ["--seed", str(seed), "--out", str(folder), "--device", str(args.device)]
    words.append("--resume" if (folder / "resume.pt").exists() else "--overwrite")
    code = train.main(words, make_codecs, arm.extra)
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise UserError(f"arm {name}, seed {seed}: train.py failed, as it says above")
    return checkpoint


def save_stage_0(init: Path, path: Path, make_codecs) -> None:
    """Write what stage 0 left: the codecs of init, and a transformer that has learned nothing."""
    model, codecs, _ = load_checkpoint(init, make_codecs)
    torch.manual_seed(0)
    save_checkpoint(path, mf.AudioVideoTransformer(model.cfg), codecs, {"stage": "codec"})


@torch.no_grad()
def likeness(model, codecs) -> list[float]:
    """How alike the two modes are: cosine of attention outputs on the same chunks, by layer."""
    cfg, outputs = model.cfg, []
    seed = [0, len(train.STAGES), 0]  # no stage draws these films
    batches = Batches(cfg, talk, seed, [2 * cfg.chunk_seconds], 8)
    x, controls = batches.latents(0, codecs, model.device)
    t, end = mf.time_grid(cfg, 4).to(x)[1:3]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    x_t = mf.add_noise(x, noise, t)

    def keep(layer, inputs):
        outputs.append(inputs[0][:, :, -x.shape[1] :])  # (2, B, S, N, D), without the history

    hooks = [block.out.register_forward_pre_hook(keep) for block in model.blocks]
    for d in (end - t, 0 * t):
        model(x_t, t, d, controls, x)
    for hook in hooks:
        hook.remove()
    few, multi = torch.stack(outputs).chunk(2)  # each (layers, 2, B, S, N, D)
    cosines = torch.cosine_similarity(few, multi, -1).flatten(1).mean(1)
    return [round(cosine, 4) for cosine in cosines.tolist()]


def draw_strip(model, codecs, seconds: float) -> np.ndarray:
    """Three characters, each after 2 seconds and at the end: the same words and noise for all arms."""
    cfg, shots = model.cfg, []
    for character in cfg.characters[:3]:
        words = {"transcript": "the quick brown fox jumps " * 6, "character": character}
        film = stream_film(model, codecs, seconds=seconds + 0.5, **words)
        frames = np.concatenate([frames for frames, _ in film])
        shots += [frames[2 * cfg.fps], frames[int(seconds * cfg.fps)]]
    return np.concatenate(shots, 1).repeat(2, 0).repeat(2, 1)


def holds(results: dict, values: dict) -> bool:
    """Whether one of the rows has these values."""
    return any(values.items() <= row.items() for row in results["rows"])


def score_arm(name: str, seed: int, args, results: dict, make_codecs) -> None:
    """Train an arm, if need be, and enter those scores of its films that the results lack.

    With them come the likeness of its modes and, of the first seed, a strip of films.
    """
    for settings, guidance, seconds in ARMS[name].films:
        seconds = min(seconds, args.seconds)
        talkers = min(args.talkers, 4) if seconds > 60 else args.talkers
        films = {"guidance": guidance, "seconds": seconds, "talkers": talkers}
        job = {"arm": name, "seed": seed} | films
        if all(holds(results, job | {"mode": mode, "steps": steps}) for mode, steps in settings):
            continue
        model, codecs = load_talker(train_arm(name, seed, args, make_codecs), make_codecs)
        model, codecs = model.to(args.device), codecs.to(args.device)
        about = results["arms"].setdefault(name, {"options": ARMS[name].options, "alike": {}})
        if str(seed) not in about["alike"]:
            if seed == 0:
                strip = args.results.parent / STRIP.format(name)
                strip.parent.mkdir(exist_ok=True)
                iio.imwrite(strip, draw_strip(model, codecs, min(25.0, args.seconds)))
            about["alike"][str(seed)] = likeness(model, codecs)
        for row in evaluate({name: (model, codecs)}, settings=settings, **films)["rows"]:
            figures = {figure: row.pop(figure) for figure in FIGURES}
            source = {"arm": row.pop("checkpoint"), "seed": seed if row["mode"] else None}
            row = source | films | row
            if not holds(results, row):  # ground truth comes with all films
                results["rows"].append(row | figures)
        store(results, args.results)


def load_results(path: Path) -> dict:
    """Raises UserError for another kind of file, OSError if there is none."""
    try:
        results = json.loads(path.read_text())
        return {name: results[name] for name in ("init", "code", "mixed", "arms", "rows")}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: not results of lab.claims") from error


def open_results(args) -> dict:
    """The results so far, if any. Raises UserError if they rest on other things than now."""
    results = args.checksums | {"mixed": False, "arms": {}, "rows": []}
    if args.results.exists():
        results = load_results(args.results)
    others = [name for name, now in args.checksums.items() if results[name] != now]
    for name, arm in ARMS.items():
        if results["arms"].get(name, {"options": arm.options})["options"] != arm.options:
            others.append(f"training of {name}")
            if name in args.arms:  # to be made again
                del results["arms"][name]
                results["rows"] = [row for row in results["rows"] if row["arm"] != name]
    if others and not args.mix:
        raise UserError(f"{args.results}: of another {others[0]}; --mix goes on even so")
    return results | args.checksums | {"mixed": results["mixed"] or bool(others)}


def store(results: dict, path: Path) -> None:
    """Write the results, and their tables between two comments of the Markdown file beside them."""
    page = path.with_suffix(".md")
    text = page.read_text() if page.exists() else f"{BEGIN}\n{END}\n"
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UserError(f"{page}: its tables go between {BEGIN} and {END}, which it lacks")
    replace_file(path, json.dumps(results, indent=0).encode())
    replace_file(page, f"{before}{BEGIN}\n{tables(results)}\n{END}{after}".encode())


def mean(values) -> str:
    """Figures of several seeds -> their mean and their spread, a standard deviation."""
    values = [value for value in values if value is not None]
    spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3g}{spread}" if values else "-"


def by_part(lists) -> str:
    """Lists of several seeds, with a number a window or layer -> the mean of each."""
    return " / ".join([mean(values) for values in zip(*lists)])


def table(rows: list[dict], columns: tuple) -> str:
    """A line for each combination of the columns' values; means over seeds, a number a window."""
    seeds_of = defaultdict(list)
    for row in rows:
        seeds_of[tuple(row[name] for name in columns)].append(row)
    lines = []
    for key, seeds in seeds_of.items():
        line = dict(zip(columns, key)) | {"seeds": len(seeds) if seeds[0]["mode"] else None}
        for name in SHOWN:
            if rows[0][name][0] is not None:  # a figure that applies to these films
                line[name.replace("_", " ")] = by_part([row[name] for row in seeds])
        lines.append(line)
    return markdown(lines)


def tables(results: dict) -> str:
    """All results as Markdown, means over seeds."""
    parts = [f"Of checkpoint `{results['init'][:12]}` and code `{results['code'][:12]}`."]
    if results["mixed"]:
        parts.append("Mixed with results of another checkpoint, code or training.")

    def films_of(row):
        return row["control"] != "spoken", row["seconds"], row["talkers"]

    order = ["ground truth", "shuffled sound", *ARMS, *results["arms"]]
    rows = sorted(results["rows"], key=lambda row: order.index(row["arm"]))
    for (is_babbling, seconds, talkers), same in groupby(sorted(rows, key=films_of), films_of):
        windows = " / ".join([f"{begin}-{end}" for begin, end in windows_of(seconds)])
        title = "Babbling" if is_babbling else "Spoken"
        title = f"### {title}, {talkers} talkers, films of {seconds:g} s: seconds {windows}"
        parts += [title, table(list(same), ("arm", "mode", "steps", "guidance"))]
    hybrid = [row for row in rows if row["arm"] == "hybrid" and row["seconds"] <= 25]
    if hybrid:
        columns = ("control", "seconds", "talkers", "mode", "steps")
        parts += ["### The hybrid, by evaluations", table(hybrid, columns)]
    lines = []
    for name, arm in results["arms"].items():
        line = {"arm": name, "likeness by layer": by_part(arm["alike"].values())}
        lines.append(line | {"2 s and the end": f"![{name}]({STRIP.format(name)})"})
    if lines:
        parts += ["### How alike the two modes are, and three films after 2 s and at the end"]
        parts.append(markdown(lines))
    return "\n\n".join(parts)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("lab.claims", description="The paper's claims, arm by arm.")
    add = parser.add_argument
    add("--init", type=Path, help="the end of stage 2, which the arms start from")
    add("--out", type=Path, default=Path("runs/claims"), help="folder; default %(default)s")
    add("--results", type=Path, default=Path("docs/results.json"), help="default %(default)s")
    add("--seeds", type=int, default=1, help="of each arm, at most what ARMS says; default 1")
    add("--arms", nargs="+", choices=SCORED, default=SCORED, metavar="NAME", help=", ".join(SCORED))
    add("--talkers", type=int, default=16, help="films to score; over 60 s: 4 at most; default 16")
    add("--seconds", type=float, default=600.0, help="length of scored films, at most")
    add("--device", help="default: cuda, else mps, else cpu")
    add("--mix", action="store_true", help="go on with results of another --init, code or training")
    add("--tables", action="store_true", help="only print the tables of --results")
    return parser


def run(args, make_codecs) -> None:
    """Train and score what the results lack. Raises UserError, OSError."""
    if args.tables:
        print(tables(load_results(args.results)))
        return
    if not args.init or args.seeds < 1 or args.talkers < 2 or args.seconds < 5:
        raise UserError("needs --init; --seeds from 1, --talkers from 2, --seconds from 5")
    args.device, args.checksums = runs.find_device(args.device), checksums(args.init)
    _, _, extra = load_checkpoint(args.init, make_codecs)
    if extra.get("stage") != "joint" or extra.get("whole"):
        raise UserError(f"{args.init}: not the end of stage 2")
    args.out.mkdir(parents=True, exist_ok=True)
    results = open_results(args)
    store(results, args.results)  # an error comes now, and not after hours
    failed = None
    jobs = product(range(args.seeds), args.arms)  # all arms' first seeds, then all second ones
    jobs = [(name, seed) for seed, name in jobs if seed < ARMS[name].seeds]
    for name, seed in tqdm(jobs, "arms", disable=None):
        try:
            score_arm(name, seed, args, results, make_codecs)
        except UserError as error:  # such as a gradient that is not finite; the others go on
            failed = error
            print(f"lab.claims: {name}: {error}", file=sys.stderr)
    if failed:
        raise UserError("not all arms have scores, as it says above") from failed


def main(argv=None, make_codecs=make_codecs) -> int:
    """The command line. Returns 0, 2 for a mistake of the user, 130 if interrupted."""
    args = build_parser().parse_args(argv)
    return runs.exit_code("lab.claims", lambda: run(args, make_codecs))


if __name__ == "__main__":
    sys.exit(main())
