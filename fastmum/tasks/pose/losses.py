"""Reloc3r's loss: angles of rotations and of directions of translation, in both directions."""

from torch import Tensor

from fastmum.tasks.pose.model import Poses, of_other_view

COSINE = 1 - 1e-6  # bound of cosines (Reloc3r's loss)
EPS = 1e-6  # added to lengths (Reloc3r's loss)


def true_poses(camera_from_world: Tensor) -> Poses:
    """The true poses of pairs of frames, from camera_from_world (F, 4, 4), in their dtype."""
    R, t = camera_from_world[:, :3, :3], camera_from_world[:, :3, 3]
    R_other, t_other = of_other_view(R, 1), of_other_view(t, 1)
    R = R_other @ R.mT
    return Poses(R, t_other - (R @ t[:, :, None])[..., 0])


def pose_errors(found: Poses, true: Poses) -> tuple[Tensor, Tensor]:
    """Angles of rotations and of directions of translation, radians (F,) each; pi / 2 if a translation is 0.

    The loss of a pair is the sum of both angles of both frames.
    """
    cosines = ((found.R * true.R).sum((-2, -1)) - 1).div(2)
    a, b = (t / (t.norm(dim=-1, keepdim=True) + EPS) for t in (found.t, true.t))
    rotation, direction = (x.clamp(-COSINE, COSINE).acos() for x in (cosines, (a * b).sum(-1)))
    return rotation, direction
