"""Speed of films and of training steps, beside the machine's limit: `python -m lab.benchmark`.

The limit is the time that the same operations take at the rate of a large matrix product;
limit_share is the limit divided by the time measured. Each row is measured in a process of its own,
so its memory is its own.
"""

import argparse
import json
import multiprocessing
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import mutual_forcing as mf
import sample
import train
from data import runs
from data.batches import Batches
from data.codecs import make_codecs
from data.controls import stream_film
from data.talker import talk
from data.writer import FilmWriter
from lab.evaluate import markdown

TEXT = "the quick brown fox"  # after it the films are silent, which takes the same time
# Training steps that are timed; the first warms up. Of the others five draw rollouts of 4 denoising
# steps in stage 3, and five of 8 (train.losses_of()); so do the steps whose operations are counted.
TURNS, COUNTED = 11, (4, 5)
LEGEND = """
- start-up: import, without that of torch; load, until the model is on the device; the first chunk
- chunk: half a second of film from stream(), decoded; decode: the codecs' share of it
- last to new: a chunk after the film's end, divided by one of a new film, measured in turns
- real time: seconds of film made in a second, end to end, with its .mp4
- memory growth: from a tenth of the film to its end
- limit share: of a chunk; of forward and backward in a training step"""


def clock(device: torch.device) -> float:
    """Seconds, once all that was asked of the device is done."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


def timed(device: torch.device, function, *arguments) -> tuple:
    """Seconds that a call takes, and what it returns."""
    began = clock(device)
    result = function(*arguments)
    return clock(device) - began, result


def memory(device: torch.device, *, peak: bool) -> float:
    """MiB of a GPU or of this process: the most held so far, or those held now."""
    if device.type == "cuda":
        measure = torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated
        return measure(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where ru_maxrss starts at that of the parent process
        name = "VmHWM" if peak else "VmRSS"
        return int(re.search(rf"{name}:\s+(\d+)", status.read_text())[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # a Mac counts bytes


def machine(device: torch.device) -> str:
    """What the figures were measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    about = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", about.read_text()) if about.exists() else []
    return f"{(names + [platform.processor()])[0]}, {torch.get_num_threads()} threads"


def operations_of(function) -> int:
    """Floating-point operations of a call: those of its matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


def limit_of(function, device: torch.device) -> float:
    """Seconds that the operations of a call take at the rate of a large matrix product."""
    matrix = torch.randn(2048, 2048, dtype=runs.native_precision(device), device=device)
    seconds = min([timed(device, torch.matmul, matrix, matrix)[0] for _ in range(5)])
    return operations_of(function) * seconds / (2 * 2048**3)


@torch.inference_mode()
def start_up_row(checkpoint: Path, device: torch.device, make_codecs) -> dict:
    """What a user waits for, once, before a film begins to come."""
    code = "import timeit, torch; print(timeit.timeit('import sample', number=1))"
    folder = Path(sample.__file__).parent
    import_s = float(subprocess.check_output([sys.executable, "-c", code], cwd=folder))
    load_s, talker = timed(device, sample.load_talker, checkpoint, make_codecs, device)
    first_chunk_s, _ = timed(device, next, stream_film(*talker, seconds=10, transcript=TEXT))
    return {"import_s": import_s, "load_s": load_s, "first_chunk_ms": 1000 * first_chunk_s}


@torch.inference_mode()
def film_row(checkpoint: Path, device: torch.device, make_codecs, *, mode, steps, seconds) -> dict:
    """Stream a film and write its .mp4; then go on beside a new one."""
    model, codecs = sample.load_talker(checkpoint, make_codecs, device)
    cfg = model.cfg
    options = {"seconds": 86400, "mode": mode, "steps": steps, "transcript": TEXT}
    list(islice(stream_film(model, codecs, **options), 3))  # to warm up
    chunks, chunk_s = max(1, round(seconds / cfg.chunk_seconds)), []
    with tempfile.TemporaryDirectory() as folder:
        film_began = clock(device)
        film = stream_film(model, codecs, **options)
        writer = FilmWriter(Path(folder, "film.mp4"), cfg)
        for index in range(chunks):
            waited, part = timed(device, next, film)
            chunk_s.append(waited)
            writer.add(*part)
            if index == chunks // 10:
                early_memory = memory(device, peak=False)
        writer.finish()
        writer.close()
        film_s = clock(device) - film_began
    growth = memory(device, peak=False) - early_memory

    new_film, last_s, new_s = stream_film(model, codecs, **options), [], []
    for _ in range(min(chunks, 100)):
        last_s.append(timed(device, next, film)[0])
        new_s.append(timed(device, next, new_film)[0])
    peak = memory(device, peak=True)
    limit_s = limit_of(lambda: next(film), device)

    video, audio = mf.split(cfg, torch.randn(1, cfg.chunk, cfg.latent_values, device=device))

    def decode():
        codecs.video.decode_next(video)
        codecs.audio.decode_next(audio)

    decode_s = min([timed(device, decode)[0] for _ in range(9)])
    return {
        "first_chunk_ms": 1000 * chunk_s[0],
        "chunk_ms_median": 1000 * np.median(chunk_s),
        "chunk_ms_p95": 1000 * np.quantile(chunk_s, 0.95),
        "decode_ms": 1000 * decode_s,
        "last_to_new": np.median(last_s) / np.median(new_s),
        "real_time": chunks * cfg.chunk_seconds / film_s,
        "peak_memory_mb": peak,
        "memory_growth_mb": growth,
        "limit_share": limit_s / np.median(chunk_s),
    }


def training_row(checkpoint: Path, device, make_codecs, *, objectives, batch, seconds) -> dict:
    """The parts of train.train_step(), from the checkpoint's weights."""
    args = train.build_parser().parse_args([])
    args.device, args.weights, args.extra = device, mf.WEIGHTS, None
    args.real, args.real_is_whole = None, objectives == "Self-Forcing"
    if args.real_is_whole:  # with a network more, the bidirectional teacher
        args.real, _ = sample.load_talker(checkpoint, make_codecs)
        args.weights = {"flow": 0.0, "shortcut": 0.0, "dmd": 1.0}
    stage = "joint" if objectives == "flow matching" else "mutual"
    args.precision = "bf16" if runs.native_precision(device) == torch.bfloat16 else "fp32"
    state = train.State(*sample.load_talker(checkpoint, make_codecs), stage, args)
    batches = Batches(state.cfg, talk, state.seed, [seconds], batch)

    def loss_of(x, controls):
        with train.autocast(args):
            return sum(train.losses_of(state, x, controls, args)[0].values())

    turns = []
    for turn in range(TURNS):
        with train.autocast(args):
            films_s, (x, controls) = timed(device, batches.latents, turn, state.codecs, device)
        forward_s, loss = timed(device, loss_of, x, controls)
        backward_s, _ = timed(device, loss.backward)
        optimizer_s, _ = timed(device, train.update, state, args)
        turns.append([films_s, forward_s, backward_s, optimizer_s])
    parts = 1000 * np.mean(turns[1:], 0)
    names = ("films_ms", "forward_ms", "backward_ms", "optimizer_ms")
    row = dict(zip(names, parts)) | {"step_ms": parts.sum()}
    row["peak_memory_mb"] = memory(device, peak=True)
    limits = []
    for state.step in COUNTED:
        limits.append(limit_of(lambda: loss_of(x, controls).backward(), device))
    return row | {"limit_share": 1000 * np.mean(limits) / (row["forward_ms"] + row["backward_ms"])}


