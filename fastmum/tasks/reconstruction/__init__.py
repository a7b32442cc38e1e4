"""Feedforward reconstruction: cameras, depth and points of the frames of a scene in one pass (supplement B, Eq. 3).

The architecture and the names of its weights are those of VGGT (facebookresearch/vggt, as trained in davnords/vggt).
"""
