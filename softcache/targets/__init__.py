"""The encodings in torch: encode, decode, fetch and re-temper."""
