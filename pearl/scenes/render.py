"""Renders a layout with MuJoCo: picture, metric depth, object masks, and the exact table of what can be seen."""

from __future__ import annotations

import math
import os
import sys
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from pearl.errors import PearlError
from pearl.records import Box
from pearl.scenes.layout import HALF_EXTENTS, Layout, Surface, Thing

NEAR_PLANE, FAR_PLANE = 0.1, 100.0
PEDESTAL_RADIUS, ROD_RADIUS = 0.13, 0.025
"""All supports have one thickness, in metres: how thick they look tells how far they are, whatever the object's size."""


class RendererUnavailable(PearlError, RuntimeError):
    """MuJoCo or an OpenGL driver is missing."""


@dataclass(frozen=True)
class SeenThing:
    """What the picture shows of one object.

    `box` is exact (0..1, from the mask), `pixels` counts its visible pixels, `visible` is their share of the
    pixels that it would have alone, `depth` is the median over the visible ones, in metres.
    """

    thing: Thing
    box: Box
    pixels: int
    visible: float
    depth: float


@dataclass(frozen=True)
class Scene:
    """A rendered layout.

    `image` is uint8 (H, W, 3), `depth` float32 (H, W) in metres along the optical axis (inf where there is sky),
    `mask` int16 (H, W): the index of the object seen at each pixel in `layout.things`, or -1.
    `seen` lists the objects with at least one visible pixel, in the layout's order.
    """

    layout: Layout
    image: np.ndarray
    depth: np.ndarray
    mask: np.ndarray
    seen: tuple[SeenThing, ...]


def render(layout: Layout, size: int = 384) -> Scene:
    """Renders `layout` as a square picture of `size` pixels. The same layout gives the same bytes.

    Raises:
        RendererUnavailable: with the command that brings what is missing.
    """
    mujoco = _mujoco()
    model = mujoco.MjModel.from_xml_string(ET.tostring(_world(layout, size), encoding="unicode"))
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)

    context = _gl_context(size)
    context.make_current()
    renderer = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_50.value)
    try:
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, renderer)
        renderer.readDepthMap = mujoco.mjtDepthMap.mjDEPTH_ZEROFAR
        view = mujoco.MjvScene(model, maxgeom=256)
        camera = mujoco.MjvCamera()
        camera.type, camera.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, 0
        category = mujoco.mjtCatBit.mjCAT_ALL.value
        mujoco.mjv_updateScene(model, data, mujoco.MjvOption(), None, camera, category, view)
        view.flags[mujoco.mjtRndFlag.mjRND_FOG] = layout.room.haze is not None
        view.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
        image, _ = _read(mujoco, renderer, view, size)
        view.flags[mujoco.mjtRndFlag.mjRND_SEGMENT] = view.flags[mujoco.mjtRndFlag.mjRND_IDCOLOR] = True
        codes, depth_buffer = _read(mujoco, renderer, view, size)
        geoms = {g.segid + 1: g.objid for g in view.geoms[: view.ngeom] if g.segid >= 0}
    finally:
        renderer.free()

    names = {model.geom(i).id: model.geom(i).name for i in range(model.ngeom)}
    lookup = np.full(256, -1, dtype=np.int16)
    for code, geom in geoms.items():
        if names[geom].startswith("thing-"):
            lookup[code] = int(names[geom].removeprefix("thing-"))
    mask = lookup[codes[..., 0]]
    depth = _metres(depth_buffer)
    depth[codes[..., 0] == 0] = np.inf
    return Scene(layout, image, depth, mask, _table(layout, mask, depth))


def _table(layout: Layout, mask: np.ndarray, depth: np.ndarray) -> tuple[SeenThing, ...]:
    size = mask.shape[0]
    seen = []
    for index, thing in enumerate(layout.things):
        rows, columns = np.nonzero(mask == index)
        if not rows.size:
            continue
        box: Box = (
            float(columns.min() / size),
            float(rows.min() / size),
            float((columns.max() + 1) / size),
            float((rows.max() + 1) / size),
        )
        alone = _pixels_alone(layout, thing, size)
        share = min(1.0, rows.size / alone)
        seen.append(SeenThing(thing, box, int(rows.size), share, float(np.median(depth[rows, columns]))))
    return tuple(seen)


_FILL = {"cube": 3.0, "ball": math.pi, "cylinder": 2.75, "cone": 2.0, "pyramid": 1.9, "ring": 1.9}
"""Least area of each shape's silhouette in units of radius², over the ways that the layouts turn it."""


def _pixels_alone(layout: Layout, thing: Thing, size: int) -> float:
    _, _, depth = layout.camera.project(np.array(thing.position))
    pixels_per_metre = size / (2 * depth * math.tan(math.radians(layout.camera.fovy) / 2))
    return _FILL[thing.shape] * (thing.radius * pixels_per_metre) ** 2


def _read(mujoco: Any, renderer: Any, view: Any, size: int) -> tuple[np.ndarray, np.ndarray]:
    rectangle = mujoco.MjrRect(0, 0, size, size)
    mujoco.mjr_render(rectangle, view, renderer)
    image = np.empty((size, size, 3), np.uint8)
    depth = np.empty((size, size), np.float32)
    mujoco.mjr_readPixels(image, depth, rectangle, renderer)
    return np.flipud(image).copy(), np.flipud(depth).copy()


