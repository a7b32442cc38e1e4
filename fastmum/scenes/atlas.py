"""All textures of a scene, lit, in one array with mip levels, and sampling from it.

Shapes: F = 6 S faces (numbered solid * 6 + side), L mip levels, N samples. texels_T uint32 (RGBX bytes, display
space); offset_LF int64 is a level's first texel, height_LF and width_LF float32 its size; texel_F metres per texel.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image

from fastmum.scenes.layout import Scene
from fastmum.scenes.light import Illumination, face_nodes
from fastmum.scenes.shapes import CYLINDER, SHELL, SIDES, SPHERE, Solids, side_size
from fastmum.scenes.textures import MATERIALS, Face, worn_edges

LEVELS = 11
NODE = 0.09  # metres between the nodes that light is computed for
BRIGHTEST = np.float32(1.3)  # upper limit of the light's gain


class Atlas(NamedTuple):
    """Lit textures of all faces and levels."""

    texels_T: np.ndarray
    offset_LF: np.ndarray
    height_LF: np.ndarray
    width_LF: np.ndarray
    texel_F: np.ndarray

    def sample(self, face_N: np.ndarray, u_N: np.ndarray, v_N: np.ndarray, footprint_N: np.ndarray) -> np.ndarray:
        """Trilinear colours [N, 3] float32 in 0..255; footprint_N is a sample's width on the surface in metres."""
        level = np.log2(np.maximum(footprint_N / self.texel_F[face_N], np.float32(1.0)))
        level = np.minimum(level, np.float32(LEVELS - 1.001))
        lower = level.astype(np.int64)
        weight = (level - lower)[:, None]
        fine = self._bilinear(lower, face_N, u_N, v_N)
        i = np.flatnonzero(weight[:, 0] > 0.02)
        fine[i] += (self._bilinear(lower[i] + 1, face_N[i], u_N[i], v_N[i]) - fine[i]) * weight[i]
        return fine

    def _bilinear(self, level_N: np.ndarray, face_N: np.ndarray, u_N: np.ndarray, v_N: np.ndarray) -> np.ndarray:
        entry = level_N * self.offset_LF.shape[1] + face_N
        width, height = self.width_LF.ravel()[entry], self.height_LF.ravel()[entry]
        x = np.clip(u_N * width - np.float32(0.5), 0, width - 1)
        y = np.clip(v_N * height - np.float32(0.5), 0, height - 1)
        x0, y0 = x.astype(np.int64), y.astype(np.int64)
        fx, fy = (x - x0)[:, None], (y - y0)[:, None]
        right = (x0 + 1 < width).astype(np.int64)
        down = np.where(y0 + 1 < height, width, 0).astype(np.int64)
        start = self.offset_LF.ravel()[entry] + y0 * width.astype(np.int64) + x0
        top = _mix(self._fetch(start), self._fetch(start + right), fx)
        return _mix(top, _mix(self._fetch(start + down), self._fetch(start + down + right), fx), fy)[:, :3]

    def _fetch(self, index_N: np.ndarray) -> np.ndarray:
        return self.texels_T[index_N].view(np.uint8).reshape(-1, 4).astype(np.float32)


