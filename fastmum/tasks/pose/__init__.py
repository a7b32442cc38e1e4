"""Relative pose of two views by regression (supplement B, "Two-view relative pose estimation").

The architecture is Reloc3r's (ffrivera0/reloc3r, as the paper's authors train it in davnords/reloc3r).
"""
