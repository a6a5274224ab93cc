"""Train Mutual Forcing: `python train.py` runs all stages, into runs/talker.

Options, one flat loop, checkpoints. The method is in mutual_forcing.py. Started by torchrun,
several processes share the work: each draws its own films, and gradients are averaged.
"""

import argparse
import copy
import json
import shlex
import sys
import time
from pathlib import Path
from typing import NamedTuple

import imageio.v3 as iio
import numpy as np
import torch
import torch.distributed.checkpoint.state_dict as dcp
from tqdm import tqdm

import mutual_forcing as mf
from data import checkpoint, runs
from data.batches import Batches, frames_of
from data.clips import drawer, fingerprint, load_clips
from data.codecs import make_codecs
from data.controls import stream_film
from data.writer import delayed_interrupt, film_strip
from mutual_forcing import AudioVideoTransformer, Config, UserError


class Plan(NamedTuple):
    """What a stage takes by default (our choice; the paper's rate is 5e-5 in all stages)."""

    steps: int
    lr: float = 1e-3
    seconds: tuple = (1.5, 1.5, 3.0)  # lengths of films, in turn
    batch: int = 8  # films of the first length in a pass of one process
    ema: float = 0.999  # decay of the slow copy, which is what a checkpoint holds


STAGES = {
    "codec": Plan(48000, 2e-3, (0.5,), 4),  # stage 0: the video codec
    "unimodal": Plan(1500),  # stage 1: both branches, each alone
    "joint": Plan(38000),  # stage 2
    # Stage 3. Longer clips made a less steady picture (docs/notes.md).
    "mutual": Plan(1500, 1e-4, (1.5,), 8, ema=0.99),
}
SNAPSHOT = 30  # minutes of training after which a checkpoint is kept, again and again
LOG_EVERY = 20  # steps
WHOLE = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)  # for any number of processes
RATES = {"model": 1, "fake": 5}  # times lr: the fake score has to keep up with the few-step mode
# What may differ when a run is resumed; all else decides which weights it ends with.
FREE = ("resume", "overwrite", "out", "preset", "data", "device", "save", "from_scratch")
TINY = "--steps 24 --batch 3 --seconds 1.5 2 --save 12"
TINY_SIZES = "--config width=64 layers=2 heads=1"


class State:
    """All that a training step changes. Restored from a file, a run goes on as if never stopped."""

    def __init__(self, model: AudioVideoTransformer, codecs, stage: str, args):
        self.stage, self.step, self.plan = stage, 0, plan_of(args, stage)
        self.seed = [args.seed, list(STAGES).index(stage), runs.process()[0]]
        self.whole = copy.deepcopy((model, codecs))  # undivided: save() fills it
        self.cfg, self.codecs = model.cfg, codecs.eval().requires_grad_(False).to(args.device)
        self.model = codecs.video if stage == "codec" else model  # what this stage trains
        self.model.train().requires_grad_(True)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.nets, self.real = {"model": self.model, "ema": self.ema}, self.ema
        if stage == "mutual":
            self.real = args.real or self.ema
            if args.weights["dmd"]:
                self.nets["fake"] = copy.deepcopy(self.real).requires_grad_(True)
        for net in dict.fromkeys([*self.nets.values(), self.real]):  # each of them once
            net.to(args.device)
            if runs.process()[1] > 1:
                runs.shard(net, args.device)
        self.optimizers, paper = {}, {"betas": (0.9, 0.95), "weight_decay": 0.02, "fused": True}
        for name, net in self.nets.items():
            if name in RATES:
                self.optimizers[name] = torch.optim.AdamW(net.parameters(), **paper)

    def content(self) -> dict:
        """Plain types and whole tensors: any number of processes can go on from them."""
        content = {"stage": self.stage, "step": self.step}
        for name, net in self.nets.items():
            optimizer = self.optimizers.get(name, ())
            content[name] = dcp.get_state_dict(net, optimizer, options=WHOLE)
        return content

    def restore(self, content: dict) -> None:
        """Inverse of content()."""
        self.step = content["step"]
        for name, net in self.nets.items():
            optimizer, (weights, state) = self.optimizers.get(name, ()), content[name]
            both = {"model_state_dict": weights, "optim_state_dict": state}
            dcp.set_state_dict(net, optimizer, **both, options=WHOLE)


def losses_of(state: State, x: torch.Tensor, controls, args) -> tuple[dict, dict]:
    """The losses of a training step by term, and values to log."""
    if state.stage == "mutual":
        nets = {"teacher": state.ema, "real_score": state.real}
        nets["fake_score"] = state.nets.get("fake")  # None without DMD
        # A rollout has 4 or 8 steps at random, the same in all processes.
        steps = int(np.random.default_rng([args.seed, state.step]).choice([4, 8]))
        options = {"weights": args.weights, "extra": args.extra, "guidance": args.guidance}
        options |= {"self_made": args.history != "real", "start_index": int(args.history == "late")}
        options |= {"steps": steps, "bidirectional": args.real_is_whole}
        return mf.mutual_forcing_loss(state.model, x, controls, **nets, **options)
    history, coupled = None if args.whole else x, state.stage != "unimodal"
    loss, logs = mf.flow_matching_loss(state.model, x, history, controls, coupled=coupled)
    return {"flow": loss}, logs


