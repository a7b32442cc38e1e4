"""From image folders to batches of frames: sequences, the sampling plan, decoding and the embedded scenes."""
