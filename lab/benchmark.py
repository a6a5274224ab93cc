"""Speed of films and of training steps, beside the machine's limit: `python -m lab.benchmark`.

The limit is the time that the same matrix products take alone; limit_share is the limit divided
by the time measured. Each row is measured in a process of its own, so its memory is its own.
"""

import argparse
import json
import multiprocessing
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
import timeit
from concurrent.futures import ProcessPoolExecutor
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
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

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler prints when it starts and stops

TEXT = "the quick brown fox"  # after it the films are silent, which takes the same time
LEGEND = """
- start-up: import, without that of torch; load, until the model is on the device; the first chunk
- chunk: half a second of film from stream(), decoded; decode: the codecs' share of it
- last to new: a chunk after the film's end, divided by one of a new film, measured in turns
- real time: seconds of film made in a second, end to end, with its .mp4
- memory growth: from a tenth of the film to its end
- limit share: of the model in a chunk; of forward and backward in a training step"""


def clock(device: torch.device) -> float:
    """Seconds, once all that was asked of the device is done."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


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


def matrix_products(function) -> list[tuple]:
    """Run a function -> the shapes (a, b) of all matrix products a @ b in it.

    linear, matmul and einsum call one of the four operations that are counted. Fused
    attention is two products; its gradient is not counted, nor are convolutions.
    """
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        function()
    products = []
    for event in recorded.key_averages(group_by_input_shape=True):
        name, shapes, found = event.key, event.input_shapes, []
        if name in ("aten::mm", "aten::bmm"):
            found = [(shapes[0], shapes[1])]
        elif name in ("aten::addmm", "aten::baddbmm"):  # a bias comes first
            found = [(shapes[1], shapes[2])]
        elif re.fullmatch("aten::_scaled_dot_product_.*_attention(_for_cpu)?", name):
            q, k, v = shapes[:3]
            scores = [*q[:-1], k[-2]]
            found = [(q, [*k[:-2], k[-1], k[-2]]), (scores, v)]
        products += event.count * found
    return products


def seconds_alone(products: list[tuple], device: torch.device) -> float:
    """Seconds that random matrices of these shapes take, in the precision that suits the device."""
    like = {"dtype": runs.native_precision(device), "device": device}
    pairs = [(torch.randn(a, **like), torch.randn(b, **like)) for a, b in products]

    def multiply():
        for a, b in pairs:
            a @ b
        clock(device)

    return min(timeit.repeat(multiply, number=1, repeat=5))


def load(checkpoint: Path, device: torch.device, make_codecs) -> tuple:
    """(model, codecs), as sample.py has them."""
    model, codecs = sample.load_talker(checkpoint, make_codecs)
    return model.to(device, runs.native_precision(device)), codecs.to(device)


@torch.inference_mode()
def start_up_row(checkpoint: Path, device: torch.device, make_codecs) -> dict:
    """What a user waits for, once, before a film begins to come."""
    code = "import time, torch; a = time.perf_counter(); import sample; b = time.perf_counter()"
    words, root = [sys.executable, "-c", f"{code}; print(b - a)"], Path(sample.__file__).parent
    import_s = float(subprocess.check_output(words, cwd=root, text=True))
    began = clock(device)
    model, codecs = load(checkpoint, device, make_codecs)
    loaded = clock(device)
    next(stream_film(model, codecs, seconds=10, transcript=TEXT))
    first_chunk_ms = 1000 * (clock(device) - loaded)
    return {"import_s": import_s, "load_s": loaded - began, "first_chunk_ms": first_chunk_ms}


@torch.inference_mode()
def film_row(checkpoint: Path, device: torch.device, make_codecs, *, mode, steps, seconds) -> dict:
    """Stream a film and write its .mp4; then go on beside a new one."""
    model, codecs = load(checkpoint, device, make_codecs)
    cfg = model.cfg

    def new_film():
        options = {"mode": mode, "steps": steps, "transcript": TEXT}
        return stream_film(model, codecs, seconds=86400, **options)

    list(islice(new_film(), 3))  # to warm up
    chunks = max(1, round(seconds / cfg.chunk_seconds))
    film, began = new_film(), clock(device)
    with tempfile.TemporaryDirectory() as folder:
        writer = FilmWriter(Path(folder, "film.mp4"), cfg)
        laps = [clock(device)]
        for index in range(chunks):
            part = next(film)
            laps.append(clock(device))
            writer.add(*part)
            laps.append(clock(device))
            if index == chunks // 10:
                early_memory = memory(device, peak=False)
        writer.finish()
        writer.close()
    end_to_end, growth = clock(device) - began, memory(device, peak=False) - early_memory

    films, turns = [film, new_film()], [clock(device)]
    for each in films * min(chunks, 100):
        next(each)
        turns.append(clock(device))
    peak, products = memory(device, peak=True), matrix_products(lambda: next(film))
    last_s, new_s = np.median(np.diff(turns).reshape(-1, 2), 0)

    video, audio = mf.split(cfg, torch.randn(1, cfg.chunk, cfg.latent_values, device=device))

    def decode():
        codecs.video.decode_next(video)
        codecs.audio.decode_next(audio)
        clock(device)

    decode_s, chunk_s = min(timeit.repeat(decode, number=1, repeat=9)), np.diff(laps)[::2]
    return {
        "first_chunk_ms": 1000 * chunk_s[0],
        "chunk_ms_median": 1000 * np.median(chunk_s),
        "chunk_ms_p95": 1000 * np.quantile(chunk_s, 0.95),
        "decode_ms": 1000 * decode_s,
        "last_to_new": last_s / new_s,
        "real_time": chunks * cfg.chunk_seconds / end_to_end,
        "peak_memory_mb": peak,
        "memory_growth_mb": growth,
        "limit_share": seconds_alone(products, device) / (np.median(chunk_s) - decode_s),
    }


def training_row(checkpoint: Path, device: torch.device, make_codecs, *, stage, batch, seconds):
    """The parts of train.train_step(), from the checkpoint's weights."""
    args = train.build_parser().parse_args([])
    args.device, args.weights, args.extra = device, mf.WEIGHTS, None
    args.real, args.real_is_whole = None, False
    is_bf16 = runs.native_precision(device) == torch.bfloat16
    args.precision = "bf16" if is_bf16 else "fp32"
    state = train.State(*sample.load_talker(checkpoint, make_codecs), stage, args)
    batches = Batches(state.cfg, talk, state.seed, [seconds], batch)

    def loss_of(x, controls):
        with train.autocast(args):
            return sum(train.losses_of(state, x, controls, args)[0].values())

    laps = [clock(device)]
    for turn in range(4):  # the first warms up
        with train.autocast(args):
            given = batches.latents(turn, state.codecs, device)
        laps.append(clock(device))
        loss = loss_of(*given)
        laps.append(clock(device))
        loss.backward()
        laps.append(clock(device))
        train.update(state, args)
        laps.append(clock(device))
    peak, spent = memory(device, peak=True), np.diff(laps).reshape(4, -1)
    parts = 1000 * np.median(spent[1:], 0)
    names = ("films_ms", "forward_ms", "backward_ms", "optimizer_ms")
    row = dict(zip(names, parts)) | {"step_ms": parts.sum(), "peak_memory_mb": peak}
    limit_ms = 1000 * seconds_alone(matrix_products(lambda: loss_of(*given).backward()), device)
    return row | {"limit_share": limit_ms / parts[1:3].sum()}


