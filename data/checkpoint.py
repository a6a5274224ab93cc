"""Checkpoints: a model and its codecs in one file, a dict of tensors and plain types, followed by
its SHA-256."""

import hashlib
import io
import pickle
from dataclasses import asdict, replace
from pathlib import Path

import torch

from data.codecs import Codecs
from mutual_forcing import AudioVideoTransformer, Config, UserError

FORMAT = "mutual-forcing-5"


class CheckpointError(UserError):
    """A checkpoint cannot be used; the message says why, in one line."""


def replace_file(path, data: bytes) -> None:
    """Write a file so that path holds the old bytes or the new ones, never a half."""
    part = Path(f"{path}.unfinished")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def save_file(path, content: dict) -> None:
    """Write a dict of tensors and plain types, with its checksum."""
    buffer = io.BytesIO()
    torch.save(content | {"format": FORMAT}, buffer)
    data = buffer.getvalue()
    replace_file(path, data + hashlib.sha256(data).digest())


def load_file(path) -> dict:
    """Read what save_file() wrote; runs no code from it. Raises CheckpointError."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    if hashlib.sha256(data[:-32]).digest() != data[-32:]:
        raise CheckpointError(f"{path}: not a checkpoint of this project, or a damaged one")
    try:
        content = torch.load(io.BytesIO(data[:-32]), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: not a checkpoint of this project") from error
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of this version ({FORMAT})")
    return content


def in_half_precision(module: torch.nn.Module) -> dict:
    """A module's state; its integers, if it has any, stay as they are."""
    state = module.state_dict()
    return {name: x.half() if x.is_floating_point() else x for name, x in state.items()}


def save_checkpoint(path, model: AudioVideoTransformer, codecs: Codecs, extra: dict | None = None):
    """Store a model's config, its and its codecs' weights in half precision, and extra plain values.

    Raises CheckpointError, and writes nothing, for weights that are not finite in half
    precision.
    """
    content = {"config": asdict(model.cfg), "extra": extra or {}}
    for name, module in (("model", model), ("codecs", codecs)):
        content[name] = in_half_precision(module)
        for key, x in content[name].items():
            if not x.isfinite().all():
                raise CheckpointError(f"{key} is not finite in half precision; {path} not written")
    save_file(path, content)


def load_checkpoint(path, make_codecs) -> tuple[AudioVideoTransformer, Codecs, dict]:
    """(model and codecs, in fp32 on the CPU, ready for sampling; extra). Raises CheckpointError.

    make_codecs(cfg) -> Codecs: data.codecs.make_codecs, or a fork's.
    """
    content = load_file(path)
    try:
        cfg = Config(**content["config"])
    except (KeyError, TypeError, UserError) as error:
        raise CheckpointError(f"{path}: its sizes are not this version's: {error}") from error
    model, codecs = AudioVideoTransformer(cfg), make_codecs(cfg)
    for name, module in (("model", model), ("codecs", codecs)):
        try:
            module.load_state_dict(content[name])
        except (KeyError, TypeError, RuntimeError) as error:
            reason = str(error).split("\n\t")[-1]
            raise CheckpointError(f"{path}: does not fit the {name}: {reason}") from error
        module.eval().requires_grad_(False)
    return model, codecs, content["extra"]


def makes_films(extra: dict) -> bool:
    """Whether a checkpoint with this extra content can stream: from stage 2 on, if it is causal."""
    return extra.get("stage") not in ("codec", "unimodal") and not extra.get("whole")


def same_format(cfg: Config, other: Config) -> bool:
    """Whether models of both sizes make films of one format, from the same controls."""
    free = {name: getattr(cfg, name) for name in ("width", "layers", "heads", "window")}
    return replace(other, **free) == cfg