def _mix(a: np.ndarray, b: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """a at weight 0, b at weight 1; overwrites b."""
    b -= a
    b *= weight
    b += a
    return b


def bake(scene: Scene, eyes_V3: np.ndarray, pixel: float, seed: tuple[int, ...]) -> Atlas:
    """Paint and light every face that a camera can see.

    The camera positions `eyes_V3` and `pixel`, the metres per pixel at one metre, determine the resolution of textures.
    """
    solids = scene.solids
    faces = _visible_faces(solids, eyes_V3)
    light = _light_faces(scene, faces, np.random.default_rng(seed))
    total = 6 * len(solids)
    offset, texel_F = np.zeros((LEVELS, total), np.int64), np.ones(total, np.float32)
    height, width = np.ones((2, LEVELS, total), np.float32)
    chunks, end = [np.full(1, 0x00808080, np.uint32)], 1
    for (s, side, near), light_CHW in zip(faces, light, strict=True):
        face_id = 6 * s + side
        metres = side_size(int(solids.kind_S[s]), side, solids.half_S3[s])
        texel = max(near * pixel, max(metres) / 1024, 0.0025)
        # Multiples of eight, so that the first mip levels line up exactly.
        w, h = (max(1, round(m / texel)) if m / texel < 16 else 8 * round(m / texel / 8) for m in metres)
        texel_F[face_id] = texel
        half = 0 if solids.kind_S[s] == SPHERE else side  # equal halves of a sphere meet without a seam
        image = _paint(scene, s, Face(h, w, texel), light_CHW, np.random.default_rng([*seed, s, half]))
        for level in range(LEVELS):
            h, w = image.shape[:2]
            offset[level, face_id], height[level, face_id], width[level, face_id] = end, h, w
            chunks.append(np.ascontiguousarray(image).view(np.uint32).ravel())
            end += h * w
            for axis, n in enumerate((h, w)):  # the next level has half the size
                if n > 1:
                    even = image.take(range(0, n - 1, 2), axis).astype(np.uint16)
                    image = ((even + image.take(range(1, n, 2), axis) + 1) >> 1).astype(np.uint8)
    return Atlas(np.concatenate(chunks), offset, height, width, texel_F)


def _visible_faces(solids: Solids, eyes_V3: np.ndarray) -> list[tuple[int, int, float]]:
    """(solid, side, distance of the nearest camera in metres) of the faces that a camera can see."""
    faces = []
    for s, kind in enumerate(solids.kind_S.tolist()):
        local_V3 = (eyes_V3 - solids.centre_S3[s]) @ solids.axes_S33[s].T
        over_V3 = np.maximum(np.abs(local_V3) - solids.half_S3[s], 0)
        for side in SIDES[kind]:
            if kind == SPHERE or (kind == CYLINDER and side == 0):
                faces.append((s, side, float(np.sqrt((over_V3**2).sum(1)).min())))
                continue
            axis, sign = side // 2, 1 - 2 * (side % 2)
            ahead_V = (sign * local_V3[:, axis] - solids.half_S3[s, axis]) * (-1 if kind == SHELL else 1)
            distance_V = np.sqrt(ahead_V**2 + (np.delete(over_V3, axis, 1) ** 2).sum(1))
            if (ahead_V > 0).any():
                faces.append((s, side, float(distance_V[ahead_V > 0].min())))
    return faces


def _light_faces(scene: Scene, faces: list[tuple[int, int, float]], rng: np.random.Generator) -> list[np.ndarray]:
    """Display-space gain of each face on its coarse grid: [3, nv, nu]."""
    solids, grids = scene.solids, []
    for s, side, _ in faces:
        size = side_size(int(solids.kind_S[s]), side, solids.half_S3[s])
        grids.append([int(np.clip(round(m / NODE), 1, 96)) for m in size])
    nodes = [face_nodes(solids, s, side, *grid) for (s, side, _), grid in zip(faces, grids, strict=True)]
    x_3N, n_3N = (np.concatenate(arrays, 1) for arrays in zip(*nodes, strict=True))
    casters = [s for s, part in enumerate(scene.parts) if part.glow == 0 and part.kind != SHELL]
    light_3N = Illumination(solids, casters, x_3N, n_3N, rng).compute(scene.lighting)
    gain_3N = np.sqrt(light_3N * (0.55 / np.median(light_3N.mean(0))))
    gain_3N /= np.sqrt(np.sqrt(1 + (gain_3N / BRIGHTEST) ** 4))  # keeps the texture of a wall next to a lamp
    out, ends = [], np.cumsum([nu * nv for nu, nv in grids])
    for gain, (nu, nv), (s, _, _) in zip(np.split(gain_3N, ends[:-1], 1), grids, faces, strict=True):
        grid_CHW = gain.reshape(3, nv, nu)
        for axis, n in ((1, nv), (2, nu)):  # a 1-2-1 blur, which removes the noise of the random shadow rays
            before, after = np.maximum(np.arange(n) - 1, 0), np.minimum(np.arange(n) + 1, n - 1)
            grid_CHW = (grid_CHW.take(before, axis) + 2 * grid_CHW + grid_CHW.take(after, axis)) * np.float32(0.25)
        glow = scene.parts[s].glow
        out.append(grid_CHW if glow == 0 else np.full((3, 1, 1), glow, np.float32))
    return out


def _paint(scene: Scene, s: int, face: Face, gain_CHW: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    part = scene.parts[s]
    thin = min(face.h, face.w) * face.texel < 0.07
    paint = part.edge if thin and part.edge is not None else part.paint
    mirrored = part.kind == CYLINDER and face.w > 1  # so that the mantle closes without a seam
    drawn = face._replace(w=(face.w + 1) // 2) if mirrored else face
    albedo = MATERIALS[paint.material](rng, drawn, paint.a, paint.b, **paint.options)
    if mirrored:
        albedo = np.concatenate([albedo, albedo[:, :, ::-1]], 2)[:, :, : face.w]
    if part.glow == 0 and part.kind not in (SHELL, SPHERE, CYLINDER):
        albedo = albedo * worn_edges(face)
    lit = np.empty((face.h, face.w, 4), np.uint8)
    for c in range(3):
        gain = np.asarray(Image.fromarray(gain_CHW[c]).resize((face.w, face.h), Image.Resampling.BILINEAR))
        value = albedo[c] * gain
        square = value * value
        lit[:, :, c] = value / np.sqrt(np.sqrt(1 + square * square)) * np.float32(255)  # highlights never clip
    lit[:, :, 3] = 255
    return lit
