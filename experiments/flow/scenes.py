"""Scenes of moving shapes, drawn at any point, with the flow between their two pictures.

In the manner of Flying Chairs (Dosovitskiy et al., ICCV 2015): a moving photograph is the
background; over it move chairs, rings and other shapes cut from other photographs. Every motion is
affine, so that the flow is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn.functional import avg_pool2d, grid_sample

Array = np.ndarray[Any, Any]

FEWEST, MOST = 6, 14  # shapes of a scene
# Of a width of 512 pixels; the shapes of another are as large a part of it, and move as far.
WIDTH = 512


# --- a scene and its pictures ----------------------------------------------------------------


class Texture(Protocol):
    def at(self, points: Array) -> Array:
        """Colours [3, N], 0 to 1, at the points [2, N] of the first picture."""
        ...


@dataclass(frozen=True)
class Crop:
    """A photograph, mirrored at its borders without end.

    Args:
        pixels: [C, H, W], float32, of one channel or three.
        frame: [2, 3], from the first picture's pixels to the photograph's.
        base, gain: [3]; a colour is base + gain x the photograph's.
    """

    pixels: torch.Tensor
    frame: Array
    base: Array
    gain: Array

    def at(self, points: Array) -> Array:
        height, width = self.pixels.shape[1:]
        places = moved(self.frame, points) * 2 / np.array([[width - 1], [height - 1]]) - 1
        grid = torch.from_numpy(places.T.astype(np.float32))[None, None]
        seen = grid_sample(self.pixels[None], grid, "bicubic", "reflection", align_corners=True)
        colours: Array = self.base[:, None] + self.gain[:, None] * seen[0, :, 0].numpy()
        return colours.clip(0, 1)


@dataclass(frozen=True)
class Part:
    """A polygon, all of which its centre sees; or a hole of that form in the parts before it.

    Args:
        centre: [2], in pixels of the first picture.
        corners: [2, K], from the centre.
    """

    centre: Array
    corners: Array
    hole: bool = False

    def placed(self, frame: Array) -> Part:
        corners = frame[:, :2] @ self.corners
        return Part(moved(frame, self.centre[:, None])[:, 0], corners, self.hole)

    def distance(self, points: Array) -> Array:
        """How far the points [2, N] are outside, [N] pixels; below 0 inside.

        By the line of the edge that the centre sees a point through: exact beside an edge.
        """
        angles = np.arctan2(self.corners[1], self.corners[0])
        order = angles.argsort()
        start = self.corners[:, order]
        along = np.roll(start, -1, 1) - start
        normal = np.stack([along[1], -along[0]]) / np.hypot(*along).clip(1e-9)
        x, y = points - self.centre[:, None]
        edge = np.searchsorted(angles[order], np.arctan2(y, x), "right") - 1
        reach = (normal * start).sum(0)
        out: Array = normal[0, edge] * x + normal[1, edge] * y - reach[edge]
        return out


@dataclass(frozen=True)
class Layer:
    """A texture, the parts that it shows in (all of the picture where none), and its motion [2, 3].

    The motion takes the first picture's pixels to the second's.
    """

    texture: Texture
    parts: tuple[Part, ...]
    motion: Array

    def source(self, points: Array, picture: int) -> Array:
        """Where points of the picture, 1 or 2, are in the first."""
        return points if picture == 1 else moved(inverse(self.motion), points)

    def cover(self, points: Array, picture: int) -> Array:
        """How much of a pixel around each of the points [2, N] is covered: [N], 0 to 1."""
        if not self.parts:
            return np.ones(points.shape[1])
        out = np.zeros(points.shape[1])
        places = self.source(points, picture)
        corners = np.concatenate([p.centre[:, None] + p.corners for p in self.parts], 1)
        low, high = corners.min(1) - 1, corners.max(1) + 1
        near = np.flatnonzero(
            (places[0] > low[0])
            & (places[0] < high[0])
            & (places[1] > low[1])
            & (places[1] < high[1])
        )
        if not len(near):
            return out
        scale = 1.0 if picture == 1 else math.sqrt(abs(np.linalg.det(self.motion[:, :2])))
        covered = np.zeros(len(near))
        for piece in self.parts:
            inside = (0.5 - scale * piece.distance(places[:, near])).clip(0, 1)
            covered = np.minimum(covered, 1 - inside) if piece.hole else covered.clip(inside)
        out[near] = covered
        return out


@dataclass(frozen=True)
class Scene:
    """Layers from the background, which covers everything, to the top."""

    layers: tuple[Layer, ...]

    def covers(self, points: Array, picture: int) -> Array:
        """How much each layer alone would cover at the points [2, N]: [layers, N]."""
        return np.stack([layer.cover(points, picture) for layer in self.layers])

    def render(self, points: Array, picture: int, covers: Array | None = None) -> Array:
        """The colours [3, N], 0 to 1, that the picture (1 or 2) has at the points [2, N]."""
        covers = self.covers(points, picture) if covers is None else covers
        out = np.zeros((3, points.shape[1]))
        for layer, cover in zip(self.layers, covers, strict=True):
            seen = np.flatnonzero(cover)
            colours = layer.texture.at(layer.source(points[:, seen], picture))
            out[:, seen] += cover[seen] * (colours - out[:, seen])
        return out

    def flow(self, points: Array, covers: Array) -> Array:
        """The motion [2, N] of the top layer that covers more than half at each point [2, N]."""
        top = top_layer(covers)
        out = np.empty_like(points)
        for i, layer in enumerate(self.layers):
            here = top == i
            out[:, here] = moved(layer.motion, points[:, here]) - points[:, here]
        return out

    def pair(self, size: tuple[int, int]) -> tuple[Array, Array, Array]:
        """Both pictures [H, W, 3], uint8, and the flow [2, H, W], float32, of (width, height)."""
        points, (width, height) = pixels(size), size
        covers = self.covers(points, 1)
        first, second = self.render(points, 1, covers), self.render(points, 2)
        shown = [
            (255 * colours + 0.5).astype(np.uint8).T.reshape(height, width, 3)
            for colours in (first, second)
        ]
        flow = self.flow(points, covers).astype(np.float32).reshape(2, height, width)
        return shown[0], shown[1], flow


def top_layer(covers: Array) -> Array:
    """The last of the layers [layers, N] that covers more than half, [N]."""
    out: Array = len(covers) - 1 - (covers[::-1] > 0.5).argmax(0)
    return out


def pixels(size: tuple[int, int]) -> Array:
    """The centres [2, N] of the pixels, row by row; the first is at (0, 0)."""
    width, height = size
    y, x = np.mgrid[:height, :width].reshape(2, -1).astype(np.float64)
    return np.stack([x, y])


def moved(frame: Array, points: Array) -> Array:
    """The points [2, N] by the affine map [2, 3]."""
    out: Array = frame[:, :2] @ points + frame[:, 2:]
    return out


def inverse(frame: Array) -> Array:
    back = np.linalg.inv(frame[:, :2])
    return np.concatenate([back, -back @ frame[:, 2:]], 1)


def after(second: Array, first: Array) -> Array:
    """The affine map that does `first`, then `second`."""
    return np.concatenate([second[:, :2] @ first[:, :2], moved(second, first[:, 2:])], 1)


def about(centre: Array, linear: Array, shift: Array) -> Array:
    """The affine map that is `linear` around the centre [2], then moves by `shift` [2]."""
    return np.concatenate([linear, (centre + shift - linear @ centre)[:, None]], 1)


def turn(angle: float) -> Array:
    """The rotation by the angle, in radians."""
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


# --- what a scene is drawn from --------------------------------------------------------------


class Album:
    """Photographs ready to be sampled, halved until a step from sample to sample is below 1."""

    def __init__(self, photographs: Sequence[Array]) -> None:
        for i, photograph in enumerate(photographs):
            gray_or_colour = photograph.ndim == 2 or photograph.shape[2:] == (3,)
            if photograph.dtype != np.uint8 or not gray_or_colour or min(photograph.shape[:2]) < 16:
                raise ValueError(
                    "photographs must be uint8 [H, W] or [H, W, 3] with sides of at least 16 (got "
                    f"{photograph.dtype} {list(photograph.shape)} at {i})"
                )
        if not photographs:
            raise ValueError("photographs must be one at least (got none)")
        self.photographs = list(photographs)
        self._ready: dict[tuple[int, int], torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.photographs)

    def ready(self, i: int, halvings: int) -> torch.Tensor:
        """[C, H, W], float32 of 0 to 1."""
        if (i, halvings) not in self._ready:
            if halvings:
                made = avg_pool2d(self.ready(i, halvings - 1), 2)
            else:
                photograph = np.atleast_3d(self.photographs[i]).transpose(2, 0, 1)
                made = torch.from_numpy(photograph.astype(np.float32) / 255)
            self._ready[i, halvings] = made
        return self._ready[i, halvings]


def scene(album: Album, size: tuple[int, int], seed: int, index: int) -> Scene:
    """The scene of that index, the same whichever others are made."""
    rng = np.random.default_rng([seed, index])
    ground = background(rng, album, size)
    count = rng.integers(FEWEST, MOST + 1)
    shapes = [shape(rng, album, size, ground.motion) for _ in range(count)]
    return Scene((ground, *shapes))


def background(rng: np.random.Generator, album: Album, size: tuple[int, int]) -> Layer:
    i, extent = int(rng.integers(len(album))), np.array(size) - 1.0
    height, width = album.photographs[i].shape[:2]
    whole = min((width - 1) / extent[0], (height - 1) / extent[1])
    # Twice as large as life is as blurred as it gets; a small photograph is mirrored instead.
    step = max(whole * rng.uniform(0.7, 1), 0.5)
    spare = np.array([width, height]) - 1 - step * extent
    corner = spare * rng.random(2)
    frame = np.concatenate([step * np.eye(2), corner[:, None]], 1)
    if rng.random() < 0.5:
        frame = after(frame, np.array([[-1, 0, extent[0]], [0, 1, 0]]))
    gain = rng.uniform(0.9, 1.1) * rng.uniform(0.8, 1.1, 3)
    texture = crop(album, i, frame, np.zeros(3), gain)
    motion = drawn_motion(rng, extent / 2, size[0], longest=40, turned=10, grown=0.07, often=0.3)
    return Layer(texture, (), motion)


def shape(rng: np.random.Generator, album: Album, size: tuple[int, int], ground: Array) -> Layer:
    """A shape that moves against the background's motion."""
    extent = np.array(size) - 1.0
    centre = extent * rng.uniform(-0.05, 1.05, 2)
    half = size[0] * math.exp(rng.uniform(math.log(0.04), math.log(0.22)))
    parts, upright = outline(rng, 1.5 / half)
    if upright:
        linear = turn(rng.normal(0, 0.2)) @ np.diag([half * rng.uniform(0.5, 0.9), half])
    else:
        stretch = rng.uniform(3, 9) if rng.random() < 0.3 else rng.uniform(1, 2)
        linear = turn(rng.uniform(-math.pi, math.pi)) @ np.diag([half, max(half / stretch, 1.5)])
    placed = tuple(part.placed(about(np.zeros(2), linear, centre)) for part in parts)
    own = drawn_motion(rng, centre, size[0], longest=120, turned=30, grown=0.2, often=0.7)
    return Layer(surface(rng, album, centre), placed, after(ground, own))


