"""The score line of a run of train.py: `python -m lab.score_line runs/talker`.

A table of how well films were after 30, 60, 90 minutes of training and so on, from the checkpoints
that train.py keeps: the few-step mode with 4 evaluations, which before stage 3 is plain Euler.
"""

import argparse
import sys
from pathlib import Path

from data import runs
from data.checkpoint import CheckpointError, load_checkpoint
from data.codecs import make_codecs
from lab.evaluate import evaluate, markdown
from mutual_forcing import UserError
from sample import load_talker

COLUMNS = {
    "letters misread": ("spoken", "transcript_error"),
    "lip": ("spoken", "lip"),
    "sync": ("spoken", "sync"),
    "babble sync": ("babbling", "sync"),
    "drift of colours": ("spoken", "identity_drift"),
}


def kept_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run by time, and its end. Raises UserError if there are none."""
    paths = sorted(folder.glob("after-*-minutes.pt"), key=lambda path: (len(path.name), path.name))
    paths += folder.glob("mutual.pt")
    if not paths:
        raise UserError(f"{folder}: holds no checkpoint that train.py keeps")
    return paths


def score_line(folder: Path, make_codecs, device, **options) -> list[dict]:
    """A row for each checkpoint, and one of ground truth; figures are of the last window."""
    about, models, done = {}, {}, {}  # done: the minutes of stages that the run has left behind
    for path in kept_checkpoints(folder):
        extra = load_checkpoint(path, make_codecs)[2]
        if not done.items() <= extra["minutes"].items():
            continue  # the end of an earlier run, which --overwrite leaves until it is replaced
        done = {name: spent for name, spent in extra["minutes"].items() if name != extra["stage"]}
        minutes = f"{sum(extra['minutes'].values()):.0f}"
        about[minutes] = extra["stage"]
        try:
            model, codecs = load_talker(path, make_codecs)
            models[minutes] = model.to(device), codecs.to(device)
        except CheckpointError:  # before stage 2 there are no films to score
            continue
    if not models:
        raise UserError(
            f"{folder}: no checkpoint makes films yet; stage joint is the first that does"
        )
    result = evaluate(models, settings=[("few", 4)], **options)
    scored = {(row["checkpoint"], row["control"]): row for row in result["rows"]}
    lines = []
    for minutes, stage in [*about.items(), ("ground truth", None)]:
        line = {"minutes": minutes, "stage": stage}
        for column, (control, figure) in COLUMNS.items():
            row = scored.get((minutes, control))
            line[column] = row[figure][-1] if row else None
        lines.append(line)
    return lines


def main(argv=None, make_codecs=make_codecs) -> int:
    """The command line. Returns 0, 2 for a mistake of the user, 130 if interrupted."""
    parser = argparse.ArgumentParser("lab.score_line", description="How well films were over time.")
    parser.add_argument("folder", type=Path, help="of a run of train.py")
    parser.add_argument("--talkers", type=int, default=32, help="films to score; default 32")
    parser.add_argument("--seconds", type=float, default=25.0, help="length of a film; default 25")
    parser.add_argument("--device", help="default: cuda, else mps, else cpu")
    args = parser.parse_args(argv)
    options = {"talkers": args.talkers, "seconds": args.seconds}

    def run():
        if args.talkers < 2 or not 5 <= args.seconds <= 86400:
            raise UserError("--talkers must be at least 2, --seconds between 5 and 86400")
        device = runs.find_device(args.device)
        print(markdown(score_line(args.folder, make_codecs, device, **options)))

    return runs.exit_code("lab.score_line", run)


if __name__ == "__main__":
    sys.exit(main())
