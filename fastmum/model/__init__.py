"""The model: configuration, masking, position encoding, encoder and multi-view decoder."""