def surface(rng: np.random.Generator, album: Album, centre: Array) -> Crop:
    """From a part of a photograph to nearly a plain colour; some are dark, as many chairs are."""
    i = int(rng.integers(len(album)))
    photograph = album.photographs[i]
    target = rng.random(2) * np.array([photograph.shape[1] - 1, photograph.shape[0] - 1])
    linear = turn(rng.uniform(-math.pi, math.pi)) * rng.uniform(0.5, 1.5)
    frame = about(centre, linear, target - centre)
    colour = rng.uniform(0.15, 1.3, 3) * (0.25 if rng.random() < 0.25 else 1)
    colour += rng.random() * (colour.mean() - colour)  # from as drawn to gray
    contrast = rng.uniform(0.3, 1)
    return crop(album, i, frame, colour * (1 - contrast) / 2, colour * contrast)


def crop(album: Album, i: int, frame: Array, base: Array, gain: Array) -> Crop:
    step = math.sqrt(abs(np.linalg.det(frame[:, :2])))
    halvings = max(0, math.ceil(math.log2(step) - 0.25))
    # The centre of the first halved pixel is at 0.5 of the photograph's own.
    smaller = np.array([[1, 0, 0.5], [0, 1, 0.5]]) / 2**halvings - np.array([[0, 0, 0.5]])
    return Crop(album.ready(i, halvings), after(smaller, frame), base, gain)


