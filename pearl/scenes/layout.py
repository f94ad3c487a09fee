"""What stands where in a rendered scene: objects, supports, room, lights and camera, drawn from a seed.

Objects are placed in *picture space*: a position in the picture, a depth and an angular size are drawn
independently of each other, and a visible support (floor, pedestal, rod from the ceiling, another object)
is built to fit. So neither "lower in the picture" nor "bigger" gives the depth away, while the supports'
contact points, shadows and occlusion still allow it to be seen.

Axes: x right, y away from the camera, z up, in metres; the camera stands above the origin.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pearl.randomness import generator

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

Vector = tuple[float, float, float]

SHAPES = ("cube", "ball", "cylinder", "cone", "pyramid", "ring")
MATERIALS = ("matte", "shiny", "checkered")
COLOURS: dict[str, Vector] = {
    "red": (0.80, 0.06, 0.06),
    "orange": (0.95, 0.45, 0.03),
    "yellow": (0.95, 0.85, 0.08),
    "green": (0.08, 0.55, 0.12),
    "cyan": (0.10, 0.78, 0.80),
    "blue": (0.08, 0.15, 0.80),
    "purple": (0.42, 0.08, 0.60),
    "pink": (0.98, 0.50, 0.72),
}

HALF_EXTENTS: dict[str, tuple[float, float]] = {
    "cube": (0.80, 0.80),
    "ball": (1.00, 1.00),
    "cylinder": (0.78, 0.85),
    "cone": (0.95, 1.00),
    "pyramid": (0.90, 0.95),
    "ring": (1.00, 1.00),
}
"""Half width and half height of each shape, in units of its radius."""

NEAREST, FARTHEST = 1.6, 8.0
_SUPPORTING = ("cube", "cylinder")


@dataclass(frozen=True)
class Thing:
    """One object. `position` is its centre, `radius` its rough half extent, in metres; `yaw` in radians."""

    shape: str
    colour: str
    material: str
    rgb: Vector
    position: Vector
    radius: float
    yaw: float
    support: Literal["floor", "pedestal", "rod", "stack"]
    round_pedestal: bool = False

    @property
    def bottom(self) -> float:
        return self.position[2] - self.radius * HALF_EXTENTS[self.shape][1]

    @property
    def top(self) -> float:
        return self.position[2] + self.radius * HALF_EXTENTS[self.shape][1]


@dataclass(frozen=True)
class Camera:
    """A camera at (0, 0, `height`) metres that looks along +y; `pitch` (up is positive) and `fovy` in degrees."""

    height: float
    pitch: float
    fovy: float

    @property
    def forward(self) -> np.ndarray:
        pitch = math.radians(self.pitch)
        return np.array([0.0, math.cos(pitch), math.sin(pitch)])

    @property
    def up(self) -> np.ndarray:
        pitch = math.radians(self.pitch)
        return np.array([0.0, -math.sin(pitch), math.cos(pitch)])

    @property
    def position(self) -> np.ndarray:
        return np.array([0.0, 0.0, self.height])

    def unproject(self, x: float, y: float, depth: float) -> np.ndarray:
        """The point seen at (`x`, `y`), both in -1..1 with y up, at `depth` metres along the optical axis."""
        spread = math.tan(math.radians(self.fovy) / 2)
        right = np.array([1.0, 0.0, 0.0])
        return self.position + depth * (self.forward + spread * (x * right + y * self.up))

    def project(self, point: np.ndarray) -> tuple[float, float, float]:
        """The inverse of `unproject`: x, y, depth."""
        spread = math.tan(math.radians(self.fovy) / 2)
        offset = point - self.position
        depth = float(offset @ self.forward)
        return float(offset[0]) / (depth * spread), float(offset @ self.up) / (depth * spread), depth


@dataclass(frozen=True)
class Surface:
    """A floor, wall or ceiling: a builtin MuJoCo texture between two colours, `tile` metres per repetition."""

    pattern: Literal["flat", "checker", "gradient", "speckled"]
    rgb: Vector
    rgb2: Vector
    tile: float


@dataclass(frozen=True)
class Light:
    position: Vector
    strength: float
    shadows: bool
    attenuated: bool


@dataclass(frozen=True)
class Room:
    """Walls at ±`half_width` and at `back` metres; without `ceiling` (its height) the sky is open."""

    half_width: float
    back: float
    ceiling: float | None
    walls: bool
    floor_surface: Surface
    wall_surface: Surface
    ceiling_surface: Surface
    support_rgb: Vector
    ambient: float
    haze: float | None


@dataclass(frozen=True)
class Layout:
    things: tuple[Thing, ...]
    camera: Camera
    room: Room
    lights: tuple[Light, ...]


def scene_rng(split: Split, seed: int, index: int, purpose: str = "layout") -> np.random.Generator:
    """A counter-based generator of its own for every (split, seed, index, purpose); splits never share one."""

    return generator("pearl-scenes", split, seed, index, purpose)


def draw_layout(rng: np.random.Generator) -> Layout:
    """A random scene with 3 to 12 objects."""
    camera = _draw_camera(rng)
    room = _draw_room(rng)
    wanted = int(rng.integers(3, 13))
    palette = _draw_palette(rng)
    things: list[Thing] = []
    for _ in range(wanted * 25):
        if len(things) == wanted:
            break
        thing = _draw_thing(rng, camera, room, things, palette)
        if thing is not None:
            things.append(thing)
    if len(things) < 3:
        return draw_layout(rng)
    return Layout(tuple(things), camera, room, _draw_lights(rng, room))


def _draw_camera(rng: np.random.Generator) -> Camera:
    height = float(rng.uniform(0.4, 2.6))
    level = -12.0 * (height - 1.2)
    return Camera(height, float(np.clip(rng.normal(level, 12.0), -38.0, 24.0)), float(rng.uniform(42.0, 72.0)))


def _draw_room(rng: np.random.Generator) -> Room:
    enclosed = bool(rng.random() < 0.7)
    return Room(
        half_width=float(rng.uniform(3.0, 7.0)),
        back=FARTHEST + float(rng.uniform(0.8, 4.0)),
        ceiling=float(rng.uniform(3.2, 6.0)) if enclosed or rng.random() < 0.3 else None,
        walls=enclosed,
        floor_surface=_draw_surface(rng),
        wall_surface=_draw_surface(rng),
        ceiling_surface=_draw_surface(rng),
        support_rgb=_muted(rng, 0.25, 0.85),
        ambient=float(rng.uniform(0.25, 0.55)),
        haze=float(rng.uniform(0.7, 2.0)) if rng.random() < 0.3 else None,
    )


def _draw_surface(rng: np.random.Generator) -> Surface:
    pattern = str(rng.choice(["flat", "checker", "gradient", "speckled"], p=[0.3, 0.35, 0.15, 0.2]))
    rgb = _muted(rng, 0.25, 0.9)
    contrast = float(rng.uniform(0.55, 0.9))
    second: Vector = (rgb[0] * contrast, rgb[1] * contrast, rgb[2] * contrast)
    return Surface(pattern, rgb, second, float(rng.uniform(0.4, 2.5)))  # type: ignore[arg-type]


def _muted(rng: np.random.Generator, low: float, high: float) -> Vector:
    """A colour of low saturation, which no object has."""
    value = rng.uniform(low, high)
    tint = rng.uniform(-0.06, 0.06, size=3)
    r, g, b = np.clip(value + tint, 0.0, 1.0)
    return float(r), float(g), float(b)


def _draw_lights(rng: np.random.Generator, room: Room) -> tuple[Light, ...]:
    ceiling = room.ceiling or 6.0
    count = int(rng.integers(1, 4))
    lights = [
        Light(
            position=(
                float(rng.uniform(-0.8, 0.8) * room.half_width),
                float(rng.uniform(-1.0, room.back - 1.0)),
                float(ceiling * rng.uniform(0.75, 0.98)),
            ),
            strength=float(rng.uniform(0.45, 0.9) / count**0.5),
            shadows=index == 0,
            attenuated=bool(rng.random() < 0.3),
        )
        for index in range(count)
    ]
    if rng.random() < 0.25:
        lights.append(Light((0.2, -0.1, 1.5), float(rng.uniform(0.3, 0.6)), shadows=False, attenuated=True))
    return tuple(lights)


def _draw_palette(rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """The colours and shapes of this scene: few enough that attributes recur, so that questions have distractors."""
    colours = [str(c) for c in rng.permutation(list(COLOURS))[: rng.integers(3, 7)]]
    shapes = [str(s) for s in rng.permutation(SHAPES)[: rng.integers(2, 6)]]
    return colours, shapes


def _draw_thing(
    rng: np.random.Generator, camera: Camera, room: Room, others: list[Thing], palette: tuple[list[str], list[str]]
) -> Thing | None:
    """An object that fits the room, the picture and the objects that are there already; None when it does not."""
    colours, shapes = palette
    colour, shape, material = str(rng.choice(colours)), str(rng.choice(shapes)), str(rng.choice(MATERIALS))
    yaw = float(rng.uniform(-0.6, 0.6) if shape == "ring" else rng.uniform(0, 2 * math.pi))
    half_height = HALF_EXTENTS[shape][1]

    stackable = [t for t in others if t.shape in _SUPPORTING and t.support != "stack" and t.radius > 0.2]
    support: Literal["floor", "pedestal", "rod", "stack"]
    if stackable and rng.random() < 0.15:
        base = stackable[int(rng.integers(len(stackable)))]
        radius = base.radius * float(rng.uniform(0.45, 0.8))
        point = np.array([base.position[0], base.position[1], base.top + half_height * radius])
        support = "stack"
    else:
        depth = float(np.exp(rng.uniform(math.log(NEAREST), math.log(FARTHEST))))
        x, y = rng.uniform(-0.88, 0.88, size=2)
        point = camera.unproject(float(x), float(y), depth)
        size = float(np.exp(rng.uniform(math.log(0.035), math.log(0.13))))
        radius = float(np.clip(size * depth, 0.09, 0.55))
        bottom = point[2] - half_height * radius
        if bottom < -0.15:
            return None
        if bottom < 0.12:
            support = "floor"
            point[2] = half_height * radius
        elif room.ceiling is not None and rng.random() < 0.45:
            support = "rod"
        else:
            support = "pedestal"

    top = point[2] + half_height * radius
    if abs(point[0]) + radius > room.half_width - 0.1 or point[1] + radius > room.back - 0.2:
        return None
    if room.ceiling is not None and top > room.ceiling - 0.1:
        return None
    if not _fits(camera, point, radius, others):
        return None
    jitter = rng.uniform(-0.04, 0.04, size=3)
    r, g, b = np.clip(np.array(COLOURS[colour]) + jitter, 0.0, 1.0)
    return Thing(
        shape=shape,
        colour=colour,
        material=material,
        rgb=(float(r), float(g), float(b)),
        position=(float(point[0]), float(point[1]), float(point[2])),
        radius=radius,
        yaw=yaw,
        support=support,
        round_pedestal=bool(rng.random() < 0.5),
    )


def _fits(camera: Camera, point: np.ndarray, radius: float, others: list[Thing]) -> bool:
    """In the picture, not inside another object or on its pedestal, and not in front of or behind another's middle."""
    spread = math.tan(math.radians(camera.fovy) / 2)
    x, y, depth = camera.project(point)
    apparent = radius / (depth * spread)
    if depth < 1.2 or max(abs(x), abs(y)) + 0.9 * apparent > 1.0:
        return False
    for other in others:
        centre = np.array(other.position)
        stacked = float(np.hypot(*(point[:2] - centre[:2]))) < 1e-6
        if not stacked and float(np.hypot(*(point[:2] - centre[:2]))) < 1.3 * (radius + other.radius):
            return False
        ox, oy, other_depth = camera.project(centre)
        other_apparent = other.radius / (other_depth * spread)
        if math.hypot(x - ox, y - oy) < 0.75 * (apparent + other_apparent):
            return False
    return True