def autocast(args):
    """The precision of matrix products. A cache would hide a rollout's casts from autograd."""
    bf16 = args.precision == "bf16"
    return torch.autocast(args.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)


def train_step(state: State, batches: Batches, args) -> dict[str, float]:
    """One training step -> values to log. Raises UserError if a gradient is not finite."""
    for index in range(args.accumulate):
        turn = state.step * args.accumulate + index
        seed = np.random.SeedSequence([*state.seed, state.step, index])
        torch.manual_seed(int(seed.generate_state(1)[0]))
        with autocast(args):
            if state.stage == "codec":
                # Two frames of each film: many people are worth more than many frames.
                # The last two, because no film begins in a blink or with an open mouth.
                frames = batches.films(turn).frames[:, -2:]
                loss, logs = state.model.loss(frames.to(args.device))
                losses = {"codec": loss}
            else:
                x, controls = batches.latents(turn, state.codecs, args.device)
                losses, logs = losses_of(state, x, controls, args)
        (sum(losses.values()) / args.accumulate).backward()
    logs["loss"] = sum(loss.item() for loss in losses.values())
    return logs | update(state, args)


def update(state: State, args) -> dict[str, float]:
    """Move the weights by their gradients, and the EMA copy -> norms of the gradients."""
    plan, norms = state.plan, {}
    # The rate warms up, then falls to a twentieth (our choice).
    warm = min(1, (state.step + 1) / min(100, plan.steps))
    rate = warm * (1 - 0.95 * state.step / plan.steps)
    for name, optimizer in state.optimizers.items():
        norm = torch.nn.utils.clip_grad_norm_(state.nets[name].parameters(), 0.5)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        norms[f"norm_{name}"] = norm.item()
        if not norm.isfinite():  # of all processes alike
            last = f"{args.out / state.stage}.pt, if it exists, is the last good checkpoint"
            raise UserError(f"a gradient is not finite at step {state.step}; {last}")
        for group in optimizer.param_groups:
            group["lr"] = RATES[name] * plan.lr * rate
    for optimizer in state.optimizers.values():
        optimizer.step()
        optimizer.zero_grad()
    decay = min(plan.ema, (state.step + 1) / (state.step + 10))
    with torch.no_grad():
        for slow, fast in zip(state.ema.parameters(), state.model.parameters()):
            slow.lerp_(fast, 1 - decay)
        for slow, fast in zip(state.ema.buffers(), state.model.buffers()):
            slow.copy_(fast)
    state.step += 1
    return norms


def train_stage(state: State, args) -> None:
    """Train a stage to its end. After a Ctrl-C save the current step; KeyboardInterrupt."""
    is_first = runs.process()[0] == 0  # it alone logs and, on a terminal, shows a bar
    plan, draw = state.plan, drawer(args.clips, state.stage)
    batches = Batches(state.cfg, draw, state.seed, plan.seconds, plan.batch, args.accumulate)
    hidden = not is_first or None
    bar = tqdm(total=plan.steps, initial=state.step, desc=state.stage, disable=hidden)
    with bar, delayed_interrupt() as interrupted:
        while state.step < plan.steps:
            began = time.perf_counter()
            logs = train_step(state, batches, args)
            logs["seconds"] = time.perf_counter() - began
            bar.update()
            bar.set_postfix(loss=f"{logs['loss']:.3f}")
            if is_first and (state.step % LOG_EVERY == 0 or state.step in (1, plan.steps)):
                entry = {name: round(value, 5) for name, value in logs.items()}
                with open(args.out / "log.jsonl", "a") as log:
                    entry = {"stage": state.stage, "step": state.step} | entry
                    print(json.dumps(entry), file=log)
            before = sum(args.minutes.values())
            args.minutes[state.stage] = args.minutes.get(state.stage, 0) + logs["seconds"] / 60
            is_due = before // SNAPSHOT < sum(args.minutes.values()) // SNAPSHOT
            is_due = runs.any_process(is_due, args.device)
            stop = runs.any_process(interrupted, args.device)
            if stop or is_due or state.step % args.save == 0 or state.step == plan.steps:
                save(state, args, is_due)
            if stop:
                print("saved; --resume goes on with the same command", file=sys.stderr)
                raise KeyboardInterrupt