def drawn_motion(
    rng: np.random.Generator,
    centre: Array,
    width: int,
    longest: float,
    turned: float,
    grown: float,
    often: float,
) -> Array:
    """An affine motion about a centre: most are small, few are large.

    Args:
        rng: draws it.
        centre: [2], in pixels.
        width: of the picture.
        longest: that it moves either way, in pixels of a width of 512.
        turned: the largest rotation, in degrees.
        grown: the largest change of scale.
        often: the share of motions that turn, and of those that change the scale.
    """
    shift = heavy(rng, 2, 4).clip(-longest, longest) * width / WIDTH
    angle = heavy(rng, 1, 2)[0].clip(-1, 1) if rng.random() < often else 0
    scale = heavy(rng, 1, 2)[0].clip(-1, 1) if rng.random() < often else 0
    linear = turn(math.radians(turned * 0.4 * angle)) * (1 + grown * 0.4 * scale)
    return about(centre, linear, shift)


def heavy(rng: np.random.Generator, count: int, power: int) -> Array:
    """Powers of a normal's absolute value, with its sign: most near 0, some far off."""
    drawn = rng.normal(0, 1.2, count)
    return np.sign(drawn) * abs(drawn) ** power


# --- outlines, of about 1 around 0 -----------------------------------------------------------


