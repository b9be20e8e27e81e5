"""Pairs for optical flow, as the tests write them."""

import gzip

import numpy as np
import torch
from PIL import Image

from experiments.flow import files

NAMES = {
    "published": ("00002_img1.ppm", "00002_img2.ppm", "00002_flow.flo"),
    "as png": ("00002_img1.png", "00002_img2.png", "00002_flow.flo.gz"),
    "examples": ("0000002-img0.png", "0000002-img1.png", "0000002-gt.flo.gz"),
    "middlebury": ("Venus/frame10.png", "Venus/frame11.png", "Venus/flow10.flo"),
}


def flow_of(height, width, seed=0):
    return torch.randn(2, height, width, generator=torch.Generator().manual_seed(seed))


def picture(path, width=10, height=8, mode="RGB", seed=0):
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def a_pair(first, second, flow, size=(10, 8)):
    first.parent.mkdir(parents=True, exist_ok=True)
    picture(first, *size, seed=1)
    picture(second, *size, seed=2)
    content = flow_of(size[1], size[0])
    files.write_flo(flow.with_name("whole.flo"), content)
    whole = flow.with_name("whole.flo").read_bytes()
    flow.with_name("whole.flo").unlink()
    flow.write_bytes(gzip.compress(whole) if flow.suffix == ".gz" else whole)
    return content
