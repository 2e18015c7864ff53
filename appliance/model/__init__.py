"""Model configuration, weights and the decoder. Lives in the engine process."""