def save(state: State, args, is_due: bool) -> None:
    """Write the EMA weights, all that --resume needs, and a film strip (first process alone).

    is_due: keep the EMA weights also under the number of minutes of training so far.
    """
    content = state.content()
    if runs.process()[0] == 0:
        model, codecs = state.whole
        trained = codecs.video if state.stage == "codec" else model
        trained.load_state_dict(content["ema"][0])
        extra = {"stage": state.stage, "step": state.step, "seed": args.seed, "whole": args.whole}
        extra |= {"command": args.command, "commit": args.commit, "minutes": args.minutes}
        checkpoint.save_checkpoint(args.out / f"{state.stage}.pt", model, codecs, extra)
        if is_due:
            name = f"after-{sum(args.minutes.values()):03.0f}-minutes.pt"
            checkpoint.save_checkpoint(args.out / name, model, codecs, extra)
        log_size = (args.out / "log.jsonl").stat().st_size
        content |= {"settings": args.settings, "log_size": log_size, "minutes": args.minutes}
        checkpoint.save_file(args.out / "resume.pt", content)
        if state.stage in ("joint", "mutual") and not args.whole:  # else it cannot stream
            film = stream_film(model.to(args.device), state.codecs, seconds=6)
            iio.imwrite(args.out / f"{state.stage}.png", film_strip(list(film), state.cfg))
    runs.any_process(False, args.device)  # the others wait until the first has written


def plan_of(args, stage: str) -> Plan:
    """A stage's plan, changed by the command line."""
    names = ("steps", "lr", "batch") if stage == "codec" else ("steps", "lr", "batch", "seconds")
    said = {name: getattr(args, name) for name in names}
    return STAGES[stage]._replace(**{name: x for name, x in said.items() if x is not None})


def check(args, cfg: Config, stages: list[str]) -> None:
    """Raise UserError for options that do not fit each other or the model."""
    has_start = args.init or args.resume or args.from_scratch
    if args.stage not in ("all", "codec") and not has_start:
        raise UserError(f"--stage {args.stage}: needs --init (the stage before), or --from-scratch")
    if args.init and (args.stage == "all" or args.config):
        raise UserError("--init: needs --stage, and no --config, because it has its own sizes")
    if args.whole and "mutual" in stages:
        raise UserError("--whole: is for a teacher's stages: unimodal and joint")
    if "mutual" not in stages and (args.teacher or args.history != "few" or args.guidance != 1):
        raise UserError("--teacher, --history and --guidance: are for stage 3, mutual")
    weights = args.weights.values()
    if not any(weights) or not all(0 <= x <= 1000 for x in [*weights, args.guidance]):
        raise UserError("weights of objectives and --guidance are 0 to 1000; not all weights are 0")
    if not 0 <= args.seed < 2**63:
        raise UserError("--seed is between 0 and 2^63")
    for stage in stages:
        plan, chunks = plan_of(args, stage), {"codec": 0, "mutual": 3}.get(stage, 2)
        least = chunks * cfg.chunk_seconds
        if not all(least <= seconds <= cfg.clock / 2 for seconds in plan.seconds):
            raise UserError(f"--seconds: between {least} and {cfg.clock / 2} in stage {stage}")
        if min(plan.batch, plan.steps, args.accumulate, args.save) < 1 or not 0 < plan.lr <= 1:
            raise UserError("--batch, --steps, --accumulate, --save: 1 or more; --lr: 0 to 1")