def _metres(depth_buffer: np.ndarray) -> np.ndarray:
    """Inverts the reversed-z perspective: 1 is the near plane, 0 the far plane."""
    inverse = 1 / FAR_PLANE + depth_buffer.astype(np.float64) * (1 / NEAR_PLANE - 1 / FAR_PLANE)
    return (1 / inverse).astype(np.float32)


@lru_cache(maxsize=1)
def _mujoco() -> Any:
    if "MUJOCO_GL" not in os.environ and sys.platform == "linux":
        os.environ["MUJOCO_GL"] = "egl"
    os.environ.setdefault("LP_NUM_THREADS", "0")
    try:
        import mujoco
    except ImportError as error:
        raise RendererUnavailable(
            "rendered scenes need MuJoCo: pip install -e '.[scenes]', or mujoco"
            f" (and on Linux the packages libegl1 and libgl1-mesa-dri): {error}"
        ) from error
    return mujoco


@lru_cache(maxsize=4)
def _gl_context(size: int) -> Any:
    try:
        return _mujoco().GLContext(size, size)
    except Exception as error:
        raise RendererUnavailable(
            f"no OpenGL context for rendering scenes ({type(error).__name__}: {error}); on Debian and Ubuntu:"
            " apt-get install libegl1 libgl1-mesa-dri (or set MUJOCO_GL=osmesa with libosmesa6)"
        ) from error


def _world(layout: Layout, size: int) -> ET.Element:
    """The layout as an MJCF document."""
    root = ET.Element("mujoco")
    room, camera = layout.room, layout.camera
    _tag(root, "statistic", extent=1, center=(0, 4, 1))
    visual = _tag(root, "visual")
    _tag(visual, "global", offwidth=size, offheight=size)
    _tag(visual, "quality", shadowsize=1024, offsamples=4)
    _tag(visual, "headlight", ambient=(room.ambient,) * 3, diffuse=(0.15,) * 3, specular=(0.0,) * 3)
    haze = room.haze or 1.0
    _tag(visual, "map", znear=NEAR_PLANE, zfar=FAR_PLANE, fogstart=1.0, fogend=room.back * 1.6 * haze, shadowclip=8)
    _tag(visual, "rgba", fog=(*_sky(room.support_rgb), 1), haze=(*_sky(room.support_rgb), 1))

    assets = _tag(root, "asset")
    _tag(
        assets, "texture", type="skybox", builtin="gradient", rgb1=_sky(room.support_rgb), rgb2=(0.25, 0.3, 0.4),
        width=64, height=64,
    )  # fmt: skip
    world = _tag(root, "worldbody")
    _tag(world, "camera", pos=camera.position, xyaxes=(1, 0, 0, *camera.up), fovy=camera.fovy)
    for light in layout.lights:
        _tag(
            world, "light", pos=light.position, dir=(0, 0.3, -1) if light.shadows else (0, 1, -0.6),
            diffuse=(light.strength,) * 3, specular=(0.3,) * 3, castshadow=str(light.shadows).lower(),
            cutoff=80, exponent=1, attenuation=(0.4, 0.12, 0.05) if light.attenuated else (1, 0, 0),
        )  # fmt: skip
    _add_room(assets, world, layout)
    for index, thing in enumerate(layout.things):
        _add_thing(assets, world, thing, index)
        _add_support(world, thing, layout)
    return root


def _sky(rgb: tuple[float, float, float]) -> tuple[float, ...]:
    return tuple(0.5 + 0.5 * c for c in rgb)


def _add_room(assets: ET.Element, world: ET.Element, layout: Layout) -> None:
    room = layout.room
    width, back = room.half_width, room.back
    height = room.ceiling or 4.0
    middle = (back - 3) / 2
    long, thick = (back + 3) / 2, 0.05

    def slab(name: str, surface: Surface, pos: tuple[float, ...], size: tuple[float, ...]) -> None:
        _add_surface(assets, name, surface)
        _tag(world, "geom", type="box", name=name, pos=pos, size=size, material=name)

    open_floor = 40.0
    if room.walls:
        slab("floor", room.floor_surface, (0, middle, -thick), (width, long, thick))
        slab("back", room.wall_surface, (0, back + thick, height / 2), (width, thick, height / 2))
        for side, sign in (("left", -1), ("right", 1)):
            slab(side, room.wall_surface, (sign * (width + thick), middle, height / 2), (thick, long, height / 2))
    else:
        slab("floor", room.floor_surface, (0, open_floor / 2, -thick), (open_floor, open_floor, thick))
    if room.ceiling is not None:
        slab("ceiling", room.ceiling_surface, (0, middle, height + thick), (width, long, thick))


