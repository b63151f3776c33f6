"""The network, then decoding, generation, verification, and `EmberVLM`, which users call."""
