"""Speed of films and of training steps, beside the machine's limit: `python -m lab.benchmark`.

The limit is the time that the same matrix products take alone; limit_share is the limit divided
by the time measured. Each row is measured in a process of its own, so its peak memory is its own.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import re
import resource
import sys
import tempfile
import time
import timeit
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import mutual_forcing as mf
import train
from data.batches import Batches
from data.codecs import make_codecs
from data.talker import talk
from data.writer import FilmWriter
from lab.evaluate import markdown
from sample import SHIPPED, load_talker

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler prints when it starts and stops

FILM = {"batch": 1, "mode": "few", "steps": 4, "guidance": 1.0, "cache": True, "seconds": 10}
MULTI = {"mode": "multi", "steps": 50}
FILMS = (  # in what each differs from FILM, and from the checkpoint's size and window
    *({}, {"steps": 8}, MULTI, MULTI | {"guidance": 5.0}, {"batch": 8}, {"size": 128}),
    *({"cache": False}, {"cache": False, "batch": 8}, {"cache": False, "size": 128}),
    *({"window": 4}, {"cache": False, "window": 4}, {"seconds": 60}, {"seconds": 600}),
)
STEPS = tuple({"stage": stage, "batch": 8, "seconds": 1.5} for stage in train.STAGES)
QUICK = tuple({"steps": 1, "seconds": 1, "cache": cache} for cache in (True, False))
QUICK += ({"stage": "audio", "batch": 1, "seconds": 1},)
LEGEND = """
- first chunk: from a film's start to its first decoded half second; other chunks: the model alone
- chunk ms last, new: those after the film's end and those of a new film, measured in turns
- fps: frames of all films of a batch in a second of the model, of decoding, and end to end (both,
  and writing the first film as .mp4); loading is in none of them
- step seconds: a training step, with the drawing of its clips"""


def clock(device: torch.device) -> float:
    """Seconds, once all that was asked of the device is done."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


def peak_memory(device: torch.device) -> int:
    """The most memory held so far in MiB, of a GPU or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where ru_maxrss starts at that of the parent process
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) // 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**20


def machine(device: torch.device) -> str:
    """What the figures were measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    about = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", about.read_text()) if about.exists() else []
    return f"{(names + [platform.processor()])[0]}, {torch.get_num_threads()} threads"


def matrix_products(function) -> list[tuple]:
    """Run a function -> the shapes (a, b) of all matrix products a @ b in it.

    linear, matmul and einsum call one of the four operations that are counted. Fused attention is
    two products; its gradient is not counted.
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
    like = {"dtype": mf.native_precision(device), "device": device}
    pairs = [(torch.randn(a, **like), torch.randn(b, **like)) for a, b in products]

    def multiply():
        for a, b in pairs:
            a @ b
        clock(device)

    return min(timeit.repeat(multiply, number=1, repeat=5))


def films_of(model, codecs, chunks: int, *, batch, mode, steps, guidance, cache):
    """Yields the latents of each chunk of a batch of films.

    Without a cache, all chunks that a full cache holds are computed again, beside each new one.
    """
    cfg, device, few = model.cfg, model.device, mode == "few"
    visible = cfg.window + 2  # the sink, the window and the chunk itself
    text = "the quick brown fox " * chunks
    controls = mf.film_controls(cfg, codecs, chunks if cache else visible, text)
    controls = controls.map(lambda x: x.to(device).expand(batch, *x.shape[1:]))
    times = mf.time_grid(cfg, steps).to(device)
    if cache:
        for states in mf.generate(model, controls, chunks, times, few=few, guidance=guidance):
            yield states[-1]
        return
    length = visible * cfg.chunk

    def predict(x_t, k):
        d = (times[k + 1] - times[k]) * few
        return model(x_t, times[k], d, controls, None, length)

    for _ in range(chunks):
        noise = torch.randn(batch, length, cfg.latent_values, device=device)
        yield mf.denoise(cfg, predict, noise, times)[-1][:, -cfg.chunk :]


def decode(cfg, codecs, latents, state=(None, None)):
    """Latents of the next chunk -> its frames, its samples, and the state for the next call."""
    video, audio = mf.split(cfg, latents)
    frames, video_state = codecs.video.decode_next(video, state[0])
    samples, audio_state = codecs.audio.decode_next(audio, state[1])
    return frames, samples, (video_state, audio_state)


@torch.inference_mode()
def time_films(model, codecs, *, seconds, **settings) -> dict:
    """Stream films, decode all of them and write the first -> the figures of a row."""
    cfg, device, state = model.cfg, model.device, (None, None)
    for latents in films_of(model, codecs, cfg.window + 2, **settings):  # to warm up
        state = decode(cfg, codecs, latents, state)[2]

    chunks = round(seconds / cfg.chunk_seconds)
    more = min(chunks, 100)
    film = films_of(model, codecs, chunks + more + 1, **settings)
    state, laps = (None, None), [clock(device)]
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(FilmWriter(Path(folder, "film.mp4"), cfg)) as writer,
    ):
        for _ in range(chunks):
            latents = next(film)
            laps.append(clock(device))
            frames, samples, state = decode(cfg, codecs, latents, state)
            laps.append(clock(device))
            writer.add(frames[0].cpu().numpy(), samples[0].cpu().numpy())
            laps.append(clock(device))
        writer.finish()
    end_to_end = clock(device) - laps[0]
    new_film, turns = films_of(model, codecs, more, **settings | {"cache": True}), [clock(device)]
    for _ in range(more):
        for some in (film, new_film):
            next(some)
            turns.append(clock(device))
    memory = peak_memory(device)
    products = matrix_products(lambda: next(film))
    model_s, codec_s, _ = np.diff(laps).reshape(-1, 3).T
    last_s, new_s = np.median(np.diff(turns).reshape(-1, 2), 0)
    chunk_s, num_frames = np.median(model_s), settings["batch"] * chunks * cfg.chunk_frames
    return {
        "first_chunk_ms": 1000 * (laps[2] - laps[0]),
        "chunk_ms_median": 1000 * chunk_s,
        "chunk_ms_p95": 1000 * np.quantile(model_s, 0.95),
        "chunk_ms_last": 1000 * last_s,
        "chunk_ms_new": 1000 * new_s,
        "fps_model": num_frames / model_s.sum(),
        "fps_codec": num_frames / codec_s.sum(),
        "fps_end_to_end": num_frames / end_to_end,
        "real_time_factor": num_frames / end_to_end / cfg.fps,
        "peak_memory_mb": memory,
        "limit_share": seconds_alone(products, device) / chunk_s,
    }


def film_row(checkpoint: Path, device: torch.device, make_codecs, job: dict) -> dict:
    """A row of FILMS; pictures of another size than the checkpoint's come from random weights."""
    model = load_talker(checkpoint)
    row = {"what": "film", "size": model.cfg.image, "window": model.cfg.window} | FILM | job
    if row["size"] != model.cfg.image:
        model = mf.AudioVideoTransformer(replace(model.cfg, image=row["size"]))
    model.cfg = replace(model.cfg, window=row["window"])  # no weight depends on it
    model = model.to(device, mf.native_precision(device))
    codecs = make_codecs(model.cfg, device)
    return row | time_films(model, codecs, **{name: row[name] for name in FILM})


