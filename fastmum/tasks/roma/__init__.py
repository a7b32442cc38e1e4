"""Dense matching of two images: RoMa (Parskatt/RoMa) on any frozen encoder (supplement B, "Dense matching").

The architecture and the names of its weights are RoMa's. Warps are in [-1, 1] from edge to edge, x first.
"""