def outline(rng: np.random.Generator, thin: float) -> tuple[list[Part], bool]:
    """The parts of a shape, and whether it stands upright; `thin` is the thinnest bar's width."""
    kind = rng.choice(["chair", "smooth", "corners", "ring"], p=[0.5, 0.2, 0.15, 0.15])
    if kind == "chair":
        return chair(rng, thin), True
    whole = smooth(rng) if kind == "smooth" or rng.random() < 0.5 else cornered(rng)
    if kind != "ring":
        return [whole], False
    return [whole, Part(whole.centre, whole.corners * rng.uniform(0.55, 0.85), hole=True)], False


def smooth(rng: np.random.Generator) -> Part:
    """The radius is a Fourier series of the angle."""
    angles, waves = np.linspace(-math.pi, math.pi, 48, endpoint=False), np.arange(1, 7)
    sizes, phases = rng.normal(0, 0.3, 6) / waves, rng.uniform(0, 2 * math.pi, 6)
    radius = 1 + (sizes[:, None] * np.cos(waves[:, None] * angles + phases[:, None])).sum(0)
    return around(angles, radius.clip(0.2))


def cornered(rng: np.random.Generator) -> Part:
    count = int(rng.integers(3, 9))
    angles = (np.arange(count) + rng.uniform(-0.3, 0.3, count)) * 2 * math.pi / count - math.pi
    return around(angles, rng.uniform(0.4, 1, count))


def around(angles: Array, radius: Array) -> Part:
    radius = radius / radius.max()
    return Part(np.zeros(2), radius * np.stack([np.cos(angles), np.sin(angles)]))


def chair(rng: np.random.Generator, thin: float) -> list[Part]:
    """A back, often with bars, a seat and legs; seen a little from the side. y points down."""
    lean, seat = rng.uniform(-0.25, 0.25), rng.uniform(0, 0.25)
    wide, deep = rng.uniform(0.6, 0.9), rng.uniform(0.08, 0.22)
    leg = max(rng.uniform(0.03, 0.12), thin)
    left, right = np.array([-wide, seat]), np.array([wide, seat])
    top = rng.uniform(-1, -0.6)
    upper = [np.array([-wide + lean, top]), np.array([wide + lean, top])]
    # Parts overlap: where two only touch, each covers half a pixel and the background shows.
    slant = np.array([-lean, deep])
    parts = [quad(upper[0], upper[1], right + slant, left + slant)]
    if rng.random() < 0.6:
        inner = rng.uniform(0.6, 0.85)
        parts.append(Part(parts[0].centre, parts[0].corners * inner, hole=True))
        for way in np.linspace(0.2, 0.8, rng.integers(0, 4)):
            start, end = upper[0] + way * (upper[1] - upper[0]), left + way * (right - left)
            parts.append(bar(start, end, leg))
    parts.append(quad(left, right, right + 2 * slant, left + 2 * slant))
    for start in (left, right, left + slant, right + slant):
        foot = np.array([start[0] * rng.uniform(0.9, 1.15), rng.uniform(0.85, 1)])
        parts.append(bar(start, foot, leg))
    return parts


def quad(*corners: Array) -> Part:
    stacked = np.stack(corners, 1)
    centre = stacked.mean(1)
    return Part(centre, stacked - centre[:, None])


def bar(start: Array, end: Array, width: float) -> Part:
    along = end - start
    side = np.array([-along[1], along[0]]) * width / 2 / max(float(np.hypot(*along)), 1e-9)
    return quad(start - side, end - side, end + side, start + side)