def training_row(checkpoint: Path, device: torch.device, make_codecs, job: dict) -> dict:
    """A row of STEPS: one training step of a stage, from the checkpoint's weights."""
    args = train.build_parser().parse_args([])
    args.device, args.weights, args.extra = device, mf.WEIGHTS, None
    args.real, args.real_is_whole = None, False
    is_bf16 = mf.native_precision(device) == torch.bfloat16
    args.precision = "bf16" if is_bf16 else "fp32"
    state = train.State(load_talker(checkpoint), job["stage"], args)
    codecs = make_codecs(state.cfg, device)
    batches = Batches(state.cfg, talk, [0], [job["seconds"]], job["batch"], 1)
    films = (batches[turn] for turn in itertools.count())

    def step():
        train.train_step(state, films, codecs, args)

    step()  # to warm up
    seconds = min(timeit.repeat(step, number=1, repeat=3))
    row = {"what": "training step"} | job
    row |= {"step_seconds": seconds, "peak_memory_mb": peak_memory(device)}
    return row | {"limit_share": seconds_alone(matrix_products(step), device) / seconds}


def benchmark(checkpoint: Path, device: torch.device, make_codecs, jobs, *, together=False) -> dict:
    """The machine, and a row for each job, measured in a process of its own, or together in one."""
    rows, threads = [], torch.get_num_threads()
    spawn = multiprocessing.get_context("spawn")
    limit = {"max_tasks_per_child": len(jobs) if together else 1}
    with ProcessPoolExecutor(1, spawn, torch.set_num_threads, (threads,), **limit) as pool:
        for job in tqdm(jobs, disable=None):
            measure = training_row if "stage" in job else film_row
            rows.append(pool.submit(measure, checkpoint, device, make_codecs, job).result())
            print(markdown(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    return {"machine": machine(device), "rows": rows}


def build_parser() -> argparse.ArgumentParser:
    about = "Measure the speed of films and of training steps, beside the machine's limit."
    parser = argparse.ArgumentParser("lab.benchmark", description=about)
    add = parser.add_argument
    add("--checkpoint", type=Path, default=SHIPPED, help="default: the shipped one")
    add("--device", help="default: cuda, else mps, else cpu")
    add("--quick", action="store_true", help="three small rows, in one process")
    add("--json", action="store_true", help="print one JSON object instead of tables")
    return parser


def main(argv=None, make_codecs=make_codecs) -> int:
    """The command line. Returns 0, 2 for a mistake of the user, 130 if interrupted."""
    args = build_parser().parse_args(argv)
    try:
        device = mf.find_device(args.device)
        jobs = QUICK if args.quick else FILMS + STEPS
        result = benchmark(args.checkpoint, device, make_codecs, jobs, together=args.quick)
    except (mf.UserError, OSError) as error:
        print(f"lab.benchmark: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    if args.json:
        print(json.dumps(result))
        return 0
    print(result["machine"])
    for what in ("film", "training step"):
        print("\n" + markdown([row for row in result["rows"] if row["what"] == what]))
    print(LEGEND)
    return 0


if __name__ == "__main__":
    sys.exit(main())
