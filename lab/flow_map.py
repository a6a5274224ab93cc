"""DMD without a fake score, beyond the paper: an objective as a fork would add it.

`python -m lab.claims` trains an arm with it: train.main(..., extra={"flow_map": flow_map_dmd}).
"""

import torch
from torch import Tensor

import mutual_forcing as mf
from mutual_forcing import add_noise, each_latent_frame, mean_size, mean_square, warp


def flow_map_dmd(model, x: Tensor, history: Tensor, controls) -> tuple[Tensor, dict]:
    """DMD whose fake velocity is that of the few-step mode's own flow map -> (loss, logs).

    The idea of FSF-DMD (arXiv 2605.19256). x, history (B, S, E): history is the few-step
    mode's films, after one real chunk. A step moves them, noised, from t to t + d, and lands
    at x_t + d u(x_t, t, d). As d grows, so does t: the derivative of the landing point by d
    is the velocity there of the flow that the few-step mode follows. The real one is that of
    the multi-step mode.
    """
    cfg = model.cfg

    # 1. A step of the sampler's grid of 4 or 8 for each chunk, but not the last one, which
    #    lands where no noise is left.
    steps = 4 * torch.randint(1, 3, (len(x), x.shape[1] // cfg.chunk))  # 4 or 8
    index = (torch.rand(steps.shape) * (steps - 1)).floor()
    corners = [warp((index + part) / steps, cfg.shift) for part in (0, 1)]
    t, end = [each_latent_frame(corner, cfg.chunk).to(x) for corner in corners]
    d, x_t = end - t, add_noise(history, torch.randn_like(x), t)

    # 2. Where the step lands, with gradient, and both velocities there, without. bf16 is too
    #    coarse for a difference quotient.
    landed = x_t + d * model(x_t, t, d, controls, history)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        more = d + 0.002
        v_less, v_more = [model(x_t, t, size, controls, history) for size in (d, more)]
        v_fake = (more * v_more - d * v_less) / 0.002
        v_real = model(landed.float(), end, torch.zeros_like(end), controls, history)

        # 3. Move the landing point from the fake velocity toward the real one. As in
        #    dmd_loss(), all chunks and branches weigh alike.
        target = landed - (v_fake - v_real) / mean_size(cfg, v_real, cfg.chunk)
    loss, logs = mean_square("flow_map", cfg, (landed - target)[:, cfg.chunk :])  # generated
    return mf.WEIGHTS["dmd"] * 0.5 * loss, logs