def _add_surface(assets: ET.Element, name: str, surface: Surface) -> None:
    builtin = {"speckled": "flat"}.get(surface.pattern, surface.pattern)
    marks = {"mark": "random", "random": 0.05, "markrgb": surface.rgb2} if surface.pattern == "speckled" else {}
    _tag(
        assets, "texture", name=name, type="2d", builtin=builtin, rgb1=surface.rgb, rgb2=surface.rgb2,
        width=128, height=128, **marks,
    )  # fmt: skip
    _tag(
        assets, "material", name=name, texture=name, texuniform="true", texrepeat=(1 / surface.tile,) * 2,
        specular=0.1, shininess=0.1,
    )  # fmt: skip


def _add_thing(assets: ET.Element, world: ET.Element, thing: Thing, index: int) -> None:
    name = f"thing-{index}"
    gloss = {"matte": (0.05, 0.05), "shiny": (1.0, 0.9), "checkered": (0.2, 0.3)}[thing.material]
    if thing.material == "checkered":
        dark = tuple(0.25 * c for c in thing.rgb)
        _tag(assets, "texture", name=name, type="cube", builtin="checker", rgb1=thing.rgb, rgb2=dark, width=64)
        _tag(assets, "material", name=name, texture=name, texrepeat=(1, 1), specular=gloss[0], shininess=gloss[1])
    else:
        _tag(assets, "material", name=name, rgba=(*thing.rgb, 1), specular=gloss[0], shininess=gloss[1])

    width, height = (thing.radius * extent for extent in HALF_EXTENTS[thing.shape])
    turn = (math.cos(thing.yaw / 2), 0, 0, math.sin(thing.yaw / 2))
    common: dict[str, Any] = {"name": name, "pos": thing.position, "quat": turn, "material": name}
    if thing.shape == "cube":
        _tag(world, "geom", type="box", size=(width, width, height), **common)
    elif thing.shape == "ball":
        _tag(world, "geom", type="sphere", size=(thing.radius,), **common)
    elif thing.shape == "cylinder":
        _tag(world, "geom", type="cylinder", size=(width, height), **common)
    else:
        vertices, faces = _mesh(thing.shape)
        _tag(
            assets, "mesh", name=name, vertex=(vertices * [width, width, height]).ravel(), face=faces.ravel(),
            inertia="shell",
        )  # fmt: skip
        _tag(world, "geom", type="mesh", mesh=name, **common)


@lru_cache(maxsize=8)
def _mesh(shape: str) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (V, 3) within -1..1 and triangles (F, 3) of a cone, a pyramid, or an upright ring."""
    if shape in ("cone", "pyramid"):
        sides = 32 if shape == "cone" else 4
        angles = np.arange(sides) * 2 * np.pi / sides
        reach = 1.0 if shape == "cone" else math.sqrt(2)
        base = np.stack([reach * np.cos(angles), reach * np.sin(angles), -np.ones(sides)], axis=1)
        vertices = np.concatenate([base, [[0, 0, 1], [0, 0, -1]]])
        following = (np.arange(sides) + 1) % sides
        apex, centre = np.full(sides, sides), np.full(sides, sides + 1)
        mantle = np.stack([np.arange(sides), following, apex], axis=1)
        return vertices, np.concatenate([mantle, np.stack([following, np.arange(sides), centre], axis=1)])
    around, across = 32, 14
    major, minor = 0.72, 0.28
    u, v = np.meshgrid(np.arange(around) * 2 * np.pi / around, np.arange(across) * 2 * np.pi / across, indexing="ij")
    distance = major + minor * np.cos(v)
    vertices = np.stack([distance * np.cos(u), minor * np.sin(v), distance * np.sin(u)], axis=-1).reshape(-1, 3)
    i, j = np.meshgrid(np.arange(around), np.arange(across), indexing="ij")

    def corner(di: int, dj: int) -> np.ndarray:
        return np.asarray(((i + di) % around * across + (j + dj) % across).ravel())

    faces = [[corner(0, 0), corner(0, 1), corner(1, 0)], [corner(1, 0), corner(0, 1), corner(1, 1)]]
    return vertices, np.concatenate([np.stack(f, axis=1) for f in faces])


def _add_support(world: ET.Element, thing: Thing, layout: Layout) -> None:
    x, y, _ = thing.position
    rgba = (*layout.room.support_rgb, 1)
    if thing.support == "pedestal":
        half, reach = thing.bottom / 2, PEDESTAL_RADIUS
        kind, size = ("cylinder", (reach, half)) if thing.round_pedestal else ("box", (reach, reach, half))
        _tag(world, "geom", type=kind, pos=(x, y, half), size=size, rgba=rgba)
    elif thing.support == "rod" and layout.room.ceiling is not None:
        low = thing.position[2]
        half = (layout.room.ceiling - low) / 2
        _tag(world, "geom", type="cylinder", pos=(x, y, low + half), size=(ROD_RADIUS, half), rgba=rgba)


def _tag(parent: ET.Element, tag: str, /, **attributes: Any) -> ET.Element:
    def text(value: Any) -> str:
        if isinstance(value, str):
            return value
        if np.ndim(value):
            return " ".join(f"{v:g}" if isinstance(v, int | np.integer) else f"{float(v):.6g}" for v in value)
        return f"{value:g}"

    return ET.SubElement(parent, tag, {key: text(value) for key, value in attributes.items()})
