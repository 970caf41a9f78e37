"""Vision towers: patches of images and of video frames to embeddings of placeholder tokens."""