JOBS = [
    ("start-up", start_up_row, {}),
    ("film", film_row, {"mode": "few", "steps": 4, "seconds": 60}),
    ("film", film_row, {"mode": "few", "steps": 4, "seconds": 600}),
    ("film", film_row, {"mode": "few", "steps": 8, "seconds": 10}),
    ("film", film_row, {"mode": "multi", "steps": 50, "seconds": 10}),
]
for name in ("flow matching", "Mutual Forcing", "Self-Forcing"):
    JOBS.append(("training step", training_row, {"objectives": name, "batch": 8, "seconds": 1.5}))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("lab.benchmark", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--checkpoint", type=Path, default=sample.SHIPPED, help="default: the shipped one")
    add("--device", help="default: cuda, else mps, else cpu")
    add("--json", action="store_true", help="print one JSON object instead of tables")
    return parser


def benchmark(args, make_codecs) -> dict:
    """The machine, and a row for each job. Raises UserError and OSError."""
    device, rows = runs.find_device(args.device), []
    given = (args.checkpoint, device, make_codecs)
    fresh = {"mp_context": multiprocessing.get_context("spawn"), "max_tasks_per_child": 1}
    with ProcessPoolExecutor(1, **fresh) as pool:
        for what, measure, settings in tqdm(JOBS, disable=None):
            figures = pool.submit(measure, *given, **settings).result()
            rows.append({"what": what} | settings | figures)
    return {"machine": machine(device), "rows": rows}


def show(result: dict, args) -> None:
    """Print what benchmark() returned: JSON, or a table for each kind of row."""
    if args.json:
        print(json.dumps(result))
        return
    print(result["machine"])
    for _, rows in groupby(result["rows"], lambda row: row["what"]):
        rows = [{name.replace("_", " "): x for name, x in row.items()} for row in rows]
        print("\n" + markdown(rows))
    print(LEGEND)


def main(argv=None, make_codecs=make_codecs) -> int:
    """The command line. Returns 0, 2 for a mistake of the user, 130 if interrupted."""
    args = build_parser().parse_args(argv)
    return runs.exit_code("lab.benchmark", lambda: show(benchmark(args, make_codecs), args))


if __name__ == "__main__":
    sys.exit(main())
