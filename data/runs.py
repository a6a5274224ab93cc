"""Devices; and a run of training: its processes (torchrun), its folder and its log."""

import fcntl
import os
import subprocess
import sys
import warnings
from dataclasses import fields
from pathlib import Path

import torch
import torch.distributed as dist

from data.checkpoint import load_file
from mutual_forcing import Config, UserError


def find_device(name: str | None) -> torch.device:
    """The device of this name; None: cuda, else mps, else cpu. Raises UserError."""
    if name is None:
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        zero = torch.zeros(1, device=name)
        zero.item()
        return zero.device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: PyTorch cannot use it here") from error


def native_precision(device) -> torch.dtype:
    """bf16 where the device multiplies it natively, else fp32: a rule, no measurement."""
    native = False
    if torch.device(device).type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif torch.device(device).type == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if native else torch.float32


def exit_code(name: str, command) -> int:
    """Run a command line's function: 0 or what it returns, 2 for a mistake of the user,
    130 if interrupted. A mistake is told in one line; a bug gives its traceback."""
    try:
        return command() or 0
    except (UserError, OSError) as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130


def start_processes(device: torch.device) -> torch.device:
    """Join the other processes if torchrun started this one; returns its own device.

    Raises UserError if there is none for it.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise UserError(f"each process needs a GPU; here are {torch.cuda.device_count()}")
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise UserError(f"several processes cannot share {device.type}; --device cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def process() -> tuple[int, int]:
    """Which process this is, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def any_process(wish, device) -> bool:
    """Whether any of the processes wishes it; all wait for all."""
    wishes = torch.tensor(float(bool(wish)), device=device)
    if process()[1] > 1:
        dist.all_reduce(wishes)
    return bool(wishes)


def shard(net: torch.nn.Module, device: torch.device) -> None:
    """Divide a network's weights among the processes (FSDP2), block by block."""
    # Imported here, because it takes longer than all else that a film needs.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    warnings.filterwarnings("ignore", "FSDP2-wrapped")  # of views changed in place: there are none
    mesh = init_device_mesh(device.type, (process()[1],))
    for block in getattr(net, "blocks", []):
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh, reshard_after_forward=True)
    for method in ("start", "predict", "commit", "loss"):
        if hasattr(net, method):
            register_fsdp_forward_method(net, method)


def read_config(pairs: list[str]) -> Config:
    """FIELD=N words -> the sizes of a new model. Raises UserError."""
    sizes, kinds = {}, {field.name: type(field.default) for field in fields(Config)}
    for pair in pairs:
        name, _, value = pair.partition("=")
        number = value.replace(".", "", 1) if kinds.get(name) is float else value
        if kinds.get(name) not in (int, float) or not number.isdecimal():
            raise UserError(f"--config {pair}: must be FIELD=N, with a field of Config")
        sizes[name] = kinds[name](value)
        if not 1e-9 <= sizes[name] < 2**20:
            raise UserError(f"--config {pair}: out of range")
    cfg = Config(**sizes)
    samples = cfg.sample_rate * cfg.step_frames / cfg.fps  # of a latent frame
    seen = (cfg.window + 1) * cfg.chunk_frames
    for wrong, why in (
        (cfg.grid**2 != cfg.tokens, "tokens must be a square number"),
        (samples % cfg.tokens, "tokens must divide the samples of a latent frame"),
        (cfg.sample_rate % cfg.fps, "sample_rate must be a multiple of fps"),
        (cfg.width % (8 * cfg.heads), "width must be a multiple of 8 heads"),
        (2 * seen > cfg.clock * cfg.fps, "clock must last twice window + 1 chunks"),
    ):
        if wrong:
            raise UserError(f"--config {' '.join(pairs)}: {why}")
    return cfg


def prepare_folder(out: Path, resume: bool, overwrite: bool, device) -> tuple:
    """Make a folder a run's own -> what resume goes on from, and a lock to keep. Raises UserError."""
    if resume and not (out / "resume.pt").exists():
        raise UserError(f"{out / 'resume.pt'}: does not exist; a run without --resume begins there")
    out.mkdir(parents=True, exist_ok=True)
    wrong, lock = None, (out / ".lock").open("a")
    if process()[0] == 0:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            wrong = "another run is at work there"
        if not resume and not overwrite and any(out.glob("*.pt")):
            wrong = "holds another run; --resume, --overwrite, or another --out"
    if any_process(wrong, device):
        raise UserError(f"{out}: {wrong or 'see the first process'}")
    content = load_file(out / "resume.pt") if resume else None  # no other run writes it now
    if content and "settings" not in content:
        raise UserError(f"{out / 'resume.pt'}: not what --resume goes on from")
    return content, lock


def commit() -> str:
    """The commit of this code, with a plus sign if files of it are changed; "" outside of git."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    here = Path(__file__).parent
    try:
        result = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return ""
    return result.stdout.strip()


def begin_log(log: Path, content: dict | None) -> None:
    """A new run begins its log; one that goes on drops what was logged after its checkpoint."""
    if content:
        os.truncate(log, min(log.stat().st_size, content["log_size"]))
    else:
        for old in [log.with_name("resume.pt"), *log.parent.glob("after-*-minutes.pt")]:
            old.unlink(missing_ok=True)
        log.write_text("")