MEASURES = {"start-up": start_up_row, "film": film_row, "training step": training_row}


def jobs_of(longest: float) -> list[tuple]:
    """The rows to measure: (name in MEASURES, settings); films of so many seconds at most."""
    films = (("few", 4, 60), ("few", 4, 600), ("few", 8, 10), ("multi", 50, 10))
    jobs = [("start-up", {})]
    for mode, steps, seconds in films:
        jobs.append(("film", {"mode": mode, "steps": steps, "seconds": min(seconds, longest)}))
    for stage in ("joint", "mutual"):
        jobs.append(("training step", {"stage": stage, "batch": 8, "seconds": 1.5}))
    return jobs


def benchmark(checkpoint: Path, device: torch.device, make_codecs, jobs: list[tuple]) -> dict:
    """The machine, and a row for each job, measured in a process of its own."""
    rows, given = [], (checkpoint, device, make_codecs)
    options = {"mp_context": multiprocessing.get_context("spawn"), "max_tasks_per_child": 1}
    options |= {"initializer": torch.set_num_threads, "initargs": (torch.get_num_threads(),)}
    with ProcessPoolExecutor(1, **options) as pool:
        for what, settings in tqdm(jobs, disable=None):
            figures = pool.submit(MEASURES[what], *given, **settings).result()
            rows.append({"what": what} | settings | figures)
            print(markdown(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    return {"machine": machine(device), "rows": rows}


def build_parser() -> argparse.ArgumentParser:
    about = "Measure the speed of films and of training steps, beside the machine's limit."
    parser = argparse.ArgumentParser("lab.benchmark", description=about)
    add = parser.add_argument
    add("--checkpoint", type=Path, default=sample.SHIPPED, help="default: the shipped one")
    add("--seconds", type=float, default=600.0, help="length of films, at most; default 600")
    add("--device", help="default: cuda, else mps, else cpu")
    add("--json", action="store_true", help="print one JSON object instead of tables")
    return parser


def run(args, make_codecs) -> None:
    """Measure and print. Raises UserError and OSError."""
    device, jobs = runs.find_device(args.device), jobs_of(args.seconds)
    result = benchmark(args.checkpoint, device, make_codecs, jobs)
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
    return runs.exit_code("lab.benchmark", lambda: run(args, make_codecs))


if __name__ == "__main__":
    sys.exit(main())