def run(args, make_codecs) -> None:
    """Train the stages asked for. Raises UserError, OSError, KeyboardInterrupt."""
    args.device = runs.start_processes(runs.find_device(args.device))
    content, args.lock = runs.prepare_folder(args.out, args.resume, args.overwrite, args.device)
    stages = list(STAGES) if args.stage == "all" else [args.stage]
    torch.manual_seed(args.seed % 2**63)
    start = args.out / f"{content['stage']}.pt" if content else args.init
    if start:
        model, codecs, extra = checkpoint.load_checkpoint(start, make_codecs)
        if stages == ["mutual"] and not checkpoint.makes_films(extra):
            raise UserError(f"{start}: is no end of stage 2")
    else:
        model = AudioVideoTransformer(runs.read_config(args.config))
        codecs = make_codecs(model.cfg)
        # Rounded as in a checkpoint, so that a resumed run has the same.
        codecs.load_state_dict(checkpoint.in_half_precision(codecs))
    cfg = model.cfg
    if args.stage == "all" and not hasattr(codecs.video, "loss"):
        stages.remove("codec")  # this codec is not trained
    check(args, cfg, stages)
    args.real, args.real_is_whole, args.clips = None, False, None
    if args.teacher:
        args.real, _, extra = checkpoint.load_checkpoint(args.teacher, make_codecs)
        args.real_is_whole = bool(extra.get("whole"))
        scores = extra.get("stage") in ("joint", "mutual")
        if not scores or not checkpoint.same_format(cfg, args.real.cfg):
            raise UserError(f"{args.teacher}: before stage 2, or of films of another format")
    if args.data:
        longest = max(max(plan_of(args, stage).seconds) for stage in stages)
        args.clips = load_clips(args.data, cfg, frames_of(cfg, longest), args.out / ".clips")
    for stage in stages:  # raises if no clip serves, or if the talker has other sizes
        drawer(args.clips, stage)(cfg, np.random.default_rng(0), cfg.chunk_frames)
    native = "bf16" if runs.native_precision(args.device) == torch.bfloat16 else "fp32"
    args.precision = args.precision or native
    args.settings |= {"precision": args.precision, "clips": args.clips and fingerprint(args.clips)}
    if content:
        changed = [name for name, x in args.settings.items() if content["settings"].get(name) != x]
        if changed:
            raise UserError(f"--resume: this run was started with other {', '.join(changed)}")
        stages = stages[stages.index(content["stage"]) :]
    args.minutes, args.commit = content["minutes"] if content else {}, runs.commit()
    if runs.process()[0] == 0:
        size = sum(x.numel() for x in model.parameters())
        print(f"{size / 1e6:.2f} M parameters, {args.settings}", file=sys.stderr)
        runs.begin_log(args.out / "log.jsonl", content)
    for stage in stages:
        state = State(model, codecs, stage, args)
        if content and content["stage"] == stage:
            state.restore(content)
        train_stage(state, args)
        # The next stage starts from the EMA weights, as saved.
        model, codecs, _ = checkpoint.load_checkpoint(args.out / f"{stage}.pt", make_codecs)
    if runs.process()[0] == 0:
        times = ", ".join(f"{stage} {minutes:.0f}" for stage, minutes in args.minutes.items())
        print(f"minutes: {times}; {args.out / stages[-1]}.pt is ready", file=sys.stderr)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("train.py", description="Train Mutual Forcing.")
    add = parser.add_argument
    add("--stage", choices=(*STAGES, "all"), default="all", help="default all")
    add("--init", type=Path, help="checkpoint to start from")
    add("--from-scratch", action="store_true", help="start --stage from random weights")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--overwrite", action="store_true", help="begin anew in a folder that holds another run")
    add("--out", type=Path, default=Path("runs/talker"), help="folder; default %(default)s")
    add("--preset", choices=("tiny",), help="tiny: every stage in under three minutes")
    add("--config", nargs="+", action="extend", default=[], metavar="FIELD=N", help="see Config")
    add("--data", type=Path, help="folder of clips to train on, instead of the talker")
    add("--steps", type=int, help="training steps of each stage")
    add("--batch", type=int, help="films of the first length in a pass of one process")
    add("--seconds", type=float, nargs="+", help="lengths of films, in turn; not of stage codec")
    add("--lr", type=float, help="learning rate")
    add("--accumulate", type=int, default=1, help="passes in a training step; default 1")
    histories = "stage 3: self-made from noise, begun late from the real clip, or real"
    add("--history", choices=("few", "late", "real"), default="few", help=histories)
    for term, weight in mf.WEIGHTS.items():
        add(f"--{term}", type=float, default=weight, help=f"stage 3: its weight, {weight:.2g}")
    add("--guidance", type=float, default=1.0, help="stage 3: in the few-step mode's targets")
    add("--teacher", type=Path, help="stage 3: a frozen checkpoint, DMD's real score")
    add("--whole", action="store_true", help="a chunk as long as the clip: a bidirectional teacher")
    add("--seed", type=int, default=0, help="default 0")
    add("--device", help="default: cuda, else mps, else cpu")
    add("--precision", choices=("fp32", "bf16"), help="default: bf16 where the device has it")
    add("--save", type=int, default=500, metavar="STEPS", help="between checkpoints; default 500")
    return parser


def main(argv=None, make_codecs=make_codecs, extra=None) -> int:
    """The command line, with a fork's codecs and objectives; returns 0, 2 (mistake) or 130."""
    words = sys.argv[1:] if argv is None else list(argv)
    args = build_parser().parse_args(words)
    if args.preset == "tiny":
        sizes = "" if args.init else TINY_SIZES
        args = build_parser().parse_args([*sizes.split(), *TINY.split(), *words])
    args.init, args.teacher = (path and path.resolve() for path in (args.init, args.teacher))
    args.settings = {name: str(x) for name, x in vars(args).items() if name not in FREE}
    kept = [word for word in words if word not in ("--resume", "--overwrite")]
    args.command = shlex.join(["python", "train.py", *kept])
    args.weights, args.extra = {term: getattr(args, term) for term in mf.WEIGHTS}, extra
    return runs.exit_code("train.py", lambda: run(args, make_codecs))


if __name__ == "__main__":
    sys.exit(main())
